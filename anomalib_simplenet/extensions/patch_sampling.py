"""Training on a random share of the patches (not in the paper)."""

import torch


def sample_patches(embedding: torch.Tensor, fraction: float = 1.0) -> torch.Tensor:
    """Draw a share, above 0 and up to 1, of embeddings ``(N, dimension, h, w)`` at random, without replacement.

    Returns ``(patches, dimension)``, at least one patch; all, in order, for a share of 1.
    """
    if fraction == 1:
        return embedding.permute(0, 2, 3, 1).flatten(0, 2)
    images, _, height, width = embedding.shape
    total = images * height * width
    chosen = torch.randperm(total, device=embedding.device)[: max(1, round(fraction * total))]
    place = chosen // images
    return embedding[chosen % images, :, place // width, place % width]
