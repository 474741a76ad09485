"""Exported models that answer like their checkpoints."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from anomalib.pre_processing.utils.transform import convert_center_crop_transform
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize, Transform

from .components.traceable import resize_by_product

if TYPE_CHECKING:
    import openvino as ov


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
        # Transposed last: OpenVINO would take a normalisation that follows a product for a scale of its columns.
        return resize_by_product(inpt.mT, self.size[::-1]).mT


def exportable_transform(transform: Transform | None) -> Transform | None:
    """Copy a transform with its ``Resize`` and ``CenterCrop`` in a form that can be exported.

    Args:
        transform (Transform | None): What a pre-processor applies in training.

    Returns:
        Transform | None: A transform that computes the same. A ``Resize`` to a single number (the shorter side) or with
        another interpolation is left as it is.
    """
    return convert_center_crop_transform(_replace_resize(deepcopy(transform)))


def split_resize(transform: Transform | None) -> tuple[tuple[int, int] | None, Transform | None]:
    """Take the resize off a transform of :func:`exportable_transform`, where it comes first.

    Returns:
        tuple[tuple[int, int] | None, Transform | None]: ``(height, width)`` that it resizes to, if so, and the rest.
    """
    if isinstance(transform, Compose) and isinstance(transform.transforms[0], ExportableResize):
        height, width = transform.transforms[0].size
        return (height, width), Compose(transform.transforms[1:])
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
    range, and labels with them. Weights are not marked: FP16 compression still halves the file.
    """
    for node in model.get_ops():
        if node.get_type_name() != "Constant":
            node.get_rt_info()["precise_0"] = ""


def _replace_resize(transform: Transform | None) -> Transform | None:
    if isinstance(transform, Compose):
        transform.transforms = [_replace_resize(part) for part in transform.transforms]
    elif (
        isinstance(transform, Resize)
        and transform.antialias
        and transform.interpolation in {InterpolationMode.BILINEAR, "bilinear", 2}
        and transform.size is not None
        and len(transform.size) == 2
    ):
        return ExportableResize(transform.size, antialias=True)
    return transform
