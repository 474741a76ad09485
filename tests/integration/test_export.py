"""Exports of pre-processors other than the default one, in every runtime."""

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.deploy import CompressionType
from anomalib.metrics import AUROC
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.components.ops import leaky_relu, resize_by_product
from anomalib_simplenet.export.openvino import exportable_transform

from .conftest import folder_data, tiny_model

NORMALIZE = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    "pre_processor",
    [
        pytest.param(SimpleNet.configure_pre_processor((96, 80), (64, 48)), id="cropped as in the paper"),
        pytest.param(PreProcessor(Compose([NORMALIZE, Resize((64, 64), antialias=True)])), id="resized last"),
        pytest.param(PreProcessor(Resize((64, 64), antialias=True)), id="resized only"),
        pytest.param(PreProcessor(Compose([Resize((64, 64), antialias=True)])), id="a list of one"),
        pytest.param(False, id="none"),
    ],
)
@pytest.mark.parametrize("input_size", [None, (150, 170)])
def test_exports_agree_with_the_model(
    tmp_path: Path, pre_processor: PreProcessor | bool, input_size: tuple[int, int] | None
) -> None:
    torch.manual_seed(0)
    model = tiny_model(pre_processor=pre_processor, layers=["layer1", "layer2"], adapter_layers=1)
    model.model(torch.randn(2, 3, 64, 64))
    images = torch.rand(3, 3, 150, 170)
    expected = model.eval()(images)
    for path in (model.to_onnx(tmp_path, input_size=input_size), model.to_openvino(tmp_path, input_size=input_size)):
        runtime = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        answer = runtime(images.numpy())
        for field in ("pred_score", "anomaly_map"):
            np.testing.assert_allclose(answer[field], getattr(expected, field).detach(), rtol=1e-4, atol=1e-5)
    if pre_processor:  # which exporting leaves as it was
        assert torch.equal(model(images).pred_score, expected.pred_score)


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param([Resize(64, antialias=True), NORMALIZE], id="shorter side"),
        pytest.param([Resize(64, max_size=70, antialias=True), NORMALIZE], id="longer side limited"),
        pytest.param([CenterCrop((64, 96)), NORMALIZE], id="cropped only"),
        pytest.param([NORMALIZE, Resize(80, antialias=True), CenterCrop(64)], id="cropped from the shorter side"),
    ],
)
def test_what_depends_on_the_images_size_needs_it(tmp_path: Path, transform: list) -> None:
    torch.manual_seed(0)
    model = tiny_model(pre_processor=PreProcessor(Compose(transform)), layers=["layer1", "layer2"]).eval()
    with pytest.raises(ValueError, match=r'cannot be exported for images of any size: pass --input_size "\[H,W\]"'):
        model.to_openvino(tmp_path)
    images = torch.rand(3, 3, 150, 170)
    expected = model(images)
    answer = ov.Core().compile_model(model.to_openvino(tmp_path, input_size=(150, 170)), "CPU")(images.numpy())
    assert answer["anomaly_map"].shape == expected.anomaly_map.shape
    np.testing.assert_allclose(answer["anomaly_map"], expected.anomaly_map.detach(), rtol=1e-4, atol=1e-5)


def test_inexact_resizes_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bicubic = Resize((64, 64), interpolation=InterpolationMode.BICUBIC, antialias=True)
    tiny_model(pre_processor=PreProcessor(bicubic)).to_onnx(tmp_path)
    assert "BICUBIC" in caplog.text
    assert "exported without its antialiasing" in caplog.text
    caplog.clear()
    tiny_model().to_onnx(tmp_path)
    assert "antialiasing" not in caplog.text


@pytest.mark.parametrize(
    "pre_processor",
    [
        pytest.param(SimpleNet.configure_pre_processor((96, 80), (64, 48)), id="cropped as in the paper"),
        pytest.param(
            PreProcessor(Compose([NORMALIZE, Resize((64, 64), antialias=True)])),
            id="resized last",
            marks=pytest.mark.skipif(ov.__version__ < "2026.4", reason="OpenVINO rounds the matrices that resize"),
        ),
    ],
)
@pytest.mark.parametrize("arguments", [{}, {"whiten": True, "distance_weight": 2.4}, {"whiten": "local"}])
def test_nothing_is_computed_in_bfloat16(
    tmp_path: Path, pre_processor: PreProcessor, arguments: dict[str, object]
) -> None:
    torch.manual_seed(0)
    model = tiny_model(pre_processor=pre_processor, layers=["layer1", "layer2"], adapter_layers=1, **arguments)
    images = torch.rand(3, 3, 150, 170)
    if arguments:
        whitening = model.model.whitening
        whitening.fit(whitening.moments([model.model.embed(pre_processor(images))]))
    path = model.eval().to_openvino(tmp_path)
    compiled = [ov.Core().compile_model(path, "CPU", config) for config in ({}, {"INFERENCE_PRECISION_HINT": "f32"})]
    answers = [each(images.numpy()) for each in compiled]
    for field in ("pred_score", "anomaly_map"):
        np.testing.assert_allclose(answers[0][field], answers[1][field], rtol=1e-5, atol=1e-6)
    nodes = compiled[0].get_runtime_model().get_ops()
    names = [node.get_friendly_name() for node in nodes if "bf16" in str(node.get_rt_info()["runtimePrecision"].value)]
    assert not names


@pytest.mark.parametrize(("size", "out"), [((90, 70), (32, 48)), ((20, 30), (64, 31)), ((40, 40), (40, 40))])
def test_resize_by_product_is_the_antialiased_resize(size: tuple[int, int], out: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    expected = exportable_transform(Resize(out, antialias=True))(images)
    torch.testing.assert_close(resize_by_product(images, out), expected, rtol=1e-5, atol=1e-6)


def test_leaky_relu_is_the_same_while_a_graph_is_traced() -> None:
    class Activation(torch.nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return leaky_relu(features, 0.2)

    features = torch.randn(2, 5, 4, 3)
    traced = torch.export.export(Activation(), (features,)).module()
    torch.testing.assert_close(traced(features), torch.nn.functional.leaky_relu(features, 0.2))


@pytest.mark.parametrize("kind", [CompressionType.INT8, CompressionType.INT8_PTQ, CompressionType.INT8_ACQ])
def test_eight_bits_are_for_the_backbone_alone(pictures: Path, tmp_path: Path, kind: CompressionType) -> None:
    torch.manual_seed(0)
    model = tiny_model(layers=["layer1", "layer2"], adapter_layers=1, post_processor=False)
    model.model(torch.randn(2, 3, 64, 64))
    data = folder_data(pictures, val_split_mode="same_as_test")
    quality = AUROC(fields=["anomaly_map", "gt_mask"])
    path = model.eval().to_openvino(tmp_path, compression_type=kind, datamodule=data, metric=quality)
    graph = ov.Core().read_model(path)
    stored = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    eight_bits = [node for node in stored if node.get_element_type() in {ov.Type.i8, ov.Type.u8}]
    large = [node for node in eight_bits if len(node.get_output_shape(0)) == 4]
    backbone = [m for m in model.model.feature_extractor.modules() if isinstance(m, torch.nn.Conv2d)]
    weights = sorted(tuple(m.weight.shape) for m in backbone)
    kept = sorted(tuple(node.get_output_shape(0)) for node in large if np.prod(node.get_output_shape(0)[1:]) > 1)
    assert kept == weights[: len(kept)] if kind == CompressionType.INT8_ACQ else kept == weights
    images = torch.rand(3, 3, 150, 170)
    answer = ov.Core().compile_model(path, "CPU")(images.numpy())
    np.testing.assert_allclose(answer["pred_score"], model(images).pred_score.detach(), atol=0.5)


def test_quantising_needs_images(tmp_path: Path) -> None:
    model = tiny_model().eval()
    with pytest.raises(ValueError, match="INT8_PTQ needs images to calibrate: pass --data"):
        model.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ)


def test_images_of_another_size_than_the_models_do_not_calibrate_it(pictures: Path, tmp_path: Path) -> None:
    data = folder_data(pictures, val_split_mode="same_as_test")
    with pytest.raises(ValueError, match=r"Images \(3, 3, 80, 64\) cannot calibrate .*: leave --input_size out"):
        tiny_model().to_openvino(
            tmp_path, input_size=(70, 70), compression_type=CompressionType.INT8_PTQ, datamodule=data
        )


def test_what_is_exported_is_the_fused_graph(tmp_path: Path) -> None:
    model = tiny_model(pre_processor=False, layers=["layer1", "layer2"], adapter_layers=1).eval()
    graph = ov.Core().read_model(model.to_openvino(tmp_path, input_size=(64, 64)))
    kinds = {node.get_type_name() for node in graph.get_ops()}
    assert not kinds & {"ExtractImagePatches", "Im2Col", "Col2Im", "AdaptiveAvgPool", "AvgPool", "BatchNormInference"}
    convolutions = [node for node in graph.get_ops() if "Convolution" in node.get_type_name()]
    kernels = [node.input(1).get_partial_shape().to_shape()[-2:] for node in convolutions]
    backbone = sum(isinstance(module, torch.nn.Conv2d) for module in model.model.feature_extractor.modules())
    # A pooling and a projection for each layer, and the last linear layer; the smoothing became constants.
    assert len(kernels) == backbone + 5
    assert max(max(kernel) for kernel in kernels) == 7  # the backbone's stem
