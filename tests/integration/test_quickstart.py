"""The quickstart does what the README says of it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from anomalib.data.utils import read_image

from anomalib_simplenet import quickstart

CONFIGS = Path(__file__).parents[2] / "configs"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "anomalib_simplenet.quickstart", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_quickstart_weights_are_those_of_imagenet(real: Path) -> None:
    """Weights in the wrong places would give an almost uniform distribution over the classes."""
    network = timm.create_model(f"local-dir:{real / 'efficientnet_lite0'}", pretrained=True).eval()
    photograph = read_image(next((real / "mono" / "test" / "good").iterdir()), as_tensor=True)[None]
    with torch.no_grad():
        confidence = network((photograph - 0.45) / 0.225).softmax(dim=1)
    # Few of 1000 classes resemble a dark grid; wrong weights give all of them about the same probability.
    assert confidence.topk(20).values.sum() > 0.3


def test_quickstart_split_is_fixed_and_disjoint(real: Path, tmp_path: Path) -> None:
    quickstart.prepare_cells(tmp_path / "again", "mono")
    parts = ["train/good", "test/good", "test/defective"]
    names = {part: {path.name for path in (real / "mono" / part).iterdir()} for part in parts}
    assert {part: len(found) for part, found in names.items()} == dict(zip(parts, (392, 196, 313), strict=True))
    assert len(set.union(*names.values())) == 392 + 196 + 313
    assert all({path.name for path in (tmp_path / "again" / part).iterdir()} == names[part] for part in parts)


def test_quickstart_names_a_missing_package_and_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    with pytest.raises(SystemExit, match=r"needs elpv_dataset: pip install 'anomalib-simplenet\[quickstart\]'"):
        quickstart.prepare_cells(tmp_path / "mono", "mono")


def test_quickstart_writes_missing_presets_and_leaves_existing_ones_alone(tmp_path: Path) -> None:
    own = tmp_path / "model" / "simplenet_edge.yaml"
    own.parent.mkdir()
    own.write_text("# my own\n")
    quickstart.prepare_configs(tmp_path)
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.yaml")}
    assert written == {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")}
    assert own.read_text() == "# my own\n"


def test_quickstart_reaches_its_accuracy_in_an_empty_folder_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    process = run(tmp_path)
    assert process.returncode == 0, process.stderr[-2000:]
    summary = process.stdout[process.stdout.rindex("SimpleNet on") :]
    assert float(re.search(r"image AUROC (0\.\d+)", summary)[1]) >= 0.90
    for name in ("checkpoint", "OpenVINO", "pictures"):
        assert Path(re.search(rf"{name} +(\S+)", summary)[1]).exists()
    assert "next" in summary.lower()
    alarms, normal = map(int, re.search(r"(\d+) of (\d+) good cells called defective", summary).groups())
    assert f"{normal} normal images: at most 5 % false alarms expected" in summary  # calibrated on as many others
    assert alarms / normal <= 0.1
    cells = re.findall(r"score 0\.\d\d, p-value (0\.\d{3}), (\w+)", process.stdout)
    assert len(cells) == 6
    assert all((label == "defective") == (float(p_value) <= 0.05) for p_value, label in cells)

    weights = tmp_path / "datasets" / "efficientnet_lite0" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert run(tmp_path, "--prepare-only").returncode == 0
    assert weights.stat().st_mtime_ns == before
