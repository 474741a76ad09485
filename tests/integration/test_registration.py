"""anomalib finds SimpleNet by name, whatever is imported first; each test asks a new process."""

import json
import os
import re
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml

from anomalib_simplenet import SimpleNet, SimpleNetModel

ARGUMENTS = {
    name: parameter.default
    for each in (SimpleNet, SimpleNetModel)
    for name, parameter in signature(each).parameters.items()
    if name != "architecture"
}
ANOMALIB = shutil.which("anomalib", path=str(Path(sys.executable).parent)) or "anomalib"
NO_AUTOLOAD = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
WARNING = "anomalib-simplenet could not register its model"


class Process:
    """Runs commands in new processes in a folder of their own."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        defaults = {"HF_HUB_OFFLINE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
        result = subprocess.run(
            command,
            cwd=self.cwd,
            env={**os.environ, **defaults, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result

    def python(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-c", code, **environment)

    def printed_model(self, name: str, **environment: str) -> dict[str, Any]:
        result = self.run(ANOMALIB, "train", "--model", name, "--print_config", **environment)
        return yaml.safe_load(result.stdout)["model"]


@pytest.fixture
def process(tmp_path: Path) -> Process:
    return Process(tmp_path)


def test_cli_takes_the_model_by_name_and_prints_its_defaults(process: Process) -> None:
    model = process.printed_model("SimpleNet")

    assert model["class_path"].endswith(".SimpleNet")
    assert model["init_args"] == json.loads(json.dumps(ARGUMENTS))


def test_cli_help_describes_every_argument(process: Process) -> None:
    text = process.run(ANOMALIB, "train", "--model.help=SimpleNet").stdout

    found = re.findall(r"^  --model\.(?:init_args\.)?(\w+)[ ,](.*?)\(type:\s", text, flags=re.MULTILINE | re.DOTALL)
    assert [name for name, _ in found] == list(ARGUMENTS)
    for name, entry in found:
        metavars, _, description = entry.partition("\n")
        assert description.partition("Defaults to")[0].strip(), f"no description of {name} {metavars}"


def test_model_is_found_by_every_spelling_of_its_name(process: Process) -> None:
    process.python("""
from anomalib.models import SimpleNet, get_model, list_models

import anomalib_simplenet

assert SimpleNet is anomalib_simplenet.SimpleNet
assert "simple_net" in list_models()
arguments = {"backbone": "resnet18", "pre_trained": False, "noise_std": 0.25}
for name in ("simple_net", "SimpleNet"):
    model = get_model(name, **arguments)
    assert type(model) is SimpleNet and model.hparams["noise_std"] == 0.25, name
for name in ("SimpleNet", "anomalib.models.SimpleNet"):
    model = get_model({"class_path": name, "init_args": arguments})
    assert type(model) is SimpleNet and model.hparams["noise_std"] == 0.25, name
""")


@pytest.mark.parametrize(
    "first",
    [
        "import torch",
        "import anomalib.models",
        "import anomalib.callbacks",
        "from anomalib.engine import Engine",
        "from anomalib_simplenet import SimpleNet",
        "import anomalib_simplenet.lightning_model",
        "import anomalib_simplenet.torch_model",
    ],
)
def test_model_is_registered_once_whatever_is_imported_first(process: Process, first: str) -> None:
    result = process.python(f"""
{first}

import anomalib.models

import anomalib_simplenet

assert anomalib.models.SimpleNet is anomalib_simplenet.SimpleNet
assert anomalib.models.image.SimpleNet is anomalib_simplenet.SimpleNet
names = [model.__name__ for model in anomalib.models.AnomalibModule.__subclasses__()]
assert names.count("SimpleNet") == 1, names
""")
    assert WARNING not in result.stderr


def test_importing_the_package_does_not_import_torch(process: Process) -> None:
    process.python("""
import sys

import anomalib_simplenet

assert not {"torch", "anomalib"} & set(sys.modules)
""")


def test_importing_torch_imports_neither_anomalib_nor_the_model(process: Process) -> None:
    process.python("""
import sys

import torch

ours = {name for name in sys.modules if name.startswith("anomalib")}
assert ours == {"anomalib_simplenet", "anomalib_simplenet.registry"}, ours
""")


def test_inferencers_take_p_values_though_no_model_is_imported(process: Process) -> None:
    process.python("""
import sys
from anomalib.deploy import OpenVINOInferencer
from anomalib.data import NumpyImageBatch
assert "anomalib_simplenet.lightning_model" not in sys.modules
assert "p_value" in NumpyImageBatch.__dataclass_fields__
""")


def test_without_autoload_the_cli_takes_the_class_path(process: Process) -> None:
    model = process.printed_model("anomalib_simplenet.SimpleNet", **NO_AUTOLOAD)

    assert model["class_path"].endswith(".SimpleNet")


def test_without_autoload_torch_leaves_the_package_alone(process: Process) -> None:
    code = "import sys, torch; assert not [name for name in sys.modules if name.startswith('anomalib')]"
    process.python(code, **NO_AUTOLOAD)


def test_torch_without_wrapt_imports_with_one_warning(process: Process) -> None:
    code = "import sys; sys.modules['wrapt'] = None; import torch; torch.zeros(1)"
    for warnings in ("always", "error"):
        result = process.python(code, PYTHONWARNINGS=warnings)
        assert result.stderr.count(WARNING) == 1


def test_anomalib_with_a_broken_model_stays_usable_with_one_warning(process: Process) -> None:
    code = """
import sys

sys.modules["anomalib_simplenet.torch_model"] = None

from anomalib.models import Padim, list_models

assert "padim" in list_models()
assert "simple_net" not in list_models()
"""
    for warnings in ("default", "error::UserWarning"):
        result = process.python(code, PYTHONWARNINGS=warnings)
        assert result.stderr.count(WARNING) == 1
