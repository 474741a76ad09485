"""Normalisation of each image by its own brightness (not in the paper)."""

import torch
from torchvision.transforms.v2 import Compose, Normalize, Transform

from anomalib_simplenet.components.ops import power

from .region import Region

MEAN = [0.485, 0.456, 0.406]  # ImageNet's, with which the pre-processor normalises
STD = [0.229, 0.224, 0.225]
BRIGHTNESS = sum(MEAN) / len(MEAN)
DARKEST = 1e-3  # no darker image is amplified further


def equalize_brightness(images: torch.Tensor, region: Region | None = None) -> torch.Tensor:
    """Scale the pixels of each image so that their mean is ImageNet's, about 0.45.

    Lamps age, and exposure differs between the days of training and production. A defect is small: it moves the mean of
    an image little.

    Args:
        images (torch.Tensor): Images of shape ``(N, 3, H, W)``, normalised with ImageNet's mean and standard deviation.
        region (Region | None): The pixels whose mean it is. Defaults to ``None``: all.

    Returns:
        torch.Tensor: The same, scaled before that normalisation.
    """
    mean, std, inverse = (
        images.new_tensor(values)[:, None, None] for values in (MEAN, STD, [1 / value for value in STD])
    )
    counting = images if region is None else region.fill(images)
    if region is not None:
        std = std * power(region.mask.mean(dim=(1, 2, 3), keepdim=True), -1)
    brightness = (counting.mean(dim=(2, 3), keepdim=True) * std + mean).mean(dim=1, keepdim=True)
    scale = images.new_full((3, 1, 1), BRIGHTNESS) * power(brightness.clamp(min=DARKEST), -1)
    shift = mean * inverse * (scale - 1)
    # In rows of pixels, or OpenVINO puts the three channels last, which takes it ten times as long.
    return torch.addcmul(shift.flatten(2), images.flatten(2), scale.flatten(2)).reshape(images.shape)


def normalizes_as_imagenet(transform: Transform | None) -> bool:
    """Whether a pre-processor's transform ends with ImageNet's normalisation."""
    last = transform.transforms[-1] if isinstance(transform, Compose) else transform
    return isinstance(last, Normalize) and [list(last.mean), list(last.std)] == [MEAN, STD]
