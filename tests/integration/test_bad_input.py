"""Unusual images, folders and interruptions: each works or ends with a sentence that says what is wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageItem, PredictDataset
from anomalib.data.datasets.image.folder import FolderDataset
from anomalib.engine import Engine
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.callbacks.unreadable_images import image_paths

from .conftest import folder_data, tiny_model, write_images


def train(pictures: Path, model: SimpleNet | None = None, **data: object) -> dict[str, float]:
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "results", accelerator="cpu")
    return engine.train(model or tiny_model(), datamodule=folder_data(pictures, **data))[0]


def unusual(kind: str) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (50, 90, 4), dtype=np.uint8)
    return {
        "grey": lambda: Image.fromarray(pixels[..., 0]),
        "rgba": lambda: Image.fromarray(pixels),
        "grey 16 bit": lambda: Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
        "palette": lambda: Image.fromarray(pixels[..., :3]).quantize(16),
        "black and white": lambda: Image.fromarray(pixels[..., 0] > 128),
        "wide": lambda: Image.fromarray(pixels[..., :3]).resize((900, 40)),
    }[kind]()


@pytest.mark.parametrize("kind", ["grey", "rgba", "grey 16 bit", "palette", "black and white", "wide"])
def test_simplenet_trains_tests_and_predicts_odd_images(pictures: Path, kind: str) -> None:
    for part in ("train/good", "test/good", "test/bad"):
        unusual(kind).save(pictures / part / "000.png")
    Image.new("L", unusual(kind).size, 255).save(pictures / "ground_truth" / "bad" / "000.png")
    model = tiny_model()
    train(pictures, model)
    engine = Engine(default_root_dir=pictures.parent / "predicted", accelerator="cpu")
    (batch,) = engine.predict(model, dataset=PredictDataset(pictures / "test" / "bad" / "000.png"))
    assert torch.isfinite(batch.pred_score).all()
    assert torch.isfinite(batch.anomaly_map).all()


def test_simplenet_tests_with_masks_of_another_size_than_the_image(pictures: Path) -> None:
    for path in (pictures / "ground_truth" / "bad").iterdir():
        with Image.open(path) as mask:
            mask.resize((32, 40)).save(path)
    assert {"pixel_AUROC", "pixel_F1Score"} <= train(pictures).keys()
    with (next((pictures.parent / "results").rglob("predictions.csv"))).open() as file:
        assert len(file.readlines()) == 1 + 4  # the other half validates


def test_simplenet_without_masks_gives_image_metrics_and_pictures(pictures: Path) -> None:
    assert set(train(pictures, masks=False)) == {"image_AUROC", "image_F1Score"}
    assert list((pictures.parent / "results").rglob("images/test/bad/*.png"))


def test_pictures_have_five_panels_with_masks(pictures: Path) -> None:
    train(pictures)
    for part in ("good", "bad"):
        with Image.open(next((pictures.parent / "results").rglob(f"images/test/{part}/*.png"))) as picture:
            assert picture.size == (5 * 256, 256)


def test_pictures_keep_the_shape_of_non_square_images(pictures: Path) -> None:
    for path in (pictures / "test" / "good").iterdir():
        unusual("wide").resize((900, 300)).save(path)
    train(pictures)
    for part, panel in (("good", (768, 256)), ("bad", (256, 256))):
        with Image.open(next((pictures.parent / "results").rglob(f"images/test/{part}/*.png"))) as picture:
            assert picture.size[1] == panel[1]
            assert picture.size[0] % panel[0] == 0


def test_simplenet_trains_on_one_image(pictures: Path) -> None:
    shutil.rmtree(pictures / "train")
    write_images(pictures / "train" / "good", 1)
    model = tiny_model()
    train(pictures, model)
    assert model.post_processor.image_threshold.isfinite()


def test_training_names_an_empty_or_missing_folder(pictures: Path) -> None:
    shutil.rmtree(pictures / "train" / "good")
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match="train/good"):
        train(pictures)
    (pictures / "train" / "good").mkdir()
    with pytest.raises((ValueError, RuntimeError), match=r"train/good"):
        train(pictures)


def damage(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    if kind == "chunk":  # for which Pillow raises SyntaxError
        whole = whole.replace(b"IDAT", b"\x00\x01\x02\x03")
    path.write_bytes({"empty": b"", "text": b"no picture at all", "cut off": whole[:-2000], "chunk": whole}[kind])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["empty", "text", "cut off", "chunk"])
def test_unreadable_image_is_named(pictures: Path, kind: str, workers: int) -> None:
    damage(pictures / "train" / "good" / "001.png", kind)
    with pytest.raises(ValueError, match=r"001\.png, or its mask, cannot be read: .*Replace or remove the file"):
        train(pictures, num_workers=workers)


def test_unreadable_image_is_named_in_prediction(pictures: Path) -> None:
    path = pictures / "test" / "bad" / "000.png"
    damage(path, "cut off")
    engine = Engine(default_root_dir=pictures.parent / "predicted", accelerator="cpu")
    with pytest.raises(ValueError, match=r"bad/000\.png, or its mask, cannot be read: OSError"):
        engine.predict(tiny_model(), dataset=PredictDataset(path))


class ArrayDataset(FolderDataset):
    """Reads NumPy files, which Pillow cannot open, by anomalib's table of paths."""

    def __getitem__(self, index: int) -> ImageItem:
        path = self.samples.iloc[index].image_path
        image = torch.from_numpy(np.load(path)).permute(2, 0, 1).float() / 255
        return ImageItem(image=image, gt_label=torch.tensor(0), image_path=path)


class BrokenDataset(FolderDataset):
    """Fails for a reason of its own."""

    def __getitem__(self, index: int) -> ImageItem:
        msg = f"no sensor data for {index}"
        raise OSError(msg)


def arrays(pictures: Path, kind: type[FolderDataset]) -> DataLoader:
    root = pictures / "arrays"
    root.mkdir()
    for path in (pictures / "train" / "good").iterdir():
        with Image.open(path) as image:
            np.save(root / f"{path.stem}.npy", np.asarray(image))
    dataset = kind("arrays", normal_dir=root, extensions=(".npy",))
    return DataLoader(dataset, batch_size=2, collate_fn=dataset.collate_fn)


def test_dataset_that_pillow_cannot_read_trains(pictures: Path) -> None:
    model = tiny_model()
    engine = Engine(max_epochs=2, default_root_dir=pictures.parent / "results", accelerator="cpu")
    engine.fit(model, train_dataloaders=arrays(pictures, ArrayDataset))
    assert engine.trainer.global_step == 6


def test_error_of_a_dataset_is_not_reported_as_an_unreadable_image(pictures: Path) -> None:
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "results", accelerator="cpu")
    with pytest.raises(OSError, match=r"^no sensor data for 0$"):
        engine.fit(tiny_model(), train_dataloaders=arrays(pictures, BrokenDataset))


def test_augmentation_error_is_not_reported_as_an_unreadable_image(pictures: Path) -> None:
    def fail(_image: torch.Tensor, _mask: torch.Tensor) -> None:
        msg = "no such augmentation"
        raise ZeroDivisionError(msg)

    data = folder_data(pictures)
    data.setup()
    data.train_data.augmentations = fail
    loader = DataLoader(data.train_data, batch_size=2, collate_fn=data.train_data.collate_fn)
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "results", accelerator="cpu")
    with pytest.raises(ZeroDivisionError, match=r"^no such augmentation$"):
        engine.fit(tiny_model(), train_dataloaders=loader)


def test_training_opens_no_image_twice(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest: (opened.append(Path(path).stem), original(path, *rest))[1])
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "r", accelerator="cpu", limit_val_batches=0)
    engine.fit(tiny_model(), datamodule=folder_data(pictures))
    assert sorted(opened) == ["000", "000", "001", "002", "003", "004"]  # of the first, the header, for its bits


def test_images_of_16_bits_are_warned_of_once(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in (pictures / "train" / "good").iterdir():
        unusual("grey 16 bit").save(path)
    train(pictures)
    assert caplog.text.count("000.png has more than 8 bits a pixel") == 1


def test_results_folder_that_cannot_be_written_is_named_before_training(pictures: Path) -> None:
    (pictures.parent / "results").write_text("a file in the folder's place")
    with pytest.raises(OSError, match="results"):
        train(pictures)


class Interrupt(Callback):
    """Ctrl-C in the third epoch."""

    def on_train_batch_end(self, trainer: Trainer, *_args: object) -> None:
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


def test_ctrl_c_keeps_the_last_checkpoint_to_go_on_from(pictures: Path) -> None:
    engine = Engine([Interrupt()], max_epochs=9, default_root_dir=pictures.parent / "results", accelerator="cpu")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        engine.fit(tiny_model(), datamodule=folder_data(pictures))
    (checkpoint,) = (pictures.parent / "results").rglob("v0/weights/lightning/*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    again = Engine(max_epochs=4, default_root_dir=pictures.parent / "results", accelerator="cpu")
    again.fit(tiny_model(), datamodule=folder_data(pictures), ckpt_path=checkpoint)
    assert again.trainer.current_epoch == 4
    assert checkpoint.exists()


def test_unreadable_images_takes_data_sets_without_images_or_paths() -> None:
    class Empty(PredictDataset):
        def __init__(self) -> None:
            self.image_filenames: list[Path] = []

    assert image_paths(Empty()) == []
    assert image_paths(object()) == []
