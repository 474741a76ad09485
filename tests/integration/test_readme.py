"""The README's commands and scripts run, in the order they stand, in one fresh folder."""

import os
import re
import runpy
import shlex
import shutil
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import yaml
from anomalib.cli import AnomalibCLI

from anomalib_simplenet import SimpleNet

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
# Installing is test_package.py's, the quickstart test_quickstart.py's, a benchmark of small models test_configs.py's.
ELSEWHERE = ("git ", "pip ", "python -m anomalib_simplenet.quickstart", "anomalib benchmark ")


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block of commands or Python."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what bash would do with a line, but in this process: importing anomalib for each would take minutes."""
    words = shlex.split(os.path.expandvars(line), comments=True)
    words = [Path(word[6:-1]).read_text() if word.startswith("$(cat ") else word for word in words]
    if not words:
        return
    if re.fullmatch(r"[A-Z]+=.*", words[0]):
        monkeypatch.setenv(*words[0].split("=", 1))
    elif words[0] == "anomalib":
        with suppress(SystemExit) if "--model.help" in words else nullcontext():
            AnomalibCLI(words[1:])
    else:
        assert words[:2] == ["python", "-m"]
        monkeypatch.setattr(sys, "argv", words[2:])
        try:
            runpy.run_module(words[2], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


def link(images: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for image in images:
        (folder / image.name).symlink_to(image)


def test_readme_commands_run_in_the_order_they_stand(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")  # setuptools refuses to replace distutils once in use
    parts = {part: sorted((real / "mono" / part).iterdir()) for part in ("train/good", "test/good", "test/defective")}
    for name in ("elpv/mono", "elpv/poly", "my_images"):  # few images, which the quickstart leaves alone
        for part, images in parts.items():
            count = 40 if (name, part) == ("elpv/mono", "test/good") else 5  # 5 % of false alarms needs 19 to validate
            link(images[:count], tmp_path / "datasets" / name / part)
    for part in ("good", "defective"):
        link(parts[f"test/{part}"][5:8], tmp_path / "datasets" / "my_images" / "held_out" / part)
    (tmp_path / "datasets" / "efficientnet_lite0").symlink_to(real / "efficientnet_lite0")
    shutil.copy(parts["test/good"][0], tmp_path / "part.png")

    for config in (ROOT / "configs").rglob("*.yaml"):  # shorter ones, which the quickstart leaves alone, too
        target = tmp_path / config.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            re.sub(
                "num_workers: .*",
                "num_workers: 0",
                re.sub("max_(epochs|steps): .*", "max_epochs: 1", config.read_text()),
            )
        )
    monkeypatch.chdir(tmp_path)
    done = []
    for language, block in blocks():
        if language == "python":
            short = block.replace("max_steps=1000", "max_epochs=1").replace("seed=0", "seed=0, num_workers=0")
            exec(compile(short, "README.md", "exec"), {})
            done.append(language)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith(ELSEWHERE):
                run(line, monkeypatch)
                done.append(line)
    assert sum(line.startswith("anomalib") for line in done) >= 6
    assert done.count("python") == 2
    assert re.search(r"^score 0\.\d\d, defective: (True|False)$", capsys.readouterr().out, re.MULTILINE)
    for written in ("exported/weights/openvino/model.xml", "quantised/weights/openvino/model.xml", "mask.png"):
        assert (tmp_path / written).is_file()


def test_readme_metrics_config_adds_aupro(tmp_path: Path) -> None:
    (written,) = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "configs" / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "metrics.yaml").write_text(written)
    preset = yaml.safe_load((ROOT / "configs" / "model" / "simplenet_edge.yaml").read_text())
    resnet = {"backbone": "resnet18", "layers": ["layer1", "layer2"], "map_layer": None, "pre_trained": False}
    preset["model"]["init_args"].update(resnet)
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(preset))
    configs = [argument for name in ("preset", "metrics") for argument in ("--config", str(tmp_path / f"{name}.yaml"))]
    cli = AnomalibCLI(["train", *configs, "--data", str(ROOT / "configs" / "data" / "folder.yaml")], run=False)
    assert isinstance(cli.model, SimpleNet)
    names = [metric.name for metric in cli.model.evaluator.test_metrics]
    assert names == ["image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_AUPRO"]


def test_readme_names_files_that_exist() -> None:
    folders = [path for path in ROOT.iterdir() if path.name not in {".venv", "datasets"}]  # not the project's
    files = [f"/{path.relative_to(ROOT).as_posix()}" for folder in folders for path in (folder, *folder.rglob("*"))]
    for file in (README, ROOT / "configs" / "README.md", ROOT / "tests" / "benchmarks" / "README.md"):
        text = re.sub(r"^```text.*?^```", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
        for name in re.findall(r"[\w./-]+\.(?:yaml|png|toml|py|md|csv|json)\b", text):
            written = Path(name).name in {
                "part.png",
                "mask.png",
                "MASK.png",
                "config.json",
                "predictions.csv",
                "predictions-rank0.csv",
                "7.png",
            }
            assert written or any(file.endswith(f"/{name}") for file in files), name


def test_readme_is_short() -> None:
    text = README.read_text()
    assert len(text.splitlines()) < 230
    assert len(text.split()) < 1600
