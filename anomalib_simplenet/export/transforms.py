"""Pre-processing transforms in a form that exported models compute exactly."""

from __future__ import annotations

import logging
from copy import deepcopy

import torch
from anomalib.data.transforms import ExportableCenterCrop
from anomalib.pre_processing.utils.transform import convert_center_crop_transform
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize, Transform

from anomalib_simplenet.components.ops import resize_by_product

logger = logging.getLogger(__name__)

BILINEAR = {InterpolationMode.BILINEAR, "bilinear", 2}
NEVER_ANTIALIASED = {InterpolationMode.NEAREST, InterpolationMode.NEAREST_EXACT, "nearest", "nearest-exact", 0}


class ExportableResize(Resize):
    """Antialiased bilinear ``Resize`` that every runtime computes alike.

    OpenVINO ignores the antialiasing of ONNX's ``Resize``, so anomalib switches it off for exported models, whose
    scores then differ from their checkpoint's on images larger than the model's input. This class exports the resize as
    two matrix products. Outside exports it is torchvision's own.
    """

    def transform(self, inpt: torch.Tensor, params: dict) -> torch.Tensor:
        """Resize one image or batch of shape ``(..., H, W)``."""
        if not torch.compiler.is_exporting():
            return super().transform(inpt, params)
        height, width = self.size if len(self.size) == 2 else super().transform(inpt, params).shape[-2:]
        # Transposed last: OpenVINO would fuse a normalization that follows a product into a scale of its columns.
        return resize_by_product(inpt.mT, (width, height), antialias=True).mT


def exportable_transform(transform: Transform | None) -> Transform | None:
    """Copy a transform with its ``Resize`` and ``CenterCrop`` in a form that can be exported.

    Args:
        transform (Transform | None): The transform that a pre-processor applies in training.

    Returns:
        Transform | None: A transform that computes the same. An antialiased ``Resize`` with another interpolation than
        bilinear is left as it is.
    """
    return convert_center_crop_transform(_replace_resize(deepcopy(transform)))


def check_exportable(transform: Transform | None, input_size: tuple[int, int] | None) -> None:
    """Refuse transforms whose output size depends on an unknown image size; warn about resizes that are not exact.

    Args:
        transform (Transform | None): Output of :func:`exportable_transform`.
        input_size (tuple[int, int] | None): ``(height, width)`` of the images to export for; ``None`` for any.

    Raises:
        ValueError: If ``input_size`` is ``None`` and images are resized to a single number (the shorter side), or
            cropped before they are resized.
    """
    sized = input_size is not None
    for step in _steps(transform):
        is_resize = isinstance(step, Resize)
        if not sized and ((is_resize and len(step.size or []) != 2) or isinstance(step, ExportableCenterCrop)):
            msg = (
                f"The output size of the pre_processor's {step} depends on the size of the image, so it cannot be "
                'exported for images of any size: pass --input_size "[H,W]", in Python input_size.'
            )
            raise ValueError(msg)
        sized = sized or is_resize
        exact = isinstance(step, ExportableResize) or not is_resize or step.interpolation in NEVER_ANTIALIASED
        if not exact and step.antialias:
            logger.warning(
                "%s is exported without its antialiasing: scores will differ from the checkpoint's on images larger "
                "than the model's input. Only bilinear interpolation is exported with antialiasing.",
                step,
            )


def split_resize(transform: Transform | None) -> tuple[tuple[int, int] | None, Transform | None]:
    """Take the resize off a transform of :func:`exportable_transform`, if it comes first.

    Returns:
        tuple[tuple[int, int] | None, Transform | None]: ``(height, width)`` of that resize, ``None`` if there is none;
        and the remaining transform.
    """
    steps = _steps(transform)
    if steps and isinstance(steps[0], ExportableResize) and len(steps[0].size) == 2:
        height, width = steps[0].size
        return (height, width), Compose(steps[1:]) if steps[1:] else None
    return None, transform


def _steps(transform: Transform | None) -> list[Transform]:
    if isinstance(transform, Compose):
        return [step for each in transform.transforms for step in _steps(each)]
    return [] if transform is None else [transform]


def _replace_resize(transform: Transform | None) -> Transform | None:
    if isinstance(transform, Compose):
        transform.transforms = [_replace_resize(step) for step in transform.transforms]
    elif (
        isinstance(transform, Resize)
        and transform.antialias
        and transform.interpolation in BILINEAR
        and transform.size is not None
    ):
        return ExportableResize(transform.size, max_size=transform.max_size, antialias=True)
    return transform
