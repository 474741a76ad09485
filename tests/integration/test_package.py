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
FILES = {path.relative_to(ROOT).as_posix() for path in (*PACKAGE.rglob("*.py"), PACKAGE / "py.typed")}

pytestmark = pytest.mark.skipif(
    any(find_spec(module) is None for module in ("build", "setuptools", "pip")),
    reason="needs build, setuptools and pip",
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the wheel and the sdist that it was built from."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
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


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
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


def test_installed_wheel_registers_the_model(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index")
    run(*pip, "--target", str(target), str(wheel), cwd=tmp_path)
    code = f"""
import sys
from importlib.metadata import distribution
from pathlib import Path

from anomalib.models import SimpleNet

target = Path({str(target)!r}).resolve()
assert SimpleNet.__module__ == "anomalib_simplenet.lightning_model"
modules = [module for name, module in sys.modules.items() if name.startswith("anomalib_simplenet")]
assert all(Path(module.__file__).resolve().is_relative_to(target) for module in modules), modules
assert distribution("anomalib-simplenet").locate_file("").resolve() == target
"""
    environment = {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    run(sys.executable, "-c", code, cwd=tmp_path, **environment)
