"""Exported models that answer like their checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.data.transforms import ExportableCenterCrop
from anomalib.deploy import CompressionType
from anomalib.metrics import F1Score
from anomalib.pre_processing.utils.transform import convert_center_crop_transform
from torchmetrics import Metric
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize, Transform

from anomalib_simplenet.components.ops import resize_by_product

if TYPE_CHECKING:
    import openvino as ov

logger = logging.getLogger(__name__)

BILINEAR = {InterpolationMode.BILINEAR, "bilinear", 2}
NEVER_ANTIALIASED = {InterpolationMode.NEAREST, InterpolationMode.NEAREST_EXACT, "nearest", "nearest-exact", 0}


class ExportableResize(Resize):
    """Antialiased bilinear ``Resize`` that survives every export.

    OpenVINO ignores the antialiasing of ONNX's ``Resize``, and anomalib therefore switches it off for exported models,
    which then answer differently from their checkpoints on images larger than the model's input. While a graph is
    being traced, this class writes the resize as two matrix products, which every runtime computes alike. Otherwise it
    is torchvision's own.
    """

    def transform(self, inpt: torch.Tensor, params: dict) -> torch.Tensor:
        """Resize one image or batch of shape ``(..., H, W)``."""
        if not torch.compiler.is_compiling():
            return super().transform(inpt, params)
        height, width = self.size if len(self.size) == 2 else super().transform(inpt, params).shape[-2:]
        # Transposed last: OpenVINO would take a normalisation that follows a product for a scale of its columns.
        return resize_by_product(inpt.mT, (width, height)).mT


def exportable_transform(transform: Transform | None) -> Transform | None:
    """Copy a transform with its ``Resize`` and ``CenterCrop`` in a form that can be exported.

    Args:
        transform (Transform | None): What a pre-processor applies in training.

    Returns:
        Transform | None: A transform that computes the same. An antialiased ``Resize`` with another interpolation than
        bilinear is left as it is.
    """
    return convert_center_crop_transform(_replace_resize(deepcopy(transform)))


def check_exportable(transform: Transform | None, input_size: tuple[int, int] | None) -> None:
    """Refuse to export what depends on the size of images that can have any, and warn about what is not exact.

    Args:
        transform (Transform | None): What :func:`exportable_transform` gave.
        input_size (tuple[int, int] | None): ``(height, width)`` of the images to export for; ``None`` for any.

    Raises:
        ValueError: If images of any size shall be resized to a single number (the shorter side), or cropped before they
            are resized.
    """
    sized = input_size is not None
    for part in _parts(transform):
        is_resize = isinstance(part, Resize)
        if not sized and ((is_resize and len(part.size or []) != 2) or isinstance(part, ExportableCenterCrop)):
            msg = (
                f"The pre_processor's {part} gives what depends on the size of the image, and cannot be exported for "
                'images of any size: pass --input_size "[H,W]", in Python input_size.'
            )
            raise ValueError(msg)
        sized = sized or is_resize
        exact = isinstance(part, ExportableResize) or not is_resize or part.interpolation in NEVER_ANTIALIASED
        if not exact and part.antialias:
            logger.warning(
                "%s is exported without its antialiasing: answers will differ from the checkpoint's on images larger "
                "than the model's input. What is exported with it is a size and bilinear interpolation.",
                part,
            )


def split_resize(transform: Transform | None) -> tuple[tuple[int, int] | None, Transform | None]:
    """Take the resize off a transform of :func:`exportable_transform`, where it comes first.

    Returns:
        tuple[tuple[int, int] | None, Transform | None]: ``(height, width)`` that it resizes to, if so, and the rest.
    """
    parts = _parts(transform)
    if parts and isinstance(parts[0], ExportableResize) and len(parts[0].size) == 2:
        height, width = parts[0].size
        return (height, width), Compose(parts[1:]) if parts[1:] else None
    return None, transform


def prepend_resize(model: ov.Model, input_size: tuple[int, int] | None) -> ov.Model:
    """Let an OpenVINO model resize its images first, antialiased as in training, by OpenVINO's own fast operation.

    Args:
        model (ov.Model): Model of images of one size, ``(N, 3, h, w)``.
        input_size (tuple[int, int] | None): ``(height, width)`` of the images it shall take; ``None`` for any.

    Returns:
        ov.Model: Model of images ``(N, 3, H, W)``.
    """
    from openvino import Layout
    from openvino.preprocess import PrePostProcessor, ResizeAlgorithm

    processor = PrePostProcessor(model)
    image = processor.input()
    image.tensor().set_layout(Layout("NCHW"))
    if input_size is None:
        image.tensor().set_spatial_dynamic_shape()
    else:
        image.tensor().set_spatial_static_shape(*input_size)
    image.model().set_layout(Layout("NCHW"))
    image.preprocess().resize(ResizeAlgorithm.RESIZE_BILINEAR_PILLOW)
    return processor.build()


def keep_float32(model: ov.Model) -> None:
    """Mark all operations as sensitive to precision.

    Where the processor knows bfloat16, OpenVINO uses it by default. Scores then move by several hundredths of their
    range, and labels with them. Weights are not marked: FP16 compression still halves the file, and what was quantised
    is computed in eight bits. What OpenVINO replaces when it compiles loses the mark: max pooling is replaced here
    already; layer norm, attention and splits of channels stay in bfloat16.
    """
    from openvino import opset1

    for node in model.get_ops():
        given = node.get_attributes()
        if node.get_type_name() == "MaxPool" and set(given.get("dilations", [0])) == {1}:
            names = ("strides", "pads_begin", "pads_end", "kernel", "rounding_type", "auto_pad")
            pool = opset1.max_pool(node.input_value(0), *(given[name] for name in names))
            pool.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(pool.output(0))
    for node in model.get_ops():
        if node.get_type_name() != "Constant":
            node.get_rt_info()["precise_0"] = ""


def head_operations(path: Path) -> list[str]:
    """Names of the nodes of an ONNX file and of their outputs that do not stem from the model's backbone."""
    import onnx

    names = []
    for node in onnx.load(path, load_external_data=False).graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes")), "")
        if ".feature_extractor" not in scopes:
            names += [node.name, *node.output]
    return names


def quantize(
    model: ov.Model,
    compression_type: CompressionType,
    head: Iterable[str],
    datamodule: AnomalibDataModule | None = None,
    metric: Metric | None = None,
    max_drop: float = 0.01,
) -> ov.Model:
    """Compress a model's backbone to eight bits with NNCF, and leave pooling, whitening, head and smoothing alone.

    These are a small part of the work, and rounding them costs accuracy: the whitening magnifies small differences.

    Args:
        model (ov.Model): What to compress.
        compression_type (CompressionType): ``INT8`` (weights), ``INT8_PTQ`` (weights and features) or ``INT8_ACQ``
            (the same, but for operations that cost too much accuracy).
        head (Iterable[str]): What :func:`head_operations` found.
        datamodule (AnomalibDataModule | None): Its validation images calibrate ``INT8_PTQ`` and ``INT8_ACQ``; its test
            images check ``INT8_ACQ``.
        metric (Metric | None): What ``INT8_ACQ`` keeps, higher for better. ``None`` for the F1 score of images.
        max_drop (float): How much of ``metric`` ``INT8_ACQ`` may lose, between 0 and 1. Defaults to ``0.01``.

    Returns:
        ov.Model: The compressed model; weights that are not quantised are in half precision.

    Raises:
        ValueError: If the data module is missing or its images are not of the model's size, or ``max_drop`` is out of
            its range.
    """
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet
    from openvino import PartialShape

    model = _half_weights(model)
    left_alone = set(head)
    # OpenVINO splits a convolution with bias, and calls one part NAME/WithoutBiases.
    names = [node.get_friendly_name() for node in model.get_ops() if node.get_type_name() not in {"Constant", "Result"}]
    scope = nncf.IgnoredScope([name for name in names if name.partition("/")[0] in left_alone], validate=False)
    if compression_type == CompressionType.INT8:
        return nncf.compress_weights(model, ignored_scope=scope)
    if datamodule is None:
        msg = f"{compression_type.name} needs images to calibrate: pass --data, in Python datamodule."
        raise ValueError(msg)
    if not 0 <= max_drop <= 1:
        msg = f"max_drop is {max_drop}, expected a number between 0 and 1."
        raise ValueError(msg)
    datamodule.setup()
    images, wanted = next(iter(datamodule.val_dataloader())).image, model.input().partial_shape
    if not PartialShape(list(images.shape)).compatible(wanted):
        msg = f"Images {tuple(images.shape)} cannot calibrate a model of images {wanted}: leave --input_size out."
        raise ValueError(msg)
    calibration = nncf.Dataset(datamodule.val_dataloader(), lambda batch: batch.image)
    # NNCF's default ranges cut the extremes off, which are what an anomaly is made of.
    ranges = nncf.AdvancedQuantizationParameters(activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX)
    preset = nncf.QuantizationPreset.MIXED  # features are not symmetric around zero
    if compression_type == CompressionType.INT8_PTQ:
        return nncf.quantize(model, calibration, preset=preset, ignored_scope=scope, advanced_parameters=ranges)
    return nncf.quantize_with_accuracy_control(
        model,
        calibration,
        nncf.Dataset(datamodule.test_dataloader()),
        _validation(metric or F1Score(fields=["pred_label", "gt_label"])),
        max_drop=max_drop,
        preset=preset,
        ignored_scope=scope,
        advanced_quantization_parameters=ranges,
    )


def _half_weights(model: ov.Model) -> ov.Model:
    """Round weights to half precision, which ``openvino.save_model`` does not do in a model that is quantised."""
    import openvino as ov

    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file will be gone
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        ov.save_model(model, path, compress_to_fp16=True)
        return core.read_model(path)


def _validation(metric: Metric) -> Callable[[Any, Iterable[ImageBatch]], float]:
    def validate(model: ov.CompiledModel, batches: Iterable[ImageBatch]) -> float:
        metric.reset()
        for batch in batches:
            answer = {output.get_any_name(): torch.from_numpy(value) for output, value in model(batch.image).items()}
            if batch.gt_mask is not None:  # the model resizes images, but not these
                masks = batch.gt_mask[:, None].float()
                size = answer["anomaly_map"].shape[-2:]
                batch.gt_mask = torch.nn.functional.interpolate(masks, size)[:, 0].bool()
            metric.update(batch.update(**answer))
        return metric.compute().item()

    return validate


def lay_out_for_model_server(path: Path) -> None:
    """Give a model's files a second name in a folder ``1`` beside them, the version that Model Server asks for."""
    version = path.parent / "1"
    version.mkdir(exist_ok=True)
    for file in (path, path.with_suffix(".bin")):
        served = version / file.name
        served.unlink(missing_ok=True)
        try:
            served.hardlink_to(file)
        except OSError:  # a file system without links
            copyfile(file, served)


def _parts(transform: Transform | None) -> list[Transform]:
    """Steps of a transform."""
    if isinstance(transform, Compose):
        return [part for each in transform.transforms for part in _parts(each)]
    return [] if transform is None else [transform]


def _replace_resize(transform: Transform | None) -> Transform | None:
    if isinstance(transform, Compose):
        transform.transforms = [_replace_resize(part) for part in transform.transforms]
    elif (
        isinstance(transform, Resize)
        and transform.antialias
        and transform.interpolation in BILINEAR
        and transform.size is not None
    ):
        return ExportableResize(transform.size, max_size=transform.max_size, antialias=True)
    return transform
