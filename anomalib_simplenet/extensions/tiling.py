"""Feature maps of large images, one tile after another (not in the paper)."""

from itertools import pairwise
from typing import Any

import torch
from anomalib.data.utils.tiler import Tiler

from anomalib_simplenet.components import FeatureExtractor


def extract_tiles(extractor: FeatureExtractor, images: torch.Tensor, tiler: Tiler | None) -> list[torch.Tensor]:
    """Extract maps of images ``(N, 3, H, W)``, for each layer ``(N, C, h, w)``, one tile at a time; ``None``: at once.

    Each position comes from the tile whose border is farthest, where anomalib's ``Tiler.untile`` takes the mean of all
    tiles, also of those that see padding in place of neighbouring pixels. So maps equal those of the whole image if
    half the overlap covers the receptive field's radius.

    Raises:
        ValueError: If the tiles do not fit the images or the backbone.
    """
    if tiler is None:
        return list(extractor(images).values())
    size, (tile, step) = tuple(images.shape[-2:]), tiler_arguments(tiler).values()
    fits = all(small <= large for small, large in zip(tile, size, strict=True)) and not tiler.remove_border_count
    if not fits or any(length % extractor.stride for length in (*size, *tile, *step)):
        msg = (
            f"Tiles of {tile} with stride {step} and remove_border_count {tiler.remove_border_count} do not fit images "
            f"of {list(size)}: expected tiles no larger than images, sizes that are multiples of {extractor.stride}, "
            "the backbone's stride, and remove_border_count 0. Change TilerConfigurationCallback or the Resize."
        )
        raise ValueError(msg)
    rows, columns = (_spans(*axis, extractor.stride) for axis in zip(size, tile, step, strict=True))
    strips = []
    for top, upper, lower in rows:
        crops = []
        for left, first, last in columns:
            maps = extractor(images[:, :, top : top + tile[0], left : left + tile[1]]).values()
            crops.append([_crop(_crop(each, 2, upper, lower, tile[0]), 3, first, last, tile[1]) for each in maps])
        strips.append([torch.cat(layer, dim=3) for layer in zip(*crops, strict=True)])
    return [torch.cat(layer, dim=2) for layer in zip(*strips, strict=True)]


def tiler_arguments(tiler: Tiler) -> dict[str, Any]:
    """What makes an equal tiler, for a checkpoint."""
    return {"tile_size": [tiler.tile_size_h, tiler.tile_size_w], "stride": [tiler.stride_h, tiler.stride_w]}


def _spans(size: int, tile: int, step: int, unit: int) -> list[tuple[int, int, int]]:
    """Start of each tile along an axis, and what of it to keep: up to the middles of its overlaps, in whole units."""
    starts = [*range(0, size - tile, step), size - tile]
    cuts = [0, *((start + tile + following) // 2 // unit * unit for start, following in pairwise(starts)), size]
    return [(start, first - start, last - start) for start, first, last in zip(starts, cuts, cuts[1:], strict=False)]


def _crop(maps: torch.Tensor, dim: int, first: int, last: int, tile: int) -> torch.Tensor:
    length = maps.shape[dim]
    return maps.narrow(dim, length * first // tile, length * (last - first) // tile)
