"""Training on a random share of the patches (not in the paper)."""

import torch


def sample_patches(embedding: torch.Tensor, fraction: float = 1.0) -> torch.Tensor:
    """Draw patches of a batch at random, without replacement.

    Args:
        embedding (torch.Tensor): Patch embeddings of shape ``(N, dimension, h, w)``.
        fraction (float): Share of the ``N * h * w`` patches, above 0 and up to 1. Defaults to ``1.0``: all, in order.

    Returns:
        torch.Tensor: Patches of shape ``(patches, dimension)``, at least one.
    """
    if fraction == 1:
        return embedding.permute(0, 2, 3, 1).flatten(0, 2)
    images, _, height, width = embedding.shape
    total = images * height * width
    chosen = torch.randperm(total, device=embedding.device)[: max(1, round(fraction * total))]
    place = chosen // images
    return embedding[chosen % images, :, place // width, place % width]
