"""predictions.csv: rows, names, and tables of several processes. Run as a module, this is one of the processes."""

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import Folder, PredictDataset
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


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two processes that predict with two data loaders, test without masks, and then predict one image."""
    folder = tmp_path_factory.mktemp("two_processes")
    for place, (part, number) in enumerate(
        {"train/good": 5, "test/good": 2, "test/bad": 3, "five": 5, "two": 2, "one": 1}.items()
    ):
        write_images(folder / part, number, seed=place)
    trained = engine(folder / "trained", max_epochs=1)
    trained.fit(tiny_model(visualizer=False, report=False), datamodule=data(folder, val_split_mode="same_as_test"))
    checkpoint = trained.trainer.checkpoint_callback.best_model_path
    program = [sys.executable, "-m", "tests.integration.test_predictions", str(folder), checkpoint]
    process = subprocess.run(program, cwd=ROOT, timeout=300, capture_output=True, text=True, check=False)
    return SimpleNamespace(folder=folder, checkpoint=checkpoint, process=process)


def test_predictions_of_two_processes_and_loaders_equal_those_of_one(two_processes: SimpleNamespace) -> None:
    folder = two_processes.folder
    alone = engine(folder / "alone")
    alone.predict(tiny_model(visualizer=False), dataloaders=loaders(folder), ckpt_path=two_processes.checkpoint)
    (one,), (two,) = (list((folder / name).rglob("predictions*")) for name in ("alone", "predict"))
    expected = [str(path) for part in ("five", "two") for path in sorted((folder / part).iterdir())]
    assert [row["image_path"] for row in read(one)] == [row["image_path"] for row in read(two)] == expected
    for row, other in zip(read(one), read(two), strict=True):
        assert float(row.pop("pred_score")) == pytest.approx(float(other.pop("pred_score")), abs=1e-5)
        assert row == other


def test_predictions_of_a_test_by_two_processes_have_each_image_once(two_processes: SimpleNamespace) -> None:
    """Of five images, of which Lightning repeats one; there are no masks, and there is a report."""
    (table,) = (two_processes.folder / "test_results").rglob("predictions*")
    assert (table.parent / "report.html").is_file()
    tested = data(two_processes.folder, val_split_mode="none")
    tested.setup()
    assert [row["image_path"] for row in read(table)] == list(tested.test_data.samples.image_path)
    assert "recommended to use `Trainer(devices=1" in two_processes.process.stderr


def test_predictions_of_fewer_images_than_processes_are_refused_by_name(two_processes: SimpleNamespace) -> None:
    assert two_processes.process.returncode != 0
    assert "fewer images than the 2 processes: predict with one device" in two_processes.process.stderr


def data(folder: Path, **arguments: object) -> Folder:
    return folder_data(folder, masks=False, **arguments)


def loaders(folder: Path, *parts: str) -> list[DataLoader]:
    datasets = [PredictDataset(folder / part, image_size=(64, 64)) for part in parts or ("five", "two")]
    return [DataLoader(dataset, batch_size=2, collate_fn=dataset.collate_fn) for dataset in datasets]


def main() -> None:
    folder, checkpoint = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    model = tiny_model(visualizer=False)
    two = {"strategy": "ddp", "devices": 2}
    engine(folder / "predict", **two).predict(model, dataloaders=loaders(folder), ckpt_path=checkpoint)
    engine(folder / "test_results", **two).test(
        model, datamodule=data(folder, val_split_mode="none"), ckpt_path=checkpoint
    )
    engine(folder / "refused", **two).predict(model, dataloaders=loaders(folder, "one"), ckpt_path=checkpoint)


if __name__ == "__main__":
    main()
