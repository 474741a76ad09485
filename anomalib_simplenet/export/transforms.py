"""Pre-processing transforms in a form that exported models compute exactly."""

import logging

import torch
from anomalib.data.transforms import ExportableCenterCrop
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize, Transform

from anomalib_simplenet.components.ops import resize_by_product

logger = logging.getLogger(__name__)

BILINEAR = {InterpolationMode.BILINEAR, "bilinear", 2}
NEVER_ANTIALIASED = {InterpolationMode.NEAREST, InterpolationMode.NEAREST_EXACT, "nearest", "nearest-exact", 0}


class ExportableResize(Resize):
    """Antialiased bilinear ``Resize`` that every runtime computes alike.

    OpenVINO ignores the antialiasing of ONNX's ``Resize``. Exported graphs resize by two matrix products instead.
    """

    def transform(self, inpt: torch.Tensor, params: dict) -> torch.Tensor:
        """Resize one image or batch of shape ``(..., H, W)``."""
        if not torch.compiler.is_exporting():
            return super().transform(inpt, params)
        height, width = self.size if len(self.size) == 2 else super().transform(inpt, params).shape[-2:]
        # Transposed last: OpenVINO would fuse a normalization that follows a product into a scale of its columns.
        return resize_by_product(inpt.mT, (width, height), antialias=True).mT


class ExportableNormalize(Normalize):
    """``Normalize`` of rows of pixels: OpenVINO takes ten times as long where three channels are an axis."""

    def transform(self, inpt: torch.Tensor, params: dict) -> torch.Tensor:
        """Normalise one image or batch of shape ``(..., C, H, W)``."""
        if not torch.compiler.is_exporting():
            return super().transform(inpt, params)
        mean, scale = (inpt.new_tensor(each)[:, None] for each in (self.mean, [1 / float(value) for value in self.std]))
        return ((inpt.flatten(-2) - mean) * scale).reshape(inpt.shape)


def exportable_transform(transform: Transform | None) -> Transform | None:
    """Copy a transform with its antialiased bilinear ``Resize``, ``CenterCrop`` and ``Normalize`` in exportable forms.

    Lists in lists become one list. Subclasses, which may compute anything, are left as they are.
    """
    match transform:
        case Compose() if type(transform) is Compose:
            steps = [exportable_transform(step) for step in transform.transforms]
            return Compose([part for step in steps for part in _steps(step)])
        case Resize(antialias=True, size=[*size], interpolation=kind) if type(transform) is Resize and kind in BILINEAR:
            return ExportableResize(size, max_size=transform.max_size, antialias=True)
        case CenterCrop() if type(transform) is CenterCrop:
            return ExportableCenterCrop(transform.size)
        case Normalize() if type(transform) is Normalize:
            return ExportableNormalize(transform.mean, transform.std)
    return transform


def check_exportable(transform: Transform | None, input_size: tuple[int, int] | None) -> None:
    """Refuse transforms whose output size depends on an unknown image size; warn about resizes that are not exact.

    Raises:
        ValueError: If ``input_size``, ``(height, width)`` of the images, is ``None``, and the exportable ``transform``
            resizes images to a single number (the shorter side), or crops them before it resizes.
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
    """Split an exportable transform into the ``(height, width)`` of a resize that comes first, if any, and the rest."""
    match _steps(transform):
        case [ExportableResize(size=[height, width]), *rest]:
            return (height, width), Compose(rest) if rest else None
    return None, transform


def _steps(transform: Transform | None) -> list[Transform]:
    """The steps of an exportable transform."""
    if isinstance(transform, Compose):
        return transform.transforms
    return [] if transform is None else [transform]
