"""Eight-bit quantization of the backbone with NNCF."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from anomalib import metrics
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy import CompressionType
from torchmetrics import Metric

from anomalib_simplenet.checks import check_number

if TYPE_CHECKING:
    import openvino as ov

METRICS = ("F1Score", "F1Max", "AUROC", "AUPR")
FIRST = 2  # convolutions of a backbone: their rounding errors pass through all others


def float_operations(path: Path) -> set[str]:
    """Names of the nodes of an ONNX file, and of their outputs, that are not to be quantized.

    These are all that are not part of the model's backbone, and the backbone's first convolutions.
    """
    import onnx

    names: set[str] = set()
    convolutions = 0
    for node in onnx.load(path, load_external_data=False).graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes")), "")
        is_backbone, is_convolution = ".feature_extractor" in scopes, node.op_type == "Conv"
        convolutions += is_backbone and is_convolution
        if not is_backbone or (is_convolution and convolutions <= FIRST):
            names.update([node.name, *node.output])
    return names


def quantize(
    model: ov.Model,
    compression_type: CompressionType,
    in_float: set[str],
    datamodule: AnomalibDataModule | None = None,
    metric: Metric | str | None = None,
    max_drop: float = 0.01,
) -> ov.Model:
    """Quantize a model's backbone to eight bits with NNCF, but for its first two convolutions (a ViT has one).

    The rest is computed in float32. It is a small part of the work, and whitening magnifies rounding errors.

    ``INT8`` quantizes weights alone. ``INT8_PTQ`` quantizes features, too, calibrated on the data module's validation
    images. ``INT8_ACQ`` then leaves operations in float32 until ``metric``, higher for better, of its test images loses
    at most ``max_drop``, from 0 to 1; the metric is anomalib's, or one of :data:`METRICS` of images, by default
    ``"F1Score"``.
    ``in_float`` is what :func:`float_operations` gives.

    Raises:
        ValueError: If the data module is missing, ``metric`` is unknown, or ``max_drop`` is out of its range.
    """
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level(logging.WARNING)
    metric = metric or "F1Score"
    if isinstance(metric, str):  # Engine.export documents names, but passes them on unresolved
        if metric not in METRICS:
            msg = f"metric is {metric!r}, expected one of {', '.join(METRICS)}, or in Python an anomalib metric."
            raise ValueError(msg)
        metric = getattr(metrics, metric)(fields=["pred_label" if metric == "F1Score" else "pred_score", "gt_label"])
    # OpenVINO splits a convolution with bias, and calls one part NAME/WithoutBiases.
    nodes = [node.get_friendly_name() for node in model.get_ops() if node.get_type_name() not in {"Constant", "Result"}]
    ignored = [name for name in nodes if name.partition("/")[0] in in_float]
    # Eight bits before the resize would replace NaN, which must reach the head.
    scope = nncf.IgnoredScope(ignored, types=["Interpolate"], validate=False)
    if compression_type == CompressionType.INT8:
        return nncf.compress_weights(model, ignored_scope=scope)
    if datamodule is None:
        msg = f"{compression_type.name} needs images to calibrate: pass --data, in Python datamodule."
        raise ValueError(msg)
    check_number("max_drop", max_drop, at_least=0, at_most=1)
    datamodule.setup()
    calibration = nncf.Dataset(datamodule.val_dataloader(), lambda batch: batch.image)
    advanced = nncf.AdvancedQuantizationParameters(
        # NNCF's default ranges clip the extremes, which are what distinguishes an anomaly.
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        # Without VNNI, products of eight bits are added in sixteen, which overflow unless weights use half the range.
        overflow_fix=nncf.OverflowFix.ENABLE,
    )
    preset = nncf.QuantizationPreset.MIXED  # features are not symmetric around zero
    if compression_type == CompressionType.INT8_PTQ:
        return nncf.quantize(model, calibration, preset=preset, ignored_scope=scope, advanced_parameters=advanced)
    test, validate = nncf.Dataset(datamodule.test_dataloader()), partial(_validate, metric)
    common = {"preset": preset, "ignored_scope": scope, "advanced_quantization_parameters": advanced}
    return nncf.quantize_with_accuracy_control(model, calibration, test, validate, max_drop=max_drop, **common)


def _validate(metric: Metric, model: ov.CompiledModel, batches: Iterable[ImageBatch]) -> float:
    metric.reset()
    for batch in batches:
        answer = {output.get_any_name(): torch.from_numpy(value) for output, value in model(batch.image).items()}
        if batch.gt_mask is not None:  # the model resizes images, but not these
            masks = batch.gt_mask[:, None].float()
            batch.gt_mask = torch.nn.functional.interpolate(masks, answer["anomaly_map"].shape[-2:])[:, 0].bool()
        metric.update(batch.update(**answer))
    return metric.compute().item()
