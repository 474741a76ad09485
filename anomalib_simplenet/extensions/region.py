"""The part of the image that counts, for a fixed camera (not in the paper)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.pre_processing import PreProcessor
from PIL import Image, UnidentifiedImageError
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.tv_tensors import Mask


class Region(nn.Module):
    """Pixels of the model's input that count; part of the checkpoint.

    The pixels outside get one colour before the backbone sees them. So they change nothing, however large its receptive
    field. A patch counts if a pixel of its cell of the grid does.

    Args:
        mask (torch.Tensor): 1 for pixels that count, 0 for the others, ``(1, 1, H, W)``, some of them 1. Of floats,
            since callbacks that average models average it.
        aspect_ratio (torch.Tensor): Width by height of the images before the pre-processor, scalar.
    """

    def __init__(self, mask: torch.Tensor, aspect_ratio: torch.Tensor) -> None:
        super().__init__()
        self.mask: torch.Tensor
        self.aspect_ratio: torch.Tensor
        self.register_buffer("mask", mask)
        self.register_buffer("aspect_ratio", aspect_ratio)

    @classmethod
    def read(cls, path: Path | str, pre_processor: nn.Module | None) -> Region:
        """Read a mask image and resize and crop it as the pre-processor does images.

        Raises:
            ValueError: If there is no such image, nothing in it counts, or the pre-processor is not anomalib's.
        """
        if pre_processor is not None and not isinstance(pre_processor, PreProcessor):
            msg = f"region is {str(path)!r}, but pre_processor is no PreProcessor of anomalib's, which would resize it."
            raise ValueError(msg)
        try:
            with Image.open(path) as image:
                white = torch.from_numpy(np.asarray(image.convert("L")) > 127)
        except (OSError, UnidentifiedImageError) as error:
            msg = f"region is {str(path)!r}, expected the path of an image, white where pixels count: {error}."
            raise ValueError(msg) from error
        mask: torch.Tensor = Mask(white[None])
        if pre_processor is not None and pre_processor.transform is not None:
            mask = pre_processor.transform(mask)
        if not mask.any():
            msg = (
                f"region is {str(path)!r}, which has no white pixel (above 127) in the part of the image that the "
                "pre_processor keeps: paint white what counts."
            )
            raise ValueError(msg)
        height, width = white.shape
        return cls(mask.as_subclass(torch.Tensor)[None].float(), torch.tensor(width / height))

    def check_equal(self, state_dict: Mapping[str, torch.Tensor], prefix: str) -> None:
        """Refuse a checkpoint that was trained with another region, or none.

        Raises:
            ValueError: If the state dict's region differs.
        """
        saved = state_dict.get(f"{prefix}region.mask")
        if saved is None or not torch.equal(saved.cpu(), self.mask.cpu()):
            other = "no" if saved is None else "another"
            msg = f"The checkpoint was trained with {other} region: leave region out to take its own, or train again."
            raise ValueError(msg)

    def fill(self, images: torch.Tensor) -> torch.Tensor:
        """Replace the pixels outside in images ``(N, 3, H, W)`` by zero, ImageNet's mean colour where normalised.

        Raises:
            ValueError: If images have another size than the mask.
        """
        if images.shape[-2:] != self.mask.shape[-2:]:
            (height, width), (own_height, own_width) = images.shape[-2:], self.mask.shape[-2:]
            msg = (
                f"Images are {height} x {width}, but the region is for {own_height} x {own_width}: give the "
                "pre_processor a Resize to (height, width), or draw the region in the images' size."
            )
            raise ValueError(msg)
        return torch.where(self.mask > 0, images, torch.zeros_like(images))

    def inside(self, grid: tuple[int, int] | torch.Size) -> torch.Tensor:
        """Which patches of a grid ``(h, w)`` count: booleans ``(1, h, w)``."""
        return inside(self.mask, grid)

    def summarise(
        self,
        patch_scores: torch.Tensor,
        top_patches: int,
        make_map: Callable[[torch.Tensor, torch.Size], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image scores and anomaly maps of the patches that count.

        The map is a weighted mean of their scores, with the weights that resizing and smoothing give them: patches
        outside neither raise nor lower it. Pixels outside are minus infinity, which no threshold marks.

        Args:
            patch_scores (torch.Tensor): Anomaly scores, ``(N, 1, h, w)``.
            top_patches (int): Number of highest scores in an image's; all where fewer patches count.
            make_map (Callable): Resizes and smooths: :class:`AnomalyMapGenerator`.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Scores ``(N,)`` and maps ``(N, 1, H, W)``.
        """
        inside = self.inside(patch_scores.shape[-2:])[None]
        size = self.mask.shape[-2:]
        scores = patch_scores.masked_fill(~inside, -torch.inf).flatten(1)
        highest = scores.topk(min(top_patches, scores.shape[1]), dim=1).values
        counting = highest > -torch.inf
        score = highest.masked_fill(~counting, 0.0).sum(dim=1) * _inverse(counting.to(highest).sum(dim=1))
        weight = make_map(inside.to(patch_scores), size)  # positive inside
        anomaly_map = make_map(patch_scores.masked_fill(~inside, 0.0), size) * _inverse(weight.clamp(min=1e-6))
        return score, anomaly_map.masked_fill(self.mask == 0, -torch.inf)


def inside(mask: torch.Tensor, grid: tuple[int, int] | torch.Size) -> torch.Tensor:
    """Which cells of a grid ``(h, w)`` have a pixel in masks ``(N, 1, H, W)``: booleans ``(N, h, w)``."""
    return F.adaptive_avg_pool2d(mask, tuple(grid))[:, 0] > 0


def load_region(model: Any, state_dict: Mapping[str, torch.Tensor], prefix: str, *_args: object) -> None:  # noqa: ANN401
    """Give a model the region of a state dict that it is about to load."""
    if (mask := state_dict.get(f"{prefix}region.mask")) is not None:
        like = next(model.parameters())
        model.region = Region(like.new_zeros(mask.shape), like.new_ones(()))


def _inverse(values: torch.Tensor) -> torch.Tensor:
    return values.pow(torch.full_like(values, -1.0))  # a quotient is not computed in float32 in exported models
