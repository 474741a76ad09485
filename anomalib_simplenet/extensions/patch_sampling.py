"""Training on a random share of the patches (not in the paper)."""

import torch

from .region import Region


def sample_patches(embedding: torch.Tensor, fraction: float = 1.0, region: Region | None = None) -> torch.Tensor:
    """Draw a share, above 0 and up to 1, of embeddings ``(N, dimension, h, w)`` at random, without replacement.

    Returns ``(patches, dimension)``, at least one patch; all, in order, for a share of 1. With a region, of its patches
    alone.
    """
    if fraction == 1 and region is None:
        return embedding.permute(0, 2, 3, 1).flatten(0, 2)
    images, _, height, width = embedding.shape
    places = torch.arange(height * width, device=embedding.device)
    if region is not None:
        places = places[region.inside((height, width)).flatten()]
    total = images * len(places)
    chosen = torch.randperm(total, device=embedding.device)[: max(1, round(fraction * total))]
    place = places[chosen // images]
    return embedding[chosen % images, :, place // width, place % width]
