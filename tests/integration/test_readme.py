"""The README's example runs as it is written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_python_example_runs(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "datasets" / "elpv").mkdir(parents=True)
    (tmp_path / "datasets" / "elpv" / "mono").symlink_to(real / "mono")
    (tmp_path / "datasets" / "efficientnet_lite0").symlink_to(real / "efficientnet_lite0")
    (tmp_path / "configs").symlink_to(README.parent / "configs")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(example.strip().splitlines()) <= 10
    shortened = example.replace("max_epochs=6", "max_epochs=1, limit_train_batches=4, limit_val_batches=2")
    shortened = shortened.replace(
        "Engine(", "Engine(limit_test_batches=1, limit_predict_batches=2, accelerator='cpu', "
    )
    exec(shortened, {})
    assert Path(capsys.readouterr().out.splitlines()[-1]).is_file()


def test_files_that_it_names_exist() -> None:
    for name in re.findall(r"[\w./-]+\.(?:yaml|png|toml|py)\b", README.read_text()):
        assert list(README.parent.rglob(name.lstrip("/")))
