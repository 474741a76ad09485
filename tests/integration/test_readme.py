"""The README's example runs as it is written."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_python_example_runs(real: Path, tmp_path: Path) -> None:
    (tmp_path / "datasets" / "elpv").mkdir(parents=True)
    (tmp_path / "datasets" / "elpv" / "mono").symlink_to(real / "mono")
    (tmp_path / "datasets" / "efficientnet_lite0").symlink_to(real / "efficientnet_lite0")
    (tmp_path / "configs").symlink_to(README.parent / "configs")
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(example.strip().splitlines()) <= 10
    limits = ", ".join(f"limit_{part}_batches=2" for part in ("train", "val", "test", "predict"))
    shortened = example.replace("max_epochs=24", f"max_epochs=1, {limits}")
    assert shortened != example
    process = subprocess.run(
        [sys.executable, "-c", shortened], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert Path(process.stdout.splitlines()[-1]).is_file()


def test_files_that_it_names_exist() -> None:
    for name in re.findall(r"[\w./-]+\.(?:yaml|png|toml|py)\b", README.read_text()):
        assert list(README.parent.rglob(name.lstrip("/")))
