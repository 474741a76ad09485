"""Exported models compute what their checkpoints compute, in every runtime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from anomalib.deploy import CompressionType, TorchInferencer
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from torch import nn
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.components.ops import leaky_relu, resize, resize_by_product
from anomalib_simplenet.export.quantization import float_operations, quantize
from anomalib_simplenet.export.transforms import check_exportable, exportable_transform, split_resize
from anomalib_simplenet.extensions.region import Region
from anomalib_simplenet.torch_model import SimpleNetModel

from .conftest import CORE, folder_data, tiny_model

NORMALIZE = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


class Backbone(nn.Sequential):
    """What ResNets start with, in fewer operations, since exporting takes time in proportion to their number."""

    def __init__(self) -> None:
        super().__init__()
        for name, channels, out in (("stem", 3, 8), ("early", 8, 16), ("late", 16, 24)):
            block = [nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            self.add_module(name, nn.Sequential(*block, *([nn.MaxPool2d(3, 2, 1)] if name == "stem" else [])))


def small_model(**arguments: object) -> SimpleNet:
    torch.manual_seed(0)
    return tiny_model(**{"backbone": Backbone(), "layers": ["early", "late"], "adapter_layers": 1, **arguments})


def trained_model(**arguments: object) -> SimpleNet:
    """Model with batch norm statistics of random images and with thresholds, in eval mode."""
    model = small_model(**arguments)
    model.model(torch.randn(2, 3, 64, 64))
    for name in ("image", "pixel") if model.post_processor else ():
        for field, value in {f"{name}_min": 0.0, f"{name}_max": 0.5, f"_{name}_threshold": 0.3}.items():
            getattr(model.post_processor, field).fill_(value)
    return model.eval()


def fit_whitening(model: SimpleNetModel, images: torch.Tensor) -> None:
    features = model.extract(images)
    model.whitening.fit(model.whitening.moments([model.patch_aggregation(features)]))
    if model.fine_map is not None:
        model.fine_map.whitening.fit(model.fine_map.whitening.moments([model.fine_map.cells(features)]))


def answers_of(path: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    compiled = CORE.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {output.get_any_name(): value for output, value in compiled(images.numpy()).items()}


def assert_answers_like(model: SimpleNet, path: Path, images: torch.Tensor, atol: float = 1e-5) -> None:
    expected, answer = model.eval()(images), answers_of(path, images)
    for field in ("pred_score", "anomaly_map"):
        np.testing.assert_allclose(answer[field], getattr(expected, field).detach(), rtol=1e-4, atol=atol)


def assert_in_float32(path: Path, images: torch.Tensor, *, with_region: bool = False) -> None:
    compiled = [CORE.compile_model(path, "CPU", config) for config in ({}, {"INFERENCE_PRECISION_HINT": "f32"})]
    answers = [each(images.numpy()) for each in compiled]
    for field in ("pred_score", "anomaly_map"):
        np.testing.assert_allclose(answers[0][field], answers[1][field], rtol=1e-5, atol=1e-5)
    nodes = compiled[0].get_runtime_model().get_ops()
    names = [node.get_friendly_name() for node in nodes if "bf16" in str(node.get_rt_info()["runtimePrecision"].value)]
    assert with_region or not names  # a region's are zeros and ones


@pytest.fixture(scope="module")
def cropping() -> SimpleNet:
    return trained_model(pre_processor=SimpleNet.configure_pre_processor((96, 80), (64, 48)))


@pytest.fixture(scope="module")
def exported(cropping: SimpleNet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports for images of any size of a model that crops as in the paper."""
    root = tmp_path_factory.mktemp("exported")
    return {"onnx": cropping.to_onnx(root), "openvino": cropping.to_openvino(root)}


def test_export_equals_the_eager_model(cropping: SimpleNet, exported: dict[str, Path]) -> None:
    for path in exported.values():
        for size in ((150, 170), (64, 200)):
            assert_answers_like(cropping, path, torch.rand(3, 3, *size))


def test_split_resize_takes_the_first_alone() -> None:
    resize = Resize((64, 48), antialias=True)
    for first in (resize, Compose([resize]), Compose([Compose([resize])])):
        assert split_resize(exportable_transform(first)) == ((64, 48), None)
    size, rest = split_resize(exportable_transform(Compose([resize, Compose([NORMALIZE])])))
    assert (size, [str(step) for step in rest.transforms]) == ((64, 48), [f"Exportable{NORMALIZE}"])
    assert split_resize(exportable_transform(Compose([NORMALIZE, resize])))[0] is None


def test_openvino_input_has_a_name_and_a_layout(exported: dict[str, Path]) -> None:
    model = ov.Core().read_model(exported["openvino"])
    (image,) = model.get_parameters()
    assert (image.get_friendly_name(), image.output(0).get_names()) == ("input", {"input"})
    ov.set_batch(model, 4)
    assert str(model.input().get_partial_shape()) == "[4,3,?,?]"


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_normalize_with_a_negative_deviation_exports_exactly(tmp_path: Path, kind: Callable[[list], Any]) -> None:
    inverted = Compose([Resize((80, 96), antialias=True), Normalize(mean=kind([0.5] * 3), std=kind([-0.25] * 3))])
    model = trained_model(pre_processor=PreProcessor(inverted))
    assert_answers_like(model, model.to_openvino(tmp_path), torch.rand(2, 3, 90, 70))


@pytest.mark.parametrize("height", [80, 81])  # even heights are resized in halves
def test_openvino_resizes_like_torchvision(tmp_path: Path, height: int) -> None:
    model = trained_model(pre_processor=PreProcessor(Resize((height, 96), antialias=True)))
    assert_answers_like(model, model.to_openvino(tmp_path), torch.rand(3, 3, 151, 170))


@pytest.mark.parametrize("kind", [tuple, list])
def test_openvino_export_for_images_of_the_models_size_does_not_resize(tmp_path: Path, kind: type) -> None:
    model, images = trained_model(), torch.rand(3, 3, 80, 96)
    model.pre_processor = PreProcessor(Resize((80, 96), antialias=True))
    path = model.to_openvino(tmp_path, input_size=kind((80, 96)))
    assert_answers_like(model, path, images)
    exported = ov.Core().read_model(path)
    assert "Interpolate" not in {node.get_type_name() for node in exported.get_ops()}
    assert str(exported.get_parameters()[0].get_layout()) == "[N,C,H,W]"


def test_layers_in_any_order_score_alike_in_every_runtime(tmp_path: Path) -> None:
    model, images = trained_model(layers=["late", "stem"]), torch.rand(3, 3, 150, 170)
    expected = model(images)
    compiled = torch.compile(model, backend="aot_eager")(images)
    torch.testing.assert_close(compiled.pred_score, expected.pred_score)
    torch.testing.assert_close(compiled.anomaly_map, expected.anomaly_map)
    assert_answers_like(model, model.to_openvino(tmp_path, input_size=(150, 170)), images)


def test_coarser_layer_first_exports_for_images_of_any_size(tmp_path: Path) -> None:
    model = trained_model(layers=["late", "early"], pre_processor=False)
    path = model.to_onnx(tmp_path)
    for height, width in ((64, 64), (150, 170), (77, 80)):
        assert_answers_like(model, path, torch.rand(2, 3, height, width))


def test_compiled_model_takes_no_export_forms() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    torch.compile(trained_model(), backend=keep)(torch.rand(1, 3, 80, 80))
    code = "".join(graphs)
    assert "interpolate" in code
    assert "leaky_relu" in code
    assert "torch.abs" not in code.replace("resize_matrix", "")


def test_export_of_non_finite_pixels_is_anomalous(cropping: SimpleNet, exported: dict[str, Path]) -> None:
    model, images = cropping, torch.rand(3, 3, 150, 170)
    finite = model(images).pred_score.detach()
    for pixel in (np.nan, np.inf, -np.inf):
        images[1, 2, 75, 85] = pixel
        eager = {name: value.detach().numpy() for name, value in model(images)._asdict().items()}
        for answer in (eager, *(answers_of(path, images) for path in exported.values())):
            assert answer["pred_score"][1] == 1  # the highest normalized score
            assert answer["pred_label"][1]
            assert answer["pred_mask"][1].all()
            np.testing.assert_allclose(answer["pred_score"][[0, 2]], finite[[0, 2]], rtol=1e-4)


def test_export_of_nan_weights_is_anomalous(exported: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(exported["onnx"])
    (last,) = (each for each in model.graph.initializer if each.name.endswith("weight_1_0"))
    last.CopyFrom(onnx.numpy_helper.from_array(np.full(last.dims, np.nan, np.float32), last.name))
    onnx.save(model, tmp_path / "model.onnx")
    assert answers_of(tmp_path / "model.onnx", torch.rand(2, 3, 90, 100))["pred_label"].all()


def test_export_uses_a_pre_processor_assigned_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # which TorchInferencer needs
    model, images = trained_model(), torch.rand(3, 3, 150, 170)
    model.pre_processor = PreProcessor(Resize((80, 96), antialias=True))
    expected = model.model(model.pre_processor.transform(images)).pred_score.detach()
    model.post_processor = None
    inferencer = TorchInferencer(model.to_torch(tmp_path), device="cpu")
    torch.testing.assert_close(inferencer.model(images).pred_score, expected)
    given = model.pre_processor
    answer = answers_of(model.to_openvino(tmp_path, input_size=(150, 170)), images)
    np.testing.assert_allclose(answer["pred_score"], expected, rtol=1e-4, atol=1e-5)
    assert model.pre_processor is given  # exporting replaces it for a while


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param([Resize(64, antialias=True), NORMALIZE], id="shorter side"),
        pytest.param([Resize(64, max_size=70, antialias=True), NORMALIZE], id="longer side limited"),
        pytest.param([CenterCrop((64, 96)), NORMALIZE], id="cropped only"),
        pytest.param([NORMALIZE, Resize(80, antialias=True), CenterCrop(64)], id="cropped from the shorter side"),
    ],
)
def test_size_dependent_transform_needs_input_size(transform: list) -> None:
    exportable = exportable_transform(Compose(transform))
    with pytest.raises(ValueError, match=r'cannot be exported for images of any size: pass --input_size "\[H,W\]"'):
        check_exportable(exportable, None)
    check_exportable(exportable, (150, 170))


def test_size_dependent_transform_exports_with_input_size(tmp_path: Path) -> None:
    longer_side_limited = Resize(80, max_size=85, antialias=True)
    model = trained_model(pre_processor=PreProcessor(Compose([NORMALIZE, longer_side_limited, CenterCrop(64)])))
    with pytest.raises(ValueError, match="pass --input_size"):
        model.to_openvino(tmp_path)
    assert_answers_like(model, model.to_openvino(tmp_path, input_size=(150, 170)), torch.rand(3, 3, 150, 170))


def test_inexact_resize_warns(caplog: pytest.LogCaptureFixture) -> None:
    for exact in (Resize((64, 64), antialias=True), Resize((64, 64), interpolation=InterpolationMode.NEAREST)):
        check_exportable(exportable_transform(exact), None)
    assert not caplog.text
    bicubic = Resize((64, 64), interpolation=InterpolationMode.BICUBIC, antialias=True)
    check_exportable(exportable_transform(bicubic), None)
    assert "BICUBIC" in caplog.text
    assert "exported without its antialiasing" in caplog.text


@pytest.mark.parametrize("input_size", [None, (150, 170)])
@pytest.mark.parametrize(
    ("pre_processor", "arguments"),
    [
        (None, {"whiten": "local", "components": 9, "normalize_brightness": True}),
        pytest.param(
            SimpleNet.configure_pre_processor((96, 128)),  # a mask of over 8,192 pixels, which is not folded
            {"whiten": "local", "components": 9, "normalize_brightness": True, "top_patches": 3, "region": True},
            id="resized first, with a region",
        ),
        *(
            pytest.param(
                SimpleNet.configure_pre_processor((96, 128)),
                {
                    "whiten": "local",
                    "components": 9,
                    "layers": ["late", "early"],
                    "map_layer": "early",
                    "normalize_brightness": True,
                    "top_patches": 3,
                    "region": region,
                },
                id=f"map of a finer layer, region {region}",
            )
            for region in (False, True)
        ),
        pytest.param(
            PreProcessor(Compose([NORMALIZE, Resize((64, 64), antialias=True)])),
            {"whiten": True},
            id="resized last",
            marks=pytest.mark.skipif(ov.__version__ < "2026.4", reason="OpenVINO rounds the matrices that resize"),
        ),
    ],
)
def test_openvino_computes_in_float32(
    tmp_path: Path,
    pre_processor: PreProcessor | None,
    arguments: dict[str, object],
    input_size: tuple[int, int] | None,
) -> None:
    pre_processor = pre_processor or SimpleNet.configure_pre_processor((96, 80), (64, 48))
    with_region = arguments.get("region")
    arguments = {name: value for name, value in arguments.items() if name != "region"}
    model = small_model(pre_processor=pre_processor, **arguments)
    images = torch.rand(3, 3, 150, 170)
    fit_whitening(model.model, pre_processor(images))
    if with_region:
        mask = torch.zeros(1, 1, 96, 128)
        mask[..., 20:70, 30:] = 1
        model.model.region = Region(mask, torch.tensor(170 / 150))
    path = model.eval().to_openvino(tmp_path, input_size=input_size)
    assert_answers_like(model, path, images, atol=1e-4 if model.model.fine_map else 1e-5)  # its terms cancel out
    assert_in_float32(path, images, with_region=bool(with_region))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("size", "out"), [((90, 70), (32, 48)), ((20, 30), (64, 31)), ((40, 40), (40, 40))])
def test_resize_by_product_equals_torchvision(size: tuple[int, int], out: tuple[int, int], antialias: bool) -> None:
    images = torch.rand(2, 3, *size)
    expected = Resize(out, antialias=antialias)(images)
    # Products and torchvision's own loop round differently where they do not average.
    atol = 1e-6 if antialias else 5e-6
    torch.testing.assert_close(resize_by_product(images, out, antialias=antialias), expected, rtol=1e-5, atol=atol)


def test_map_of_a_finer_layer_exports_for_any_size(tmp_path: Path) -> None:
    model = trained_model(pre_processor=False, layers=["late", "early"], whiten=True, map_layer="early")
    fit_whitening(model.model, torch.rand(3, 3, 64, 64))
    path = model.eval().to_openvino(tmp_path)
    for size in ((64, 64), (96, 80), (68, 60)):
        images = torch.rand(2, 3, *size)
        assert_answers_like(model, path, images)
        assert_in_float32(path, images)


def test_resize_to_half_exports_exactly() -> None:
    class Half(torch.nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return resize(features, (5, 8))

    features = torch.randn(2, 3, 10, 16)
    exported = torch.export.export(Half(), (features,))
    assert "avg_pool2d" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(features), Half()(features))


def test_leaky_relu_exports_exactly() -> None:
    class Activation(torch.nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return leaky_relu(features, 0.2)

    features = torch.randn(2, 5, 4, 3)
    traced = torch.export.export(Activation(), (features,)).module()
    torch.testing.assert_close(traced(features), torch.nn.functional.leaky_relu(features, 0.2))


@pytest.mark.parametrize("kind", [CompressionType.INT8, CompressionType.INT8_PTQ, CompressionType.INT8_ACQ])
def test_quantize_compresses_the_backbone_alone(
    cropping: SimpleNet, exported: dict[str, Path], pictures: Path, tmp_path: Path, kind: CompressionType
) -> None:
    model, data = cropping, folder_data(pictures, val_split_mode="same_as_test")
    if kind == CompressionType.INT8_ACQ:
        engine = Engine(accelerator="cpu", default_root_dir=tmp_path, logger=False)
        arguments = {"compression_type": kind, "datamodule": data, "metric": "F1Score", "export_root": tmp_path}
        graph = ov.Core().read_model(engine.export(model, "openvino", **arguments))
    else:  # what to_openvino does, without exporting again
        graph = quantize(ov.convert_model(exported["onnx"]), kind, float_operations(exported["onnx"]), data)
    stored = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    eight_bits = [node for node in stored if node.get_element_type() in {ov.Type.i8, ov.Type.u8}]
    large = [node for node in eight_bits if len(node.get_output_shape(0)) == 4]
    backbone = [m for m in model.model.feature_extractor.modules() if isinstance(m, torch.nn.Conv2d)]
    weights = sorted(tuple(m.weight.shape) for m in backbone[2:])  # the first two are not quantized
    kept = sorted(tuple(node.get_output_shape(0)) for node in large if np.prod(node.get_output_shape(0)[1:]) > 1)
    assert kept == weights[: len(kept)] if kind == CompressionType.INT8_ACQ else kept == weights
    images = torch.rand(3, 3, 150, 170)
    expected = model.eval()(images).pred_score.detach()
    images[1, 2, 75, 85] = torch.nan
    answer = CORE.compile_model(graph, "CPU")(images.numpy())
    np.testing.assert_allclose(answer["pred_score"][[0, 2]], expected[[0, 2]], atol=0.2)
    assert answer["pred_score"][1] == 1  # pixels reach the head as they are, so NaN does


def test_quantize_with_an_unknown_metric_refuses() -> None:
    with pytest.raises(ValueError, match="metric is 'F2', expected one of F1Score, F1Max, AUROC"):
        quantize(None, CompressionType.INT8_ACQ, set(), metric="F2")


def test_quantize_without_images_refuses(exported: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="INT8_PTQ needs images to calibrate: pass --data"):
        quantize(ov.Core().read_model(exported["openvino"]), CompressionType.INT8_PTQ, set())


def test_onnx_export_is_one_file_quiet_and_the_fused_graph(
    tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = trained_model(pre_processor=False)
    capfd.readouterr()
    path = model.to_onnx(tmp_path, input_size=(64, 64))
    assert list(path.parent.iterdir()) == [path]
    assert capfd.readouterr().out == ""
    assert not [record for record in caplog.records if record.name.startswith("onnx")]
    assert_answers_like(model, path, torch.rand(1, 3, 64, 64))
    graph = ov.Core().read_model(path)
    kinds = {node.get_type_name() for node in graph.get_ops()}
    assert not kinds & {"ExtractImagePatches", "Im2Col", "Col2Im", "AdaptiveAvgPool", "AvgPool", "BatchNormInference"}
    convolutions = [node for node in graph.get_ops() if "Convolution" in node.get_type_name()]
    kernels = [node.input(1).get_partial_shape().to_shape()[-2:] for node in convolutions]
    backbone = sum(isinstance(module, torch.nn.Conv2d) for module in model.model.feature_extractor.modules())
    # A pooling and a projection for each layer, and the last linear layer; the smoothing became constants.
    assert len(kernels) == backbone + 5
    assert max(max(kernel) for kernel in kernels) == 3  # the backbone's


def test_engine_export_writes_beside_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = Engine(accelerator="cpu", logger=False)
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(trained_model(backbone="resnet18", layers=["layer1"]))
    for run in ("v0", "v1"):
        folder = tmp_path / "results" / "SimpleNet" / "pictures" / run
        trainer.save_checkpoint(folder / "weights" / "lightning" / "model.ckpt")
        export = {"export_type": "torch", "ckpt_path": folder / "weights" / "lightning" / "model.ckpt"}
        assert engine.export(tiny_model(), **export) == folder / "weights" / "torch" / "model.pt"
    assert "earlier export" not in caplog.text
    engine.export(tiny_model(), **export)
    assert "v1/weights/torch/model.pt, an earlier export. To keep both, pass another --export_root" in caplog.text
    assert engine.export(tiny_model(), export_root="mine", **export) == Path("mine/weights/torch/model.pt")


def test_exportable_transform_leaves_subclasses_as_they_are() -> None:
    class Own(Compose):
        """May compute anything."""

    class OwnResize(Resize):
        """May compute anything."""

    own = Own([OwnResize((64, 64), antialias=True)])
    assert exportable_transform(own) is own
    (step,) = exportable_transform(Compose([OwnResize((64, 64), antialias=True)])).transforms
    assert type(step) is OwnResize


def test_model_applies_a_pre_processor_of_ones_own() -> None:
    class Half(PreProcessor):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return batch / 2

    model = tiny_model(pre_processor=Half(transform=Resize((64, 64))), post_processor=False).eval()
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model(images).pred_score, model.model(images / 2).pred_score)
