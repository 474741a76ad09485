"""Eight-bit quantization of the backbone with NNCF."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from anomalib import metrics
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy import CompressionType
from torchmetrics import Metric

if TYPE_CHECKING:
    import openvino as ov

_METRIC_FIELDS = {
    "F1Score": ["pred_label", "gt_label"],
    "F1Max": ["pred_score", "gt_label"],
    "AUROC": ["pred_score", "gt_label"],
    "AUPR": ["pred_score", "gt_label"],
    "AUPRO": ["anomaly_map", "gt_mask"],
}


def head_operations(path: Path) -> list[str]:
    """Names of the nodes of an ONNX file, and of their outputs, that are not part of the model's backbone."""
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
    metric: Metric | str | None = None,
    max_drop: float = 0.01,
) -> ov.Model:
    """Quantize a model's backbone to eight bits with NNCF; pooling, whitening, head and smoothing stay in float32.

    These are a small part of the work, and rounding them costs accuracy: the whitening magnifies small differences.

    Args:
        model (ov.Model): Model to compress.
        compression_type (CompressionType): ``INT8`` (weights), ``INT8_PTQ`` (weights and features) or ``INT8_ACQ``
            (weights and features, except operations that cost too much accuracy).
        head (Iterable[str]): Output of :func:`head_operations`.
        datamodule (AnomalibDataModule | None): Its validation images calibrate ``INT8_PTQ`` and ``INT8_ACQ``;
            ``INT8_ACQ`` measures ``metric`` on its test images.
        metric (Metric | str | None): Metric that ``INT8_ACQ`` maintains, higher for better: an anomalib metric or the
            name of one, ``"F1Score"``, ``"F1Max"``, ``"AUROC"`` or ``"AUPR"`` of images or ``"AUPRO"`` of pixels.
            Defaults to ``None``: ``"F1Score"``.
        max_drop (float): Loss of ``metric`` that ``INT8_ACQ`` accepts, between 0 and 1. Defaults to ``0.01``.

    Returns:
        ov.Model: The compressed model; weights that are not quantized are in half precision.

    Raises:
        ValueError: If the data module is missing or its images have another size than the model's, ``metric`` is
            unknown, or ``max_drop`` is out of its range.
    """
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet
    from openvino import PartialShape

    metric = _metric(metric or "F1Score")
    model = _half_weights(model)
    ignored = set(head)
    # OpenVINO splits a convolution with bias, and calls one part NAME/WithoutBiases.
    names = [node.get_friendly_name() for node in model.get_ops() if node.get_type_name() not in {"Constant", "Result"}]
    scope = nncf.IgnoredScope([name for name in names if name.partition("/")[0] in ignored], validate=False)
    if compression_type == CompressionType.INT8:
        return nncf.compress_weights(model, ignored_scope=scope)
    if datamodule is None:
        msg = f"{compression_type.name} needs images to calibrate: pass --data, in Python datamodule."
        raise ValueError(msg)
    if not 0 <= max_drop <= 1:
        msg = f"max_drop is {max_drop}, expected a number between 0 and 1."
        raise ValueError(msg)
    datamodule.setup()
    images, expected = next(iter(datamodule.val_dataloader())).image, model.input().partial_shape
    if not PartialShape(list(images.shape)).compatible(expected):
        msg = f"Images {tuple(images.shape)} cannot calibrate a model of images {expected}: leave --input_size out."
        raise ValueError(msg)
    calibration = nncf.Dataset(datamodule.val_dataloader(), lambda batch: batch.image)
    # NNCF's default ranges clip the extremes, which are what distinguishes an anomaly.
    ranges = nncf.AdvancedQuantizationParameters(activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX)
    preset = nncf.QuantizationPreset.MIXED  # features are not symmetric around zero
    if compression_type == CompressionType.INT8_PTQ:
        model = nncf.quantize(model, calibration, preset=preset, ignored_scope=scope, advanced_parameters=ranges)
    else:
        model = nncf.quantize_with_accuracy_control(
            model,
            calibration,
            nncf.Dataset(datamodule.test_dataloader()),
            _validation(metric),
            max_drop=max_drop,
            preset=preset,
            ignored_scope=scope,
            advanced_quantization_parameters=ranges,
        )
    _check_raw_pixels(model, ignored)
    return model


def _check_raw_pixels(model: ov.Model, head: set[str]) -> None:
    """Let ``ops.non_finite`` take its mean of the raw image: NNCF quantizes that first, which replaces NaN."""
    for node in model.get_ops():
        is_mean = node.get_type_name() == "ReduceMean" and node.get_friendly_name() in head
        if is_mean and node.get_input_partial_shape(0)[1] == 3:  # the other head operations have one or many channels
            node.input(0).replace_source_output(model.input().get_node().output(0))
    model.validate_nodes_and_infer_types()


def _metric(metric: Metric | str) -> Metric:
    """Anomalib's metric of a name: ``Engine.export`` documents names, but passes them on unresolved."""
    if not isinstance(metric, str):
        return metric
    if metric not in _METRIC_FIELDS:
        msg = f"metric is {metric!r}, expected one of {', '.join(_METRIC_FIELDS)}, or in Python an anomalib metric."
        raise ValueError(msg)
    return getattr(metrics, metric)(fields=_METRIC_FIELDS[metric])


def _half_weights(model: ov.Model) -> ov.Model:
    """Round weights to half precision, which ``openvino.save_model`` does not do in a quantized model."""
    import openvino as ov

    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file is deleted below
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
