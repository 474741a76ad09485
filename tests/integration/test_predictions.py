"""predictions.csv: rows, names, and tables of several processes. Run as a module, this is one of the processes."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from anomalib_simplenet.callbacks.predictions import COLUMNS, Predictions

from .conftest import folder_data, tiny_model, write_images

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
        is_global_zero=True,
        world_size=1,
        predict_dataloaders=[],
        ckpt_path=None,
        predict_loop=SimpleNamespace(current_batch_indices=[]),
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
            run.write_on_batch_end(trainer, model, batch, [number], batch, number, 0)
    for run in runs:
        run.on_predict_end(trainer, model)
    tables = ["predictions.csv", "predictions-1.csv", "predictions-2.csv"]
    assert [run.table.name for run in runs] == tables
    for name, table in zip("abc", tables, strict=True):
        rows = read(tmp_path / "results" / table)
        assert [row["image_path"] for row in rows] == [f"{name}0", f"{name}1"]


def in_two_processes(folder: Path, command: str, checkpoint: Path, *paths: Path) -> subprocess.CompletedProcess:
    arguments = [json.dumps(value) for value in (command, str(folder), str(checkpoint), [str(path) for path in paths])]
    program = [sys.executable, "-m", "tests.integration.test_predictions", *arguments]
    return subprocess.run(program, cwd=ROOT, timeout=300, capture_output=True, text=True, check=False)


def test_predictions_of_two_processes_and_loaders_equal_those_of_one(pictures: Path, checkpoint: Path) -> None:
    paths = [pictures / "five", pictures / "two"]
    write_images(paths[0], 5)
    write_images(paths[1], 2)
    process = in_two_processes(pictures.parent / "together", "predict", checkpoint, *paths)
    assert process.returncode == 0, process.stderr[-3000:]
    alone = engine(pictures.parent / "alone")
    alone.predict(tiny_model(visualizer=False), dataloaders=loaders(paths), ckpt_path=checkpoint)
    (one,), (two,) = (list((pictures.parent / name).rglob("predictions*")) for name in ("alone", "together"))
    expected = [str(path) for folder in paths for path in sorted(folder.iterdir())]
    assert [row["image_path"] for row in read(one)] == [row["image_path"] for row in read(two)] == expected
    for row, other in zip(read(one), read(two), strict=True):
        assert float(row.pop("pred_score")) == pytest.approx(float(other.pop("pred_score")), abs=1e-5)
        assert row == other


def test_predictions_of_fewer_images_than_processes_are_refused_by_name(pictures: Path, checkpoint: Path) -> None:
    write_images(pictures / "one", 1)
    process = in_two_processes(pictures.parent / "together", "predict", checkpoint, pictures / "one")
    assert process.returncode != 0
    assert "fewer images than the 2 processes: predict with one device" in process.stderr


def test_test_of_two_processes_leaves_one_table_and_report(pictures: Path, checkpoint: Path) -> None:
    """Also without masks, and of an odd number of images, of which Lightning repeats one."""
    (pictures / "test" / "good" / "003.png").unlink()
    process = in_two_processes(pictures.parent / "together", "test", checkpoint, pictures)
    assert process.returncode == 0, process.stderr[-3000:]
    (table,) = (pictures.parent / "together").rglob("predictions*")
    assert (table.parent / "report.html").is_file()
    data = folder_data(pictures, masks=False, val_split_mode="none")
    data.setup()
    assert [row["image_path"] for row in read(table)] == list(data.test_data.samples.image_path)


def loaders(paths: list[Path]) -> list[DataLoader]:
    datasets = [PredictDataset(path, image_size=(64, 64)) for path in paths]
    return [DataLoader(dataset, batch_size=2, collate_fn=dataset.collate_fn) for dataset in datasets]


def main() -> None:
    command, folder, checkpoint, paths = (json.loads(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    model = tiny_model(visualizer=False)
    pair = engine(Path(folder), strategy="ddp", devices=2)
    if command == "test":
        data = folder_data(Path(paths[0]), masks=False, val_split_mode="none")
        pair.test(model, datamodule=data, ckpt_path=checkpoint)
    else:
        pair.predict(model, dataloaders=loaders([Path(path) for path in paths]), ckpt_path=checkpoint)


if __name__ == "__main__":
    main()
