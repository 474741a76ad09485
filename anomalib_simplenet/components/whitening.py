"""Whitening of embeddings."""

from collections.abc import Iterable

import torch
from torch import nn


class Whitening(nn.Linear):
    """Shift and rotate embeddings to mean 0 and covariance 1 over normal patches, so that noise suits any backbone.

    The identity until :meth:`fit` was called; never trained.

    Args:
        dimension (int): Size of a patch embedding.

    Attributes:
        fitted (torch.Tensor): Whether :meth:`fit` was called, bool.
    """

    REGULARISATION = 1e-2  # of the mean variance: keeps directions without information from being blown up

    def __init__(self, dimension: int) -> None:
        super().__init__(dimension, dimension)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)
        self.requires_grad_(requires_grad=False)
        self.fitted: torch.Tensor
        self.register_buffer("fitted", torch.tensor(False))

    def moments(self, embeddings: Iterable[torch.Tensor]) -> torch.Tensor:
        """Count, sum and second moments of patches; those of several sets add up.

        Args:
            embeddings (Iterable[torch.Tensor]): Of batches, of shape ``(N, dimension, h, w)`` each.

        Returns:
            torch.Tensor: Sum over patches ``x`` of the outer product of ``[1, x]`` with itself, in double precision.
        """
        moments = torch.zeros(self.in_features + 1, self.in_features + 1, dtype=torch.float64)
        for embedding in embeddings:
            patches = embedding.float().permute(0, 2, 3, 1).flatten(0, 2)
            extended = nn.functional.pad(patches, (1, 0), value=1.0)
            moments += (extended.T @ extended).cpu()
        return moments

    def fit(self, moments: torch.Tensor) -> None:
        """Take mean and covariance from :meth:`moments`."""
        mean = moments[0, 1:] / moments[0, 0]
        covariance = moments[1:, 1:] / moments[0, 0] - torch.outer(mean, mean)
        variance, directions = torch.linalg.eigh(covariance)
        scale = (variance.clamp(min=0) + self.REGULARISATION * variance.mean()).rsqrt()
        weight = directions * scale @ directions.T
        self.weight.copy_(weight)
        self.bias.copy_(-weight @ mean)
        self.fitted.fill_(True)
