"""A rate of false alarms: kept by checkpoint, commands and exports alike, or refused before work is lost."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from PIL import Image

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.callbacks.hold_out import HoldOut

from .conftest import CORE, folder_data, tiny_model

RATE, OTHER = 0.1, 0.3
PARTS = {"train/good": 20, "test/good": 40, "test/bad": 10, "new": 24}


def engine(folder: Path, **arguments: object) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False, **arguments)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of various contrast, and so of various scores."""
    folder, noise = tmp_path_factory.mktemp("alarms"), np.random.default_rng(0)
    for part, count in PARTS.items():
        (folder / part).mkdir(parents=True)
        for index in range(count):
            contrast = noise.integers(5, 120)
            pixels = noise.integers(128 - contrast, 128 + contrast, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{index:03}.png")
    return folder


def data_of(root: Path, **arguments: object) -> Folder:
    return folder_data(root, masks=False, **{"val_split_mode": "same_as_test", **arguments})


def fit(root: Path, rate: float | None, data: Folder, ckpt_path: object = None, **trainer: object) -> Engine:
    torch.manual_seed(0)
    trained = engine(root / "results", **{"max_epochs": 1, **trainer})
    trained.fit(tiny_model(visualizer=False, false_alarm_rate=rate), datamodule=data, ckpt_path=ckpt_path)
    return trained


def checkpoint_of(trained: Engine) -> Path:
    return Path(trained.trainer.checkpoint_callback.best_model_path)


@pytest.fixture(scope="module")
def checkpoint(root: Path) -> Path:
    return checkpoint_of(fit(root, RATE, data_of(root)))


@pytest.fixture(scope="module")
def images(root: Path) -> torch.Tensor:
    pictures = [np.asarray(Image.open(path)) for path in sorted((root / "new").iterdir())]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255


def loaded(checkpoint: Path, **arguments: object) -> SimpleNet:
    return SimpleNet.load_from_checkpoint(checkpoint, visualizer=False, **arguments).eval()


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> SimpleNet:
    return loaded(checkpoint)


def rows_of(trained: Engine) -> list[dict[str, str]]:
    with (Path(trained.trainer.default_root_dir) / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_checkpoint_keeps_rate_and_scores_of_normal_images(
    model: SimpleNet, checkpoint: Path, root: Path, images: torch.Tensor
) -> None:
    kept = torch.load(checkpoint, weights_only=True)["anomalib_post_processor_config"]
    assert kept["false_alarm_rate"] == RATE
    normal = engine(root / "results").predict(model, data_path=root / "test" / "good")
    # The fourth highest of 40 is the threshold; in batches of another size it may round to either side.
    assert sum(int(batch.pred_label.sum()) for batch in normal) in {3, 4}
    assert kept["calibration_scores"].shape == kept["calibration_peaks"].shape == (40,)
    marked = torch.cat([batch.pred_mask.flatten(1).any(dim=1) for batch in normal])
    assert marked.sum().item() in {3, 4}
    plain = model(images)
    assert 0 < plain.pred_label.sum() < len(images)
    assert torch.equal(plain.pred_label, plain.p_value <= RATE)


def test_prediction_writes_p_values(
    model: SimpleNet, checkpoint: Path, root: Path, images: torch.Tensor, tmp_path: Path
) -> None:
    predicting, expected = engine(tmp_path), model(images)
    batches = predicting.predict(tiny_model(visualizer=False), data_path=root / "new", ckpt_path=checkpoint)
    rows = rows_of(predicting)
    assert [float(row["p_value"]) for row in rows] == pytest.approx(expected.p_value.tolist())
    assert torch.cat([batch.p_value for batch in batches]).tolist() == pytest.approx(expected.p_value.tolist())
    assert [bool(int(row["pred_label"])) for row in rows] == expected.pred_label.tolist()


@pytest.mark.parametrize(("sensitivity", "changes"), [(0.5, 0), (0.7, 1), (0.3, -1)])
def test_sensitivity_acts_on_top_of_the_rate(
    checkpoint: Path, images: torch.Tensor, sensitivity: float, changes: int
) -> None:
    model = loaded(checkpoint, post_processor=PostProcessor(image_sensitivity=sensitivity))
    answer = model(images)
    assert np.sign(int(answer.pred_label.sum()) - int((answer.p_value <= RATE).sum())) == changes
    assert torch.equal(answer.pred_label, answer.pred_score > 1 - sensitivity)


def test_rate_requested_of_a_checkpoint_replaces_its_own(
    checkpoint: Path, root: Path, images: torch.Tensor, tmp_path: Path
) -> None:
    """Of the commands test, predict and export, and in Python."""
    expected = loaded(checkpoint, false_alarm_rate=OTHER)(images)
    assert torch.equal(expected.pred_label, expected.p_value <= OTHER)
    assert expected.pred_label.sum() > loaded(checkpoint)(images).pred_label.sum()
    common = ["--model", "SimpleNet", "--model.backbone", "resnet18", "--model.layers", '["layer1"]']
    common += ["--model.pre_trained", "false", "--model.false_alarm_rate", str(OTHER), "--ckpt_path", str(checkpoint)]
    quiet = [
        "--default_root_dir",
        str(tmp_path),
        "--model.visualizer",
        "false",
        "--trainer.enable_progress_bar",
        "false",
    ]
    settings = {"name": "pictures", "root": str(root), "num_workers": 0, "val_split_mode": "same_as_test"}
    settings |= {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/bad"}
    data = json.dumps({"class_path": "anomalib.data.Folder", "init_args": settings})
    for command, source in (("test", data), ("predict", str(root / "new"))):
        rows = rows_of(AnomalibCLI([command, *common, *quiet, "--data", source]).engine)
        assert rows
        assert [row["pred_label"] for row in rows] == [str(int(float(row["p_value"]) <= OTHER)) for row in rows]
    export = ["--export_type", "torch", "--export_root", str(tmp_path)]
    AnomalibCLI(["export", *common, *quiet[:-2], *export])
    exported = torch.load(tmp_path / "weights" / "torch" / "model.pt", weights_only=False)["model"].eval()
    assert torch.equal(exported(images).pred_label, expected.pred_label)


def test_export_of_a_checkpoint_takes_what_inference_was_requested_with(checkpoint: Path) -> None:
    given = {"top_patches": 2, "false_alarm_rate": OTHER, "post_processor": PostProcessor(image_sensitivity=0.7)}
    model = tiny_model(visualizer=False, **given).as_requested(checkpoint)
    assert model.model.top_patches == 2
    assert model.post_processor.false_alarm_rate == OTHER
    assert model.post_processor.image_sensitivity == 0.7
    assert len(model.post_processor.calibration_scores) == PARTS["test/good"]
    assert tiny_model(visualizer=False).as_requested(checkpoint).model.top_patches == 1


def test_export_of_a_checkpoint_leaves_the_model_as_it_is(checkpoint: Path, root: Path, tmp_path: Path) -> None:
    other = checkpoint_of(fit(root, None, data_of(root), max_epochs=2))
    model = loaded(checkpoint)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = model.post_processor.checkpoint_config()
    engine(tmp_path).export(model, "torch", export_root=tmp_path, ckpt_path=other)
    assert [
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value.nan_to_num(), before[name].nan_to_num())
    ] == []
    assert str(model.post_processor.checkpoint_config()) == str(settings)


@pytest.fixture(scope="module")
def others(root: Path) -> list[Path]:
    """Checkpoints with other settings: all, and none."""
    found = []
    for arguments in (
        {"false_alarm_rate": OTHER, "top_patches": 3, "post_processor": PostProcessor(image_sensitivity=0.7)},
        {},
    ):
        torch.manual_seed(1)
        trained = engine(root / "others", max_epochs=1)
        trained.fit(tiny_model(visualizer=False, **arguments), datamodule=data_of(root))
        found.append(checkpoint_of(trained))
    return found


def predicted(root: Path, tmp_path: Path, model: SimpleNet, checkpoint: Path | None) -> list[list]:
    batches = engine(tmp_path).predict(model, data_path=root / "new", ckpt_path=checkpoint)
    names = ("pred_score", "pred_label", "p_value")
    return [getattr(batch, name).tolist() for batch in batches for name in names]


@pytest.mark.parametrize("built", ["from Python", "from the first checkpoint"])
def test_checkpoints_one_after_another_bring_their_own_settings(
    root: Path, tmp_path: Path, checkpoint: Path, others: list[Path], built: str
) -> None:
    model = tiny_model(visualizer=False) if built == "from Python" else loaded(others[0])
    for path in (*others, checkpoint):
        expected = predicted(root, tmp_path, loaded(path), None)
        assert predicted(root, tmp_path, model, path) == expected
        exported = model.as_requested(path)
        assert str(exported.post_processor.checkpoint_config()) == str(loaded(path).post_processor.checkpoint_config())
        assert exported.model.top_patches == loaded(path).model.top_patches

    asked = tiny_model(visualizer=False, false_alarm_rate=0.2, top_patches=2)
    for path in (*others, checkpoint):
        predicted(root, tmp_path, asked, path)
        assert asked.post_processor.false_alarm_rate == 0.2
        assert asked.model.top_patches == 2


@pytest.fixture(scope="module")
def exports(model: SimpleNet, root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of all kinds, from one graph, since tracing takes most of the time."""
    folder, to_onnx = tmp_path_factory.mktemp("exports"), model.to_onnx
    paths = {"torch": model.to_torch(folder)}

    def to_onnx_once(_folder: str, *arguments: object) -> Path:
        if "onnx" not in paths:
            paths["onnx"] = to_onnx(folder, *arguments)
        return paths["onnx"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "to_onnx", to_onnx_once)
        for kind in (None, CompressionType.FP16, CompressionType.INT8_PTQ):
            name = kind.name if kind else "openvino"
            paths[name] = model.to_openvino(folder / name, compression_type=kind, datamodule=data_of(root))
    return paths


@pytest.mark.parametrize("kind", ["torch", "onnx", "openvino", "FP16", "INT8_PTQ"])
def test_export_gives_label_and_p_value_of_the_checkpoint(
    model: SimpleNet, exports: dict[str, Path], images: torch.Tensor, kind: str
) -> None:
    with torch.no_grad():
        expected = model(images)
    if kind == "torch":
        exported = torch.load(exports[kind], weights_only=False)["model"].eval()
        answer = {name: value.detach().numpy() for name, value in exported(images)._asdict().items()}
    else:
        compiled = CORE.compile_model(exports[kind], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        answer = {output.get_any_name(): value for output, value in compiled(images.numpy()).items()}
    np.testing.assert_array_equal(answer["pred_label"].flatten(), answer["p_value"] <= np.float32(RATE))
    if kind in {"torch", "onnx", "openvino"}:
        np.testing.assert_allclose(answer["p_value"], expected.p_value, rtol=1e-6)
        np.testing.assert_array_equal(answer["pred_label"].flatten(), expected.pred_label)
        return
    # Weights are rounded, which moves scores; table and thresholds are not: p-values are those of the moved scores.
    processor, table = model.post_processor, model.post_processor.calibration_scores.numpy()
    constants = [node for node in ov.Core().read_model(exports[kind]).get_ops() if node.get_type_name() == "Constant"]
    assert any(np.array_equal(node.data.flatten(), table) for node in constants if node.data.size == len(table))
    assert ov.Type.f16 in {node.get_element_type() for node in constants}
    assert ov.Type.f16 not in {node.get_element_type() for node in constants if node.data.size == 1}
    extent = processor.image_max - processor.image_min
    score = torch.from_numpy(answer["pred_score"]).flatten()
    raw = (score - 0.5) * extent + processor.image_threshold
    most, least = (processor.p_value(raw + step * extent).numpy() for step in (-1e-5, 1e-5))
    inside = ((score > 0) & (score < 1)).numpy()
    assert inside.mean() > 0.5
    assert (least - 1e-6 <= answer["p_value"])[inside].all()
    assert (answer["p_value"] <= most + 1e-6)[inside].all()
    assert (score - expected.pred_score).abs().max() < (0.01 if kind == "FP16" else 0.1)


def test_inferencers_of_anomalib_give_the_p_value(
    model: SimpleNet, exports: dict[str, Path], root: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    expected, path = model(images[:1]).p_value.item(), root / "new" / "000.png"
    for inferencer in (OpenVINOInferencer(exports["openvino"], device="CPU"), TorchInferencer(exports["torch"])):
        assert np.asarray(inferencer.predict(path).p_value).item() == pytest.approx(expected)


def test_rate_too_low_for_the_validation_images_is_refused(
    checkpoint: Path, root: Path, images: torch.Tensor, tmp_path: Path
) -> None:
    needed = "false_alarm_rate is 0.01, which needs 99 normal validation images, and there are 40"
    model = loaded(checkpoint, false_alarm_rate=0.01)
    for use in (model.to_torch, model.to_onnx, model.to_openvino):
        with pytest.raises(ValueError, match=needed):
            use(tmp_path)
    with pytest.raises(ValueError, match=needed):
        model(images)
    with pytest.raises(ValueError, match=needed):
        engine(tmp_path).predict(model, data_path=root / "new")
    with pytest.raises(ValueError, match=needed):
        fit(root, 0.01, data_of(root))
    assert not list(tmp_path.rglob("*.*"))


def test_rate_without_validation_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 9 normal validation images, and there are none"):
        fit(root, RATE, data_of(root), limit_val_batches=0)
    plain = checkpoint_of(fit(root, None, data_of(root), limit_val_batches=0))
    with pytest.raises(ValueError, match="needs 9 normal validation images, and there are none"):
        loaded(plain, false_alarm_rate=RATE).to_onnx(tmp_path)


def test_hold_out_keeps_images_from_training(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    data = data_of(root, val_split_mode="none")
    model = tiny_model(visualizer=False, false_alarm_rate=RATE)
    trained: set[str] = set()
    model.on_train_batch_start = lambda batch, _index: trained.update(batch.image_path)
    run = engine(root / "results", max_epochs=1)
    run.fit(model, datamodule=data)
    held = set(data.val_data.samples.image_path)
    assert len(held) == 9  # a fifth would be 4
    assert len(trained) == PARTS["train/good"] - len(held)
    assert not trained & held
    assert len(model.post_processor.calibration_scores) == len(held)
    assert "No validation image is normal: 9 of 20 training images validate and do not train" in caplog.text

    again = data_of(root, val_split_mode="none")
    torch.manual_seed(7)
    kept = checkpoint_of(run)
    fit(root, None, again, ckpt_path=kept, max_epochs=2)  # the rate is the checkpoint's
    assert set(again.val_data.samples.image_path) == held
    with pytest.raises(ValueError, match=r"held out 9 training images for false_alarm_rate, and 0\.2 needs 4 of 20"):
        fit(root, 0.2, data_of(root, val_split_mode="none"), ckpt_path=kept, max_epochs=2)

    tuned = loaded(kept, false_alarm_rate=0.2)
    with pytest.warns(UserWarning, match="may have been trained on images that are held out now"):
        engine(root / "tuned", max_epochs=1).fit(tuned, datamodule=data_of(root, val_split_mode="none"))
    assert tuned.checkpoint_path is None  # exports are not of that checkpoint any more


def test_hold_out_joins_defective_validation_images_and_refuses_too_few(root: Path) -> None:
    def prepare(rate: float) -> Folder:
        data = data_of(root)
        data.setup()
        defective = data.val_data.samples.label_index == 1
        data.val_data = data.val_data.subsample(np.flatnonzero(defective).tolist())
        processor = tiny_model(visualizer=False, false_alarm_rate=rate).post_processor
        trainer = SimpleNamespace(
            datamodule=data, enable_validation=True, ckpt_path=None, state=SimpleNamespace(fn="fit")
        )
        data._is_setup = True
        HoldOut().on_fit_start(trainer, SimpleNamespace(post_processor=processor, checkpoint_path=None))
        return data

    assert prepare(RATE).val_data.samples.label_index.tolist() == [1] * 10 + [0] * 9
    with pytest.raises(ValueError, match="needs 19 normal validation images; there are none, and half of the 20"):
        prepare(0.05)
