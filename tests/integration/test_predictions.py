"""predictions.csv: rows, names, and tables of several processes, which this file starts when run as a module."""

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.strategies import SingleDeviceStrategy

from anomalib_simplenet.callbacks.predictions import COLUMNS, Predictions

from .conftest import folder_data, tiny_model

ROOT = Path(__file__).parents[2]


def read(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def engine(folder: Path, **arguments: object) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False, **arguments)


@pytest.fixture
def checkpoint(pictures: Path) -> Path:
    trained = engine(pictures.parent / "trained", max_epochs=1)
    data = folder_data(pictures, val_split_mode="same_as_test")
    trained.fit(tiny_model(visualizer=False, report=False), datamodule=data)
    return Path(trained.trainer.checkpoint_callback.best_model_path)


def test_predictions_name_model_checkpoint_and_thresholds(pictures: Path, checkpoint: Path) -> None:
    other = engine(pictures.parent / "other")
    other.predict(tiny_model(visualizer=False), data_path=pictures / "test" / "good", ckpt_path=checkpoint)
    rows = read(Path(other.trainer.default_root_dir) / "predictions.csv")
    assert [Path(row["image_path"]).name for row in rows] == ["000.png", "001.png", "002.png", "003.png"]
    assert list(rows[0]) == list(COLUMNS)
    for row in rows:
        assert (row["model"], row["checkpoint"]) == ("SimpleNet", str(checkpoint.resolve()))
        assert row["pred_label"] == str(int(float(row["pred_score"]) > float(row["image_threshold"])))
        assert (row["image_threshold"], row["pixel_threshold"], row["gt_label"]) == ("0.5", "0.5", "")


def test_predictions_of_runs_in_one_folder_at_a_time_are_kept_apart(tmp_path: Path) -> None:
    """Two processes that predict into one folder at the same time: each claims a name of its own, whole."""
    trainer = SimpleNamespace(
        default_root_dir=str(tmp_path / "results"),
        world_size=1,
        ckpt_path=None,
        strategy=SingleDeviceStrategy("cpu"),
    )
    model = SimpleNamespace(name="SimpleNet", post_processor=None)
    runs = [Predictions() for _ in range(3)]
    for run in runs:
        run.on_predict_start(trainer, model)
    for number in range(2):
        for name, run in zip("abc", runs, strict=True):
            batch = SimpleNamespace(
                image_path=[f"{name}{number}"], pred_score=torch.ones(1), pred_label=None, gt_label=None
            )
            run.on_predict_batch_end(trainer, model, batch, batch, number)
    for run in runs:
        run.on_predict_end(trainer, model)
    tables = ["predictions.csv", "predictions-1.csv", "predictions-2.csv"]
    assert [run.table.name for run in runs] == tables
    for name, table in zip("abc", tables, strict=True):
        rows = read(tmp_path / "results" / table)
        assert [row["image_path"] for row in rows] == [f"{name}0", f"{name}1"]


def test_predictions_of_another_rank_go_to_the_folder_of_the_first(tmp_path: Path) -> None:
    """The second process has numbered its results folder otherwise."""
    strategy = SimpleNamespace(broadcast=lambda _: str(tmp_path / "v0"))
    trainer = SimpleNamespace(default_root_dir=str(tmp_path / "v1"), global_rank=1, world_size=2, strategy=strategy)
    run, model = Predictions(), SimpleNamespace(post_processor=None)
    run.on_predict_start(trainer, model)
    run.on_predict_end(trainer, model)
    assert run.table == tmp_path / "v0" / "predictions-rank1.csv"
    assert run.table.is_file()


def test_predictions_of_two_processes_are_two_tables_without_a_report(pictures: Path, checkpoint: Path) -> None:
    """A test of seven images without masks, of which Lightning repeats one."""
    (pictures / "test" / "good" / "000.png").unlink()
    program = [sys.executable, "-m", "tests.integration.test_predictions", str(pictures), str(checkpoint)]
    process = subprocess.run(program, cwd=ROOT, timeout=300, capture_output=True, text=True, check=False)
    tables = sorted((pictures.parent / "two").rglob("predictions*"))
    assert [table.name for table in tables] == ["predictions-rank0.csv", "predictions-rank1.csv"], process.stderr
    assert len({table.parent for table in tables}) == 1
    assert not list((pictures.parent / "two").rglob("report*"))
    data = folder_data(pictures, masks=False, val_split_mode="none")
    data.setup()
    paths = list(data.test_data.samples.image_path)
    for rank, table in enumerate(tables):
        assert [row["image_path"] for row in read(table)] == [*paths, paths[0]][rank::2]
    assert process.returncode == 0
    assert "Traceback" not in process.stderr


def test_predictions_explain_the_bare_assertion_of_fewer_images_than_processes() -> None:
    with pytest.raises(AssertionError) as raised:
        UnrepeatedDistributedSampler(["image"], num_replicas=2, rank=1)
    assert str(raised.value) == ""
    Predictions().on_exception(SimpleNamespace(predicting=True, world_size=2), None, raised.value)
    assert str(raised.value) == "Fewer images than the 2 processes? Then predict with one device."


def main() -> None:
    pictures, checkpoint = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    two, model = engine(pictures.parent / "two", strategy="ddp_fork", devices=2), tiny_model(visualizer=False)
    two.test(model, datamodule=folder_data(pictures, masks=False, val_split_mode="none"), ckpt_path=checkpoint)


if __name__ == "__main__":
    main()
