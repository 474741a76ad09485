"""Large images: the backbone sees one tile at a time, and the model does not notice."""

from pathlib import Path

import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import PredictDataset
from anomalib.data.utils.tiler import Tiler
from anomalib.engine import Engine
from torch import nn

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.torch_model import SimpleNetModel

from .conftest import folder_data, tiny_model

QUIET = {"visualizer": False, "report": False}


def small_backbone() -> nn.Sequential:
    """Stride 4, receptive field 15: position k sees pixels 4 k - 7 to 4 k + 7."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
    )


def make_model(**arguments: object) -> SimpleNetModel:
    torch.manual_seed(0)
    common = {"pretrain_embed_dimension": None, "target_embed_dimension": None, "discriminator_hidden": 8}
    return SimpleNetModel(small_backbone(), layers=["2", "4"], **common, **arguments).eval()


def test_extract_with_overlap_of_the_receptive_field_equals_the_whole_image() -> None:
    model, images = make_model(normalize_brightness=True, top_patches=3), torch.randn(2, 3, 100, 132)
    whole = model(images)
    overlap = 16  # the receptive field, rounded up to a multiple of twice the stride
    for tile in ((48, 32), (100, 64), (100, 132)):
        model.tiler = Tiler(tile, [side - overlap for side in tile])
        tiled = model(images)
        torch.testing.assert_close(tiled.anomaly_map, whole.anomaly_map, rtol=0, atol=1e-5)
        torch.testing.assert_close(tiled.pred_score, whole.pred_score, rtol=0, atol=1e-5)


def test_extract_without_overlap_differs_only_near_borders_of_tiles() -> None:
    model, images = make_model(), torch.randn(1, 3, 96, 96)
    whole = model.extract(images)[1]
    model.tiler = Tiler(48, 48)
    differs = ~torch.isclose(model.extract(images)[1], whole, atol=1e-5).all(dim=1)[0]
    near = (torch.arange(24) - 12).abs() <= 1
    assert torch.equal(differs, near[:, None] | near)


def test_extract_shows_the_backbone_one_tile_at_a_time() -> None:
    model, seen = make_model(), []
    model.feature_extractor.net.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    model.tiler = Tiler(32, 16)
    model(torch.randn(2, 3, 128, 96))
    assert seen == [(2, 3, 32, 32)] * 7 * 5


@pytest.mark.parametrize(
    ("tiler", "message"),
    [
        (Tiler(128, 64), r"Tiles of \[128, 128\] with stride \[64, 64\] .* do not fit images of \[96, 96\]"),
        (Tiler(30, 30), "expected tiles no larger than images, sizes that are multiples of 4"),
        (Tiler(32, 18), "multiples of 4"),
        (Tiler(32, 16, remove_border_count=2), "remove_border_count 2 do not fit"),
    ],
)
def test_extract_refuses_tiles_that_do_not_fit(tiler: Tiler, message: str) -> None:
    model = make_model()
    model.tiler = tiler
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 3, 96, 96))


def train(pictures: Path, **arguments: object) -> tuple[SimpleNet, Path]:
    torch.manual_seed(0)
    model = tiny_model(**QUIET, **arguments)
    callbacks = [TilerConfigurationCallback(enable=True, tile_size=32, stride=32)]
    root = pictures.parent / "results"
    engine = Engine(max_epochs=2, default_root_dir=root, accelerator="cpu", deterministic=True, callbacks=callbacks)
    engine.fit(model, datamodule=folder_data(pictures, val_split_mode="same_as_test"))
    return model, Path(engine.best_model_path)


def predict(model: SimpleNet, pictures: Path, checkpoint: Path | None = None, **arguments: object) -> torch.Tensor:
    engine = Engine(default_root_dir=pictures.parent / "predicted", accelerator="cpu", **arguments)
    batches = engine.predict(model, dataset=PredictDataset(pictures / "test" / "bad"), ckpt_path=checkpoint)
    return torch.stack([batch.anomaly_map for batch in batches])


def test_tiler_of_the_callback_is_kept_by_the_checkpoint(pictures: Path) -> None:
    model, checkpoint = train(pictures, whiten=True)
    tiles = predict(model, pictures)
    assert torch.equal(predict(SimpleNet.load_from_checkpoint(checkpoint), pictures), tiles)
    assert torch.equal(predict(tiny_model(**QUIET), pictures, checkpoint), tiles)
    other = [TilerConfigurationCallback(enable=True, tile_size=64, stride=64)]
    whole = predict(tiny_model(**QUIET), pictures, checkpoint, callbacks=other)
    model.model.tiler = None
    assert torch.equal(predict(model, pictures), whole)
    assert not torch.equal(tiles, whole)


def test_checkpoint_without_tiles_follows_one_with_tiles(pictures: Path) -> None:
    model, tiles = train(pictures)
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "whole", accelerator="cpu")
    engine.fit(tiny_model(**QUIET), datamodule=folder_data(pictures, val_split_mode="same_as_test"))
    whole = Path(engine.best_model_path)
    expected = predict(SimpleNet.load_from_checkpoint(whole), pictures)
    assert torch.equal(predict(SimpleNet.load_from_checkpoint(tiles), pictures, whole), expected)
    assert torch.equal(predict(model, pictures, whole), expected)


def test_feature_cache_with_tiles_gives_the_same_weights(pictures: Path) -> None:
    arguments = {"whiten": "local", "layers": ["layer2", "layer1"], "map_layer": "layer1"}
    (cached, _), (plain, _) = (train(pictures, **arguments, feature_cache=cache) for cache in (True, False))
    for (name, value), same in zip(cached.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, same) or (value.isnan() & same.isnan()).all(), name


def test_fit_refuses_tiles_larger_than_images(pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"Tiles of \[32, 32\] .* do not fit images of \[64, 24\]"):
        train(pictures, image_size=(64, 24))


def test_export_refuses_tiles(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.tiler = Tiler(32, 16)
    for export in (model.to_onnx, model.to_openvino):
        with pytest.raises(ValueError, match=r"exported models take whole images: .* set model.model.tiler to None"):
            export(tmp_path)
