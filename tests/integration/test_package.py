"""What is published: the files in wheel and sdist, and a wheel that registers the model by itself."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "anomalib_simplenet"
PRESETS = {f"anomalib_simplenet/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
DATA = (PACKAGE / "py.typed", PACKAGE / "callbacks" / "report.html.jinja")
FILES = PRESETS | {path.relative_to(ROOT).as_posix() for path in (*PACKAGE.rglob("*.py"), *DATA)}

pytestmark = pytest.mark.skipif(
    any(find_spec(module) is None for module in ("build", "setuptools", "pip")),
    reason="needs build, setuptools and pip",
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the wheel and the sdist that it was built from."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    shutil.copytree(PACKAGE, source / PACKAGE.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source), cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def run(*command: str, cwd: Path, **environment: str) -> None:
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def dist_info(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def metadata(wheel: Path) -> Message:
    return Parser().parsestr(dist_info(wheel, "METADATA"))


def test_wheel_holds_the_package_its_presets_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == FILES


def test_sdist_holds_what_a_build_needs(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    assert names >= FILES | {"pyproject.toml", "README.md", "LICENSE"}


def test_wheel_is_pure_python(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_names_licence_and_python(wheel: Path) -> None:
    fields = metadata(wheel)

    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.10"
    assert "Apache License" in dist_info(wheel, "licenses/LICENSE")


def test_wheel_has_the_entry_point_that_torch_calls(wheel: Path) -> None:
    assert dist_info(wheel, "entry_points.txt").split() == [
        "[torch.backends]",
        "anomalib_simplenet",
        "=",
        "anomalib_simplenet.registry:autoload",
    ]


def install(wheel: Path, target: Path) -> dict[str, str]:
    """Install a wheel into a folder, and give the environment that has it imported from there."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index")
    run(*pip, "--target", str(target), str(wheel), cwd=target.parent)
    return {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}


def test_installed_wheel_registers_the_model(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    environment = install(wheel, target)
    code = f"""
import sys
from importlib.metadata import distribution
from pathlib import Path

from anomalib.models import SimpleNet

target = Path({str(target)!r}).resolve()
assert SimpleNet.__init__.__module__ == "anomalib_simplenet.lightning_model"
modules = [module for name, module in sys.modules.items() if name.startswith("anomalib_simplenet")]
assert all(Path(module.__file__).resolve().is_relative_to(target) for module in modules), modules
assert distribution("anomalib-simplenet").locate_file("").resolve() == target
"""
    run(sys.executable, "-c", code, cwd=tmp_path, **environment)


def test_installed_wheel_writes_its_presets_outside_a_checkout(wheel: Path, tmp_path: Path) -> None:
    environment = install(wheel, tmp_path / "site")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    run(sys.executable, "-m", "anomalib_simplenet.quickstart", "--prepare-only", cwd=folder, **environment)
    written = {path.relative_to(folder).as_posix() for path in (folder / "configs").rglob("*.yaml")}
    assert {f"anomalib_simplenet/{path}" for path in written} == PRESETS
    assert (folder / "datasets" / "efficientnet_lite0" / "model.safetensors").is_file()


def test_installed_wheel_leaves_other_plug_ins_of_torch_working(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    environment = install(wheel, target)
    for name in ("aa_before", "zz_after"):
        info = target / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[torch.backends]\n{name} = {name}:autoload\n")
        (target / f"{name}.py").write_text("""
from wrapt import register_post_import_hook
met = []
def autoload():
    register_post_import_hook(met.append, "anomalib.models.image")
""")
    code = """
import torch, aa_before, zz_after
from anomalib.models import SimpleNet, get_model
assert [module.__name__ for module in aa_before.met + zz_after.met] == ["anomalib.models.image"] * 2
assert type(get_model("SimpleNet", backbone="resnet18", pre_trained=False)) is SimpleNet
"""
    run(sys.executable, "-c", code, cwd=tmp_path, **environment)


@pytest.mark.parametrize("rubbish", ["", "syntax error", "raise SystemError", "import missing_module"])
def test_broken_install_leaves_torch_and_anomalib_usable(wheel: Path, tmp_path: Path, rubbish: str) -> None:
    target = tmp_path / "site"
    environment = install(wheel, target)
    for path in (target / PACKAGE.name).rglob("*.py"):
        if path.relative_to(target / PACKAGE.name).as_posix() not in {"__init__.py", "registry.py"}:
            path.write_text(rubbish)
    code = "import torch; torch.zeros(1); from anomalib.models import get_model; get_model('Padim', pre_trained=False)"
    run(sys.executable, "-c", code, cwd=tmp_path, **environment)


def test_uninstall_leaves_nothing_behind(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    before = set((tmp_path / "venv").rglob("*"))
    run(*pip, "install", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    assert set((tmp_path / "venv").rglob("*")) > before
    run(*pip, "uninstall", "--yes", "anomalib-simplenet", cwd=tmp_path)
    assert set((tmp_path / "venv").rglob("*")) == before
