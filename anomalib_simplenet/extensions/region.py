"""The part of the image that counts, for a fixed camera (not in the paper)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_simplenet.components.ops import power

SMALLEST_SHARE = 1e-6  # of a pixel in one that it is resized to


class Region(nn.Module):
    """Pixels of the model's input that count; part of the checkpoint.

    The others get one colour before the backbone sees them, and so change nothing, however far it sees. A pixel to
    which resizing adds others that do not count does not count either. A patch counts if any pixel of its cell of the
    grid does.

    Args:
        mask (torch.Tensor): 1 for pixels that count, 0 for the others, ``(1, 1, H, W)``. Of floats, since callbacks
            that average models average it.
        aspect_ratio (torch.Tensor): Width by height of the camera's images, scalar.
    """

    def __init__(self, mask: torch.Tensor, aspect_ratio: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("aspect_ratio", aspect_ratio)

    @classmethod
    def read(cls, path: Path | str, pre_processor: nn.Module | None) -> Region:
        """Read a mask image and resize and crop it as the pre-processor does images.

        Raises:
            ValueError: If there is no such image, nothing in it counts, or the pre-processor is not anomalib's.
        """
        if pre_processor is not None and not isinstance(pre_processor, PreProcessor):
            msg = f"region is {str(path)!r}, which needs a pre_processor of anomalib's class PreProcessor to resize it."
            raise ValueError(msg)
        try:
            with Image.open(Path(path)) as image:
                mode = image.mode
                outside = torch.from_numpy(np.asarray(image.convert("L")) <= 127).float().expand(1, 3, -1, -1)
                aspect_ratio = torch.tensor(image.width / image.height)
        except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
            msg = f"region is {str(path)!r}, expected an image, white where pixels count: {error}."
            raise ValueError(msg) from error
        if mode.startswith(("I", "F")):
            msg = f"region is {str(path)!r}, which has more than 8 bits a pixel: save it with 8."
            raise ValueError(msg)
        mask = outside[:, :1] == 0
        if pre_processor is not None and pre_processor.transform is not None:
            change = pre_processor.transform(outside) - pre_processor.transform(torch.zeros_like(outside))
            mask = (change.abs() < SMALLEST_SHARE).all(dim=1, keepdim=True)
        if not mask.any():
            msg = (
                f"region is {str(path)!r}, which has no white pixel (above 127) in the part of the image that the "
                "pre_processor keeps, or none whose neighbours, with which it is resized, are white: paint white what "
                "counts."
            )
            raise ValueError(msg)
        return cls(mask.float(), aspect_ratio)

    def check_equal(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Refuse a checkpoint's state dict that was trained with another region, or none."""
        saved = state_dict.get("model.region.mask")
        if saved is None or not torch.equal(saved.cpu(), self.mask):
            other = "no" if saved is None else "another"
            msg = f"The checkpoint was trained with {other} region: leave region out to take its own, or train again."
            raise ValueError(msg)

    def fill(self, images: torch.Tensor) -> torch.Tensor:
        """Replace pixels outside in images ``(N, 3, H, W)`` by zero, ImageNet's mean colour where normalised."""
        if images.shape[-2:] != self.mask.shape[-2:]:
            sizes = ", but region for ".join("{} x {}".format(*each.shape[-2:]) for each in (images, self.mask))
            msg = f"Images are {sizes}: give the pre_processor a Resize to (height, width), or draw region so."
            raise ValueError(msg)
        return torch.where(self.mask > 0, images, torch.zeros_like(images))

    def inside(self, grid: tuple[int, int] | torch.Size) -> torch.Tensor:
        """Which patches of a grid ``(h, w)`` count: booleans of that shape."""
        return F.adaptive_avg_pool2d(self.mask, tuple(grid))[0, 0] > 0

    def summarise(
        self,
        grids: Sequence[torch.Tensor],
        top_patches: int,
        make_map: Callable[[torch.Tensor, torch.Size], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image scores ``(N,)`` and anomaly maps ``(N, 1, H, W)`` from scores ``(N, 1, h, w)`` of the patches inside.

        The score is the mean of the ``top_patches`` highest of the first grid, or of all where fewer count. The map is
        the sum over all grids of their weighted means, with the weights that resizing and smoothing (``make_map``) give
        them: patches outside neither raise nor lower it. Pixels outside are minus infinity, which no threshold marks.
        """
        inside, size = self.inside(grids[0].shape[-2:]), self.mask.shape[-2:]
        flat = grids[0].masked_fill(~inside, -torch.inf).flatten(1)
        highest = flat.topk(min(top_patches, flat.shape[1]), dim=1).values
        found = highest > -torch.inf
        count = inside[None].flatten(1).sum(dim=1, keepdim=True).clamp(max=highest.shape[1]).to(highest)  # (1, 1)
        score = (highest.masked_fill(~found, 0.0) * power(count, -1, highest.shape[1])).sum(dim=1)
        maps = []
        for scores in grids:
            inside = self.inside(scores.shape[-2:])
            weight = make_map(inside.to(scores)[None, None], size).clamp(min=1e-6)  # larger inside
            maps.append(make_map(scores.masked_fill(~inside, 0.0), size) * power(weight, -1))
        return score, reduce(torch.add, maps).masked_fill(self.mask == 0, -torch.inf)


def load_region(model: Any, state_dict: Mapping[str, torch.Tensor], prefix: str, *_args: object) -> None:  # noqa: ANN401
    """Give a model the region of a state dict that it is about to load."""
    if (mask := state_dict.get(f"{prefix}region.mask")) is not None:
        like = next(model.parameters())
        model.region = Region(like.new_zeros(mask.shape), like.new_ones(()))
