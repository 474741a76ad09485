"""Image and pixel thresholds: where they come from, and what anomalib's sensitivity does to them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor

from anomalib_simplenet import SimpleNet

from .conftest import CORE, folder_data, tiny_model


@pytest.fixture
def checkpoint(pictures: Path) -> Path:
    torch.manual_seed(0)
    engine = Engine(max_epochs=2, default_root_dir=pictures.parent / "results", accelerator="cpu")
    engine.fit(tiny_model(visualizer=False), datamodule=folder_data(pictures, val_split_mode="same_as_test"))
    return Path(engine.trainer.checkpoint_callback.best_model_path)


def with_sensitivity(checkpoint: Path, **sensitivity: float) -> SimpleNet:
    processor = PostProcessor(**sensitivity)
    return SimpleNet.load_from_checkpoint(checkpoint, post_processor=processor, visualizer=False).eval()


def test_checkpoint_has_separate_image_and_pixel_thresholds(checkpoint: Path) -> None:
    processor = SimpleNet.load_from_checkpoint(checkpoint).post_processor
    assert torch.isfinite(processor.image_threshold)
    assert torch.isfinite(processor.pixel_threshold)
    assert processor.image_threshold != processor.pixel_threshold


@pytest.mark.parametrize("map_layer", [None, "layer1"])
def test_without_masks_as_many_normal_images_are_marked_as_labelled(pictures: Path, map_layer: str | None) -> None:
    torch.manual_seed(0)
    model = tiny_model(visualizer=False, whiten=True, layers=["layer2", "layer1"], map_layer=map_layer)
    engine = Engine(max_epochs=2, default_root_dir=pictures.parent / "results", accelerator="cpu")
    data = folder_data(pictures, val_split_mode="same_as_test", mask_dir=None)
    engine.fit(model, datamodule=data)
    predictions = engine.predict(model, dataloaders=data.val_dataloader())
    normal = ~torch.cat([batch.gt_label for batch in predictions]).bool()
    labels = torch.cat([batch.pred_label for batch in predictions])[normal]
    masks = torch.cat([batch.pred_mask for batch in predictions])[normal]
    assert masks.flatten(1).any(dim=1).sum() == labels.sum()
    assert masks.float().mean() < 0.5


def test_sensitivity_moves_its_threshold_in_model_and_export(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    data = folder_data(pictures, val_split_mode="same_as_test")
    data.setup()
    images = torch.stack([item.image for item in data.test_data])
    found: dict[str, list[int]] = {"pred_label": [], "pred_mask": []}
    for image, pixel in ((0.1, 0.9), (0.9, 0.1)):
        model = with_sensitivity(checkpoint, image_sensitivity=image, pixel_sensitivity=pixel)
        exported = CORE.compile_model(model.to_openvino(tmp_path / str(image)), "CPU")
        answer = exported(images.numpy())
        with torch.no_grad():
            plain = model(images)
        threshold = {"image": 1 - image, "pixel": 1 - pixel}
        for field, score, limit in (("pred_label", "pred_score", "image"), ("pred_mask", "anomaly_map", "pixel")):
            # anomalib's threshold is the score of one of these images, where rounding decides
            decided = (getattr(plain, score) - threshold[limit]).abs().numpy() > 1e-6
            assert decided.mean() > 0.8
            assert (np.asarray(answer[field]) != getattr(plain, field).numpy())[decided].mean() < 0.01
            found[field].append(answer[field].sum())
        np.testing.assert_array_equal(answer["pred_label"], answer["pred_score"] > threshold["image"])
        np.testing.assert_array_equal(answer["pred_mask"], answer["anomaly_map"] > threshold["pixel"])
    assert found["pred_label"][0] < found["pred_label"][1]
    assert found["pred_mask"][0] > found["pred_mask"][1]


def test_sensitivity_defaults_to_that_of_training(checkpoint: Path) -> None:
    model = SimpleNet.load_from_checkpoint(checkpoint, post_processor=PostProcessor(image_sensitivity=0.7))
    assert model.post_processor.image_sensitivity == 0.7
    assert model.post_processor.pixel_sensitivity == 0.5


def test_sensitivity_taken_from_the_checkpoint_is_logged(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = pictures.parent / "results"
    engine = Engine(max_epochs=1, default_root_dir=results, accelerator="cpu")
    model = tiny_model(visualizer=False, post_processor=PostProcessor(image_sensitivity=0.7))
    engine.fit(model, datamodule=folder_data(pictures, val_split_mode="same_as_test"))
    path = engine.trainer.checkpoint_callback.best_model_path
    for requested, used in ((0.5, 0.7), (0.501, 0.501), (0.2, 0.2)):
        caplog.clear()
        model = SimpleNet.load_from_checkpoint(path, post_processor=PostProcessor(image_sensitivity=requested))
        assert model.post_processor.image_sensitivity == used
        logged = [record.getMessage() for record in caplog.records if "sensitivity" in record.getMessage()]
        assert [text[:48] for text in logged] == ["Using image_sensitivity=0.7 from the checkpoint."] * (
            requested == 0.5
        )


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"test_split_mode": "synthetic", "val_split_mode": "same_as_test"}, id="synthetic anomalies"),
        pytest.param({"test_split_mode": "from_dir", "val_split_mode": "same_as_test"}, id="normal images alone"),
    ],
)
def test_thresholds_without_defective_images_let_normal_ones_pass(pictures: Path, settings: dict) -> None:
    torch.manual_seed(0)
    engine = Engine(max_epochs=2, default_root_dir=pictures.parent / "results", accelerator="cpu")
    model = tiny_model(visualizer=False)
    engine.fit(model, datamodule=folder_data(pictures, masks=False, abnormal_dir=None, **settings))
    assert torch.isfinite(model.post_processor.image_threshold)
    assert torch.isfinite(model.post_processor.pixel_threshold)
    if settings["test_split_mode"] == "from_dir":  # the highest score of a normal image
        predictions = engine.predict(model, data_path=pictures / "test" / "good")
        assert sum(batch.pred_label.sum() for batch in predictions) == 0
