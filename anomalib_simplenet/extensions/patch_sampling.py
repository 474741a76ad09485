"""Training on a random share of the patches (not in the paper)."""

import torch


def sample_patches(
    embedding: torch.Tensor, fraction: float = 1.0, counting: torch.Tensor | None = None
) -> torch.Tensor:
    """Draw a share, above 0 and up to 1, of embeddings ``(N, dimension, h, w)`` at random, without replacement.

    From the places where ``counting``, booleans ``(h, w)``, is true, or all. Returns ``(patches, dimension)``, at least
    one patch; all, in order, for a share of 1 of all places.
    """
    if fraction == 1 and counting is None:
        return embedding.permute(0, 2, 3, 1).flatten(0, 2)
    images, _, height, width = embedding.shape
    counting = embedding.new_ones((height, width)) if counting is None else counting
    rows, columns = counting.nonzero().T
    total = images * len(rows)
    chosen = torch.randperm(total, device=embedding.device)[: max(1, round(fraction * total))]
    place = chosen // images
    return embedding[chosen % images, :, rows[place], columns[place]]
