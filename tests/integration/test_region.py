"""Pixels outside the region change nothing, from training to exported models."""

import csv
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem, PredictDataset
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, Evaluator
from anomalib.pipelines.tiled_ensemble.components.utils.ensemble_tiling import EnsembleTiler, TileCollater
from anomalib.pre_processing import PreProcessor
from PIL import Image, ImageFilter
from sklearn.metrics import roc_auc_score

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.components import AnomalyMapGenerator
from anomalib_simplenet.extensions.region import Region

from .conftest import CORE, folder_data, tiny_model, write_images

SIZE = (80, 64)  # of the pictures, so that no resize mixes what is inside with what is outside


def write_region(path: Path, size: tuple[int, int] = SIZE) -> np.ndarray:
    """An oblique shape that cuts through cells of the grid; booleans."""
    row, column = np.mgrid[: size[0], : size[1]] / np.array(size)[:, None, None]
    inside = (row + column < 1.3) & (row > 0.13) & (column > 0.22)
    Image.fromarray((inside * 255).astype(np.uint8)).save(path)
    return inside


def write_pictures(root: Path) -> Path:
    """Folder with train/good, test/good and test/bad, 4 each, and masks of bad."""
    for seed, part in enumerate(("train/good", "test/good", "test/bad")):
        write_images(root / part, 4, seed=seed)
    (root / "ground_truth" / "bad").mkdir(parents=True)
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[20:40] = 255
    for path in (root / "test" / "bad").iterdir():
        Image.fromarray(mask).save(root / "ground_truth" / "bad" / path.name)
    return root


def change_outside(folder: Path, inside: np.ndarray) -> None:
    """Other pixels outside, in images and in ground truth."""
    noise = np.random.default_rng(1)
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image).copy()
        pixels[~inside] = noise.integers(0, 256, pixels[~inside].shape) // (128 if pixels.ndim == 2 else 1) * 255
        Image.fromarray(pixels).save(path)


def train(pictures: Path, region: Path | None, **arguments: object) -> tuple[SimpleNet, Path]:
    torch.manual_seed(0)
    common = {"image_size": SIZE, "region": region, "top_patches": 3, "report": False}
    model = tiny_model(**{**common, **arguments})
    engine = Engine(max_epochs=2, default_root_dir=pictures.parent / "results", accelerator="cpu", deterministic=True)
    engine.fit(model, datamodule=folder_data(pictures, val_split_mode="same_as_test"))
    return model, Path(engine.best_model_path)


def predict(model: SimpleNet, folder: Path, checkpoint: Path | None = None) -> list:
    engine = Engine(default_root_dir=folder.parents[2] / "predicted", accelerator="cpu")
    return engine.predict(model, dataset=PredictDataset(folder), ckpt_path=checkpoint)


def assert_equal_states(model: SimpleNet, other: SimpleNet) -> None:
    for (name, value), same in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, same) or (value.isnan() & same.isnan()).all(), name  # weights, statistics, thresholds


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="paper"),
        pytest.param({"whiten": True, "patch_fraction": 0.5, "averaging": True}, id="whitened"),
        pytest.param(
            {"whiten": "local", "components": 12, "layers": ["layer1", "layer2"], "normalize_brightness": True},
            id="local",
        ),
        pytest.param({"whiten": "local", "layers": ["layer2", "layer1"], "map_layer": "layer1"}, id="map layer"),
        # squeeze-and-excitation sees the whole image
        pytest.param({"backbone": "mobilenetv3_small_050", "layers": ["blocks.3"]}, id="squeeze-and-excitation"),
    ],
)
def test_region_makes_pixels_outside_count_for_nothing(tmp_path: Path, arguments: dict) -> None:
    pictures, inside = write_pictures(tmp_path / "pictures"), write_region(tmp_path / "region.png")
    changed = shutil.copytree(pictures, tmp_path / "others" / "pictures")
    change_outside(changed, inside)
    (model, _), (other, _) = (train(root, tmp_path / "region.png", **arguments) for root in (pictures, changed))
    assert_equal_states(model, other)
    for batch, same in zip(*(predict(model, root / "test" / "bad") for root in (pictures, changed)), strict=True):
        assert not torch.equal(batch.image, same.image)
        assert torch.equal(batch.pred_score, same.pred_score)
        assert torch.equal(batch.pred_label, same.pred_label)
        assert torch.equal(batch.anomaly_map, same.anomaly_map)


@pytest.mark.parametrize(
    ("size", "crop"), [((320, 256), None), ((333, 271), None), ((70, 50), None), ((200, 160), (64, 48))]
)
def test_region_makes_pixels_outside_count_for_nothing_where_images_are_resized(
    tmp_path: Path, size: tuple[int, int], crop: tuple[int, int] | None
) -> None:
    inside = torch.from_numpy(write_region(tmp_path / "region.png", size))
    pre_processor = SimpleNet.configure_pre_processor(SIZE, crop)
    model = tiny_model(pre_processor=pre_processor, region=tmp_path / "region.png", normalize_brightness=True).eval()
    images = torch.rand(2, 3, *size)
    answer, same = (model(each) for each in (images, torch.where(inside, images, 1 - images)))
    assert torch.equal(answer.pred_score, same.pred_score)
    assert torch.equal(answer.anomaly_map, same.anomaly_map)
    worse = model(torch.where(inside, 1 - images, images))
    assert not torch.isclose(answer.pred_score, worse.pred_score).any()


def test_feature_cache_with_a_region_gives_the_same_weights(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    write_region(tmp_path / "region.png")
    models = [train(pictures, tmp_path / "region.png", whiten=True, feature_cache=cache)[0] for cache in (True, False)]
    assert_equal_states(*models)


@pytest.mark.parametrize("arguments", [{"whiten": True}, {"whiten": "local"}, {"patch_fraction": 0.3}, {}])
def test_discriminate_and_score_patches_with_a_region_equal_the_plain_path(tmp_path: Path, arguments: dict) -> None:
    write_region(tmp_path / "region.png")
    layers = ["layer1", "layer2"]
    model = tiny_model(image_size=SIZE, region=tmp_path / "region.png", layers=layers, **arguments).model
    images = torch.rand(4, 3, *SIZE)
    if model.whitening is not None:
        model.whitening.fit(model.whitening.moments([model.embed(images)]))
    scores = []
    for score in (model, lambda images: model.discriminate(model.extract(images))):
        torch.manual_seed(0)
        scores.append(torch.cat(score(images)))
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)
    count = model.region.inside((20, 16)).sum().item()
    assert 0 < count < 20 * 16
    assert len(scores[0]) == 2 * round(4 * count * arguments.get("patch_fraction", 1))

    model.eval()
    embedding = model.embed(images)
    white = embedding if model.whitening is None else model.whitening(embedding)
    plain = -model.discriminator(model.adapter(white.permute(0, 2, 3, 1).flatten(0, 2))).view(4, 20, 16)
    inside = plain[:, model.region.inside((20, 16))]
    torch.testing.assert_close(model(images).pred_score, inside.amax(dim=1), rtol=1e-4, atol=1e-5)


def test_brightness_is_that_of_the_regions_pixels(tmp_path: Path) -> None:
    inside = torch.from_numpy(write_region(tmp_path / "region.png"))
    model = tiny_model(image_size=SIZE, region=tmp_path / "region.png", normalize_brightness=True).eval()
    images = torch.rand(2, 3, *SIZE)
    seen = []
    model.model.feature_extractor.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model.post_processor = None
    model(torch.where(inside, images * 0.5, images))
    model(images)
    torch.testing.assert_close(*seen)  # half the light inside


@pytest.mark.parametrize("whiten", [True, "local"])
def test_whitening_statistics_are_those_of_the_patches_inside(tmp_path: Path, whiten: bool | str) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    write_region(tmp_path / "region.png")
    model, _ = train(pictures, tmp_path / "region.png", whiten=whiten)
    images = torch.stack([item.image for item in PredictDataset(pictures / "train" / "good")])
    embedding, inside = model.model.embed(model.pre_processor.transform(images)), model.model.region.inside((20, 16))
    expected = embedding.mean(dim=0) if whiten == "local" else embedding[:, :, inside].mean(dim=(0, 2))[:, None, None]
    if whiten == "local":  # those outside have the mean
        expected[:, ~inside] = expected[:, inside].mean(dim=1, keepdim=True)
    torch.testing.assert_close(model.model.whitening.mean, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[SimpleNet, Path, Path, np.ndarray]:
    """Model, its checkpoint, a folder of images, and the region, whose file is gone."""
    root = tmp_path_factory.mktemp("region")
    pictures, inside = write_pictures(root / "pictures"), write_region(root / "region.png")
    model, checkpoint = train(pictures, root / "region.png", whiten=True, normalize_brightness=True)
    (root / "region.png").unlink()
    return model.eval(), checkpoint, pictures, inside


def test_checkpoint_holds_the_region(trained: tuple) -> None:
    model, checkpoint, pictures, inside = trained
    loaded = SimpleNet.load_from_checkpoint(checkpoint)
    assert np.array_equal(loaded.model.region.mask[0, 0].numpy() > 0, inside)
    expected = predict(model, pictures / "test" / "bad")
    for again in (
        predict(loaded, pictures / "test" / "bad"),
        predict(tiny_model(), pictures / "test" / "bad", checkpoint),
    ):
        for batch, same in zip(expected, again, strict=True):
            assert torch.equal(batch.pred_score, same.pred_score)
            assert torch.equal(batch.anomaly_map, same.anomaly_map)


def test_predictions_mark_no_pixel_outside_at_any_sensitivity(trained: tuple) -> None:
    _, checkpoint, pictures, inside = trained
    model = SimpleNet.load_from_checkpoint(checkpoint)
    model.post_processor.pixel_sensitivity = 1.0
    for batch in predict(model, pictures / "test" / "bad"):
        assert (batch.anomaly_map[:, ~inside] == 0).all()
        assert not batch.pred_mask[:, ~inside].any()
        assert batch.pred_mask[:, inside].any()


def test_ground_truth_outside_does_not_count(trained: tuple, tmp_path: Path) -> None:
    _, checkpoint, pictures, inside = trained
    changed = shutil.copytree(pictures, tmp_path / "pictures")
    change_outside(changed, inside)
    model = SimpleNet.load_from_checkpoint(checkpoint, visualizer=False)
    engine = Engine(default_root_dir=tmp_path / "results", accelerator="cpu")
    metrics = [engine.test(model, datamodule=folder_data(root)) for root in (pictures, changed)]
    assert metrics[0] == metrics[1]
    assert "pixel_AUROC" in metrics[0][0]


def test_pixel_metrics_are_of_the_pixels_inside(trained: tuple, tmp_path: Path) -> None:
    _, checkpoint, pictures, inside = trained
    model = SimpleNet.load_from_checkpoint(checkpoint, visualizer=False)
    data = folder_data(pictures)
    (metrics,) = Engine(default_root_dir=tmp_path, accelerator="cpu").test(model, datamodule=data)
    batches = Engine(default_root_dir=tmp_path, accelerator="cpu").predict(model, dataloaders=data.test_dataloader())
    maps = torch.cat([batch.anomaly_map for batch in batches])[:, inside]
    truth = torch.cat([batch.gt_mask for batch in batches])[:, inside]
    assert metrics["pixel_AUROC"] == pytest.approx(roc_auc_score(truth.flatten(), maps.flatten()), abs=1e-5)


def test_images_whose_defects_are_outside_are_normal(trained: tuple, tmp_path: Path) -> None:
    _, checkpoint, pictures, inside = trained
    changed = shutil.copytree(pictures, tmp_path / "pictures")
    Image.fromarray((~inside * 255).astype(np.uint8)).save(changed / "ground_truth" / "bad" / "000.png")
    model = SimpleNet.load_from_checkpoint(checkpoint, visualizer=False, report=True)
    data = folder_data(changed, val_split_mode="same_as_test")
    Engine(default_root_dir=tmp_path / "results", accelerator="cpu").test(model, datamodule=data)
    (table,) = (tmp_path / "results").rglob("latest/predictions.csv")
    with table.open() as file:
        labels = {row["image_path"][-11:]: row["gt_label"] for row in csv.DictReader(file)}
    assert (labels["bad/000.png"], labels["bad/001.png"], labels["ood/000.png"]) == ("0", "1", "0")


def test_fit_refuses_aupro_with_a_region(trained: tuple, tmp_path: Path) -> None:
    write_region(tmp_path / "region.png")
    evaluator = Evaluator(test_metrics=[AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_")])
    with pytest.raises(ValueError, match="AUPRO, which the evaluator has, cannot leave out pixels outside region"):
        train(trained[2], tmp_path / "region.png", evaluator=evaluator)


def test_checkpoint_without_region_follows_one_with_a_region(trained: tuple, tmp_path: Path) -> None:
    pictures = shutil.copytree(trained[2], tmp_path / "pictures")
    _, plain = train(pictures, None)
    model = SimpleNet.load_from_checkpoint(trained[1])
    for batch, same in zip(
        predict(model, pictures / "test" / "bad", plain),
        predict(SimpleNet.load_from_checkpoint(plain), pictures / "test" / "bad"),
        strict=True,
    ):
        assert torch.equal(batch.pred_score, same.pred_score)


def test_export_refuses_another_region_than_the_checkpoints(trained: tuple, tmp_path: Path) -> None:
    Image.new("L", (64, 80), 255).save(tmp_path / "all.png")
    model = tiny_model(image_size=SIZE, region=tmp_path / "all.png")
    with pytest.raises(ValueError, match="The checkpoint was trained with another region"):
        Engine(default_root_dir=tmp_path).export(model, "onnx", ckpt_path=trained[1])


def test_predict_with_a_region_takes_other_data_sets_of_images(trained: tuple) -> None:
    class Own(torch.utils.data.Dataset):
        samples: ClassVar = [("a.png", 0)]

        def __len__(self) -> int:
            return 1

        def __getitem__(self, _index: int) -> ImageItem:
            return ImageItem(image=torch.rand(3, *SIZE))

    loader = torch.utils.data.DataLoader(Own(), collate_fn=ImageBatch.collate)
    model = SimpleNet.load_from_checkpoint(trained[1])
    assert len(Engine(default_root_dir=trained[2].parent / "own", accelerator="cpu").predict(model, loader)) == 1


def test_thresholds_are_of_the_pixels_inside(trained: tuple) -> None:
    model, _, pictures, inside = trained
    images = [item.image for part in ("good", "bad") for item in PredictDataset(pictures / "test" / part)]
    maps = model.model(model.pre_processor.transform(torch.stack(images))).anomaly_map[:, 0, inside]
    torch.testing.assert_close(model.post_processor.pixel_min, maps.min(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.post_processor.pixel_max, maps.max(), rtol=1e-5, atol=1e-6)


def test_exports_hold_the_region(trained: tuple, tmp_path: Path) -> None:
    _, checkpoint, _, inside = trained
    model = SimpleNet.load_from_checkpoint(checkpoint).eval()
    # Twice as large as the model's input: the resize mixes pixels near the rim.
    near = Image.fromarray(inside).convert("L").resize((SIZE[1] * 2, SIZE[0] * 2)).filter(ImageFilter.MaxFilter(9))
    images = torch.rand(2, 3, SIZE[0] * 2, SIZE[1] * 2)
    changed = torch.where(torch.from_numpy(np.asarray(near) > 0), images, torch.rand_like(images))
    expected = model(images)
    for path in (model.to_openvino(tmp_path), model.to_onnx(tmp_path)):
        compiled = CORE.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        answer, same = (
            {key.get_any_name(): value.copy() for key, value in compiled(pixels.numpy()).items()}
            for pixels in (images, changed)
        )
        for field in ("pred_score", "anomaly_map", "pred_mask", "pred_label"):
            np.testing.assert_array_equal(answer[field], same[field])
            value = getattr(expected, field).detach()
            np.testing.assert_allclose(answer[field].astype(float), value.double(), rtol=1e-4, atol=1e-5)


def test_pixels_outside_that_are_not_finite_count_for_nothing(tmp_path: Path) -> None:
    inside = torch.from_numpy(write_region(tmp_path / "region.png"))
    model = tiny_model(image_size=SIZE, region=tmp_path / "region.png", normalize_brightness=True).model.eval()
    images = torch.rand(2, 3, *SIZE)
    answer, same = (model(each) for each in (images, images.masked_fill(~inside, torch.nan)))
    assert torch.equal(answer.pred_score, same.pred_score)
    assert torch.equal(answer.anomaly_map, same.anomaly_map)
    assert model(images.masked_fill(inside, torch.nan)).pred_score.isposinf().all()


def test_fit_refuses_tiles_of_the_ensemble_with_a_region(trained: tuple, tmp_path: Path) -> None:
    write_region(tmp_path / "region.png")
    data = folder_data(trained[2])
    tiler = EnsembleTiler(tile_size=[40, 32], stride=[40, 32], image_size=list(SIZE))
    data.external_collate_fn = TileCollater(tiler, (0, 0), default_collate_fn=ImageBatch.collate)
    engine = Engine(max_epochs=1, default_root_dir=tmp_path / "results", accelerator="cpu")
    with pytest.raises(ValueError, match="tiled_ensemble trains on tiles, but region is of whole images"):
        engine.fit(tiny_model(image_size=SIZE, region=tmp_path / "region.png"), datamodule=data)


def test_summarise_neither_raises_nor_lowers_the_rim() -> None:
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 13:50, 20:21] = mask[..., 33:37, 20:90] = 1  # thinner than a patch
    region, generator = Region(mask, torch.tensor(1.5)), AnomalyMapGenerator()
    scores = torch.full((2, 1, 8, 12), 1e6).masked_fill(region.inside((8, 12)), -3.0)
    score, anomaly_map = region.summarise([scores], 1000, generator)
    torch.testing.assert_close(score, torch.tensor([-3.0, -3.0]))
    torch.testing.assert_close(anomaly_map, torch.where(mask > 0, -3.0, -torch.inf).expand(2, 1, -1, -1))
    finer = torch.full((2, 1, 16, 24), 1e6).masked_fill(region.inside((16, 24)), 5.0)
    score, anomaly_map = region.summarise([scores, finer], 1000, generator)
    torch.testing.assert_close(score, torch.tensor([-3.0, -3.0]))
    torch.testing.assert_close(anomaly_map, torch.where(mask > 0, 2.0, -torch.inf).expand(2, 1, -1, -1))


def test_summarise_of_a_region_of_all_pixels_is_the_plain_map() -> None:
    region, generator = Region(torch.ones(1, 1, 64, 96), torch.tensor(1.5)), AnomalyMapGenerator()
    scores = torch.randn(2, 1, 8, 12)
    score, anomaly_map = region.summarise([scores], 3, generator)
    torch.testing.assert_close(score, scores.flatten(1).topk(3).values.mean(dim=1))
    torch.testing.assert_close(anomaly_map, generator(scores, (64, 96)))


def test_read_follows_resize_and_crop(tmp_path: Path) -> None:
    pixels = np.zeros((100, 200), dtype=np.uint8)
    pixels[:, 100:] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    region = Region.read(tmp_path / "half.png", SimpleNet.configure_pre_processor((50, 80), (40, 60)))
    expected = torch.zeros(1, 1, 40, 60)
    expected[..., 31:] = 1  # pixels at the rim are resized with black ones
    assert torch.equal(region.mask, expected)
    assert region.aspect_ratio == 2


@pytest.mark.parametrize(
    ("region", "arguments", "message"),
    [
        ("missing.png", {}, "missing.png', expected an image, white where pixels count: .*No such file"),
        ("deep.png", {}, "deep.png', which has more than 8 bits a pixel"),
        ("text.png", {}, "text.png', expected an image, white where pixels count: cannot identify"),
        ("black.png", {}, "black.png', which has no white pixel"),
        ("rim.png", {"pre_processor": SimpleNet.configure_pre_processor((80, 64), (32, 32))}, "rim.png', which has no"),
        ("region.png", {"pre_processor": torch.nn.Identity()}, "region.png', which needs a pre_processor of anomalib"),
    ],
)
def test_model_refuses_regions_by_name(tmp_path: Path, region: str, arguments: dict, message: str) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.full(SIZE, 300, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (64, 80), 127).save(tmp_path / "black.png")
    rim = np.zeros(SIZE, dtype=np.uint8)
    rim[:5] = 255
    Image.fromarray(rim).save(tmp_path / "rim.png")
    write_region(tmp_path / "region.png")
    with pytest.raises(ValueError, match=message):
        tiny_model(region=tmp_path / region, **arguments)


def test_fit_refuses_images_of_another_aspect_ratio_than_the_region(pictures: Path, tmp_path: Path) -> None:
    write_region(tmp_path / "wide.png", (40, 64))
    with pytest.raises(ValueError, match=r"000.png is 64 x 80, but region .*wide.png 1.6 times as wide as high"):
        train(pictures, tmp_path / "wide.png")


def test_predict_refuses_images_of_another_aspect_ratio_than_the_checkpoints_region(
    trained: tuple, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures" / "test" / "wide"
    folder.mkdir(parents=True)
    Image.new("RGB", (128, 80)).save(folder / "0.png")
    with pytest.raises(ValueError, match=r"0.png is 128 x 80, but region \(of the checkpoint\) 0.8 times"):
        predict(SimpleNet.load_from_checkpoint(trained[1]), folder)


def test_model_refuses_images_of_another_size_than_the_region(tmp_path: Path) -> None:
    write_region(tmp_path / "region.png")
    model = tiny_model(region=tmp_path / "region.png", pre_processor=PreProcessor()).eval()
    with pytest.raises(ValueError, match="Images are 160 x 128, but region for 80 x 64"):
        model(torch.rand(1, 3, 160, 128))


@pytest.mark.parametrize("trained_with", ["another", "no"])
def test_checkpoint_of_another_region_is_refused(trained: tuple, tmp_path: Path, trained_with: str) -> None:
    Image.new("L", (64, 80), 255).save(tmp_path / "all.png")
    checkpoint = trained[1] if trained_with == "another" else train(trained[2], None)[1]
    model = tiny_model(image_size=SIZE, region=tmp_path / "all.png")
    with pytest.raises(ValueError, match=f"The checkpoint was trained with {trained_with} region: leave region out"):
        predict(model, trained[2] / "test" / "bad", checkpoint)


def test_checkpoint_of_the_same_region_takes_it_at_its_own_image_size(trained: tuple, tmp_path: Path) -> None:
    write_region(tmp_path / "region.png")
    model = tiny_model(image_size=(64, 64), region=tmp_path / "region.png")
    assert predict(model, trained[2] / "test" / "bad", trained[1])


def test_pictures_and_report_show_the_region(trained: tuple, tmp_path: Path) -> None:
    _, checkpoint, pictures, inside = trained
    pictures = shutil.copytree(pictures, tmp_path / "pictures")
    Image.new("RGB", (64, 80), (200, 200, 200)).save(pictures / "test" / "bad" / "000.png")
    engine = Engine(default_root_dir=tmp_path / "results", accelerator="cpu")
    data = folder_data(pictures, val_split_mode="same_as_test")
    engine.test(SimpleNet.load_from_checkpoint(checkpoint, report=True), datamodule=data)
    (page,) = tmp_path.rglob("latest/report.html")
    assert f"<th>Region</th><td>{inside.mean():.1%} of the pixels count; the others are dimmed" in page.read_text()
    (picture,) = (path for path in (page.parent / "images").rglob("000.png") if path.parent.name == "bad")
    with Image.open(picture) as image:
        field = np.asarray(image)[:, :256]  # the first of five
    shown = np.asarray(Image.fromarray(inside).resize((256, 256)))
    below = np.arange(256) > 60  # the title
    assert (field[below][shown[below]] == 200).all()
    assert (field[below][~shown[below]] == 70).all()
