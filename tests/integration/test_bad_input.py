"""Odd pictures, folders and interruptions: each works or ends with a sentence that says what is wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image

from anomalib_simplenet import SimpleNet

from .conftest import folder_data, tiny_model, write_images


def train(pictures: Path, model: SimpleNet | None = None, **data: object) -> dict[str, float]:
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "results", accelerator="cpu")
    return engine.train(model or tiny_model(), datamodule=folder_data(pictures, **data))[0]


def odd(kind: str) -> Image.Image:
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
def test_odd_images_among_others_of_another_size_train_test_and_predict(pictures: Path, kind: str) -> None:
    for part in ("train/good", "test/good", "test/bad"):
        odd(kind).save(pictures / part / "000.png")
    Image.new("L", odd(kind).size, 255).save(pictures / "ground_truth" / "bad" / "000.png")
    model = tiny_model()
    train(pictures, model)
    engine = Engine(default_root_dir=pictures.parent / "predicted", accelerator="cpu")
    (batch,) = engine.predict(model, dataset=PredictDataset(pictures / "test" / "bad" / "000.png"))
    assert torch.isfinite(batch.pred_score).all()
    assert torch.isfinite(batch.anomaly_map).all()


def test_masks_of_another_size_than_the_image_are_refused_or_resized(pictures: Path) -> None:
    for path in (pictures / "ground_truth" / "bad").iterdir():
        with Image.open(path) as mask:
            mask.resize((32, 40)).save(path)
    assert 0 <= train(pictures)["pixel_AUPRO"] <= 1


def test_without_masks_there_are_image_figures_and_pictures(pictures: Path) -> None:
    assert set(train(pictures, masks=False)) == {"image_AUROC", "image_F1Score"}
    assert list((pictures.parent / "results").rglob("images/test/bad/*.png"))


def test_pictures_have_five_panels_where_there_are_masks(pictures: Path) -> None:
    train(pictures)
    for part in ("good", "bad"):
        with Image.open(next((pictures.parent / "results").rglob(f"images/test/{part}/*.png"))) as picture:
            assert picture.size == (5 * 256, 256)


def test_long_images_keep_their_shape_in_pictures(pictures: Path) -> None:
    for path in (pictures / "test" / "good").iterdir():
        odd("wide").resize((900, 300)).save(path)
    train(pictures)
    for part, panel in (("good", (768, 256)), ("bad", (256, 256))):
        with Image.open(next((pictures.parent / "results").rglob(f"images/test/{part}/*.png"))) as picture:
            assert picture.size[1] == panel[1]
            assert picture.size[0] % panel[0] == 0


def test_one_training_image_is_enough_to_run(pictures: Path) -> None:
    shutil.rmtree(pictures / "train")
    write_images(pictures / "train" / "good", 1)
    assert 0 <= train(pictures)["image_AUROC"] <= 1


def test_an_empty_or_missing_training_folder_is_named(pictures: Path) -> None:
    shutil.rmtree(pictures / "train" / "good")
    with pytest.raises(Exception, match="train/good"):
        train(pictures)
    (pictures / "train" / "good").mkdir()
    with pytest.raises(Exception, match=r"train/good|Found 0|no .*images"):
        train(pictures)


@pytest.mark.parametrize("content", [b"", b"no picture at all"])
def test_a_corrupt_image_is_named(pictures: Path, content: bytes) -> None:
    (pictures / "train" / "good" / "001.png").write_bytes(content)
    with pytest.raises(Exception, match=r"001\.png"):
        train(pictures)


def test_a_results_folder_that_cannot_be_written_is_named_before_training(pictures: Path) -> None:
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
