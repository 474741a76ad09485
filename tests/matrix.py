"""Run the tests with other versions: ``make matrix``, or ``python tests/matrix.py NAME ...`` for some.

Each combination gets an environment of its own in a temporary folder; several gigabytes are downloaded for each.
Interpreters that are not installed are skipped. Prints a table and writes ``tests/benchmarks/results/matrix.json``.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "benchmarks" / "results" / "matrix.json"
# the lowest version that pyproject.toml admits of each requirement
OLDEST = re.findall(r'^    "([\w\[\]-]+>=[\d.]+)', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
COMBINATIONS = {  # name: interpreter, what to install beside the package's own requirements
    "python3.10": ("python3.10", ()),
    "python3.11": ("python3.11", ()),
    "python3.12": ("python3.12", ()),
    "python3.13": ("python3.13", ()),
    "oldest": ("python3.10", tuple(requirement.replace(">=", "==") for requirement in OLDEST)),
}
PACKAGES = ("anomalib", "torch", "torchvision", "timm", "lightning", "jsonargparse", "openvino")
VERSIONS = f"from importlib.metadata import version; print({{name: version(name) for name in {PACKAGES}}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *COMBINATIONS], metavar="NAME", default=[])
    parser.add_argument("--tests", nargs="+", default=["tests/unit", "tests/integration"])
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in args.names or COMBINATIONS:
        interpreter, requirements = COMBINATIONS[name]
        program = shutil.which(interpreter)
        if program is None:
            print(f"{name}: {interpreter} is not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            results[name] = run(Path(folder), program, requirements, args.tests)
        print(f"{name}: {results[name]}", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def run(folder: Path, program: str, requirements: tuple[str, ...], tests: list[str]) -> dict[str, str]:
    """Install and test in a new environment; versions, and the tests' last line."""
    subprocess.run([program, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", f"{ROOT}[test]", *requirements]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        return {"result": f"cannot be installed: {installed.stderr.strip().splitlines()[-1]}"}
    versions = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", *tests]
    tested = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = tested.stdout.strip().splitlines()
    failed = ", ".join(line.split()[1] for line in lines if line.startswith(("FAILED", "ERROR")))
    return {"versions": versions.strip(), "result": lines[-1], **({"failed": failed} if failed else {})}


if __name__ == "__main__":
    main()
