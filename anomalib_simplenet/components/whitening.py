"""Whitening of embeddings."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

REGULARISATION = 1e-2  # of the mean variance: keeps directions without information from being blown up


class Whitening(nn.Linear):
    """Shift and rotate embeddings to mean 0 and covariance 1 over normal patches, so that noise suits any backbone.

    The identity until :meth:`fit` was called; never trained.

    Args:
        dimension (int): Size of a patch embedding.

    Attributes:
        fitted (torch.Tensor): Whether :meth:`fit` was called, bool.
    """

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
        weight = _inverse_root(covariance)
        self.weight.copy_(weight)
        self.bias.copy_(-weight @ mean)
        self.fitted.fill_(True)


class LocalWhitening(nn.Module):
    """Whiten maps of embeddings with a mean of each position and a covariance of each block of positions.

    What is normal differs over the image where all images are taken alike (Padim, arXiv 2011.08785). A block's
    covariance is drawn towards that of all blocks the more, the fewer patches it was taken from. The identity until
    :meth:`fit` was called; never trained.

    Args:
        dimension (int): Size of a patch embedding.

    Attributes:
        fitted (torch.Tensor): Whether :meth:`fit` was called, bool.
        mean (torch.Tensor): ``(dimension, h, w)``.
        weight (torch.Tensor): A symmetric matrix for each block, row by row, ``(blocks, dimension, dimension)``.
    """

    BLOCK = 2  # positions a side

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.out_features = dimension
        self.fitted: torch.Tensor
        self.mean: torch.Tensor
        self.weight: torch.Tensor
        self.register_buffer("fitted", torch.tensor(False))
        # Their sizes are those of the images seen first.
        self.register_buffer("mean", torch.zeros(dimension, 0, 0))
        self.register_buffer("weight", torch.zeros(0, dimension, dimension))

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Whiten.

        Args:
            embedding (torch.Tensor): Maps of shape ``(N, dimension, h, w)``.

        Returns:
            torch.Tensor: Of the same shape.

        Raises:
            ValueError: If the grid is not the one it was fitted on.
        """
        if not len(self.weight):
            return embedding
        height, width = self.mean.shape[1:]
        if tuple(embedding.shape[-2:]) != (height, width):
            msg = (
                f"The image gives {embedding.shape[2]} x {embedding.shape[3]} patches, expected {height} x {width}, as "
                'in training: with whiten "local" all images must have one size. Resize them in the pre_processor.'
            )
            raise ValueError(msg)
        white = self._blocks(embedding - self.mean) @ self.weight
        rows, columns, block = -(-height // self.BLOCK), -(-width // self.BLOCK), self.BLOCK
        white = white.view(rows, columns, -1, block, block, self.out_features).permute(2, 5, 0, 3, 1, 4)
        return white.reshape(-1, self.out_features, rows * block, columns * block)[..., :height, :width]

    def _blocks(self, maps: torch.Tensor) -> torch.Tensor:
        """Patches of each block, ``(blocks, N * BLOCK * BLOCK, dimension)``; zeros fill up those at the border."""
        block = self.BLOCK
        height, width = maps.shape[-2:]
        maps = F.pad(maps, (0, -width % block, 0, -height % block))
        rows, columns = maps.shape[2] // block, maps.shape[3] // block
        maps = maps.view(-1, self.out_features, rows, block, columns, block).permute(2, 4, 0, 3, 5, 1)
        return maps.reshape(rows * columns, -1, self.out_features)

    def moments(self, embeddings: Iterable[torch.Tensor]) -> torch.Tensor:
        """Moments of maps; those of several sets add up.

        Args:
            embeddings (Iterable[torch.Tensor]): Of batches, of shape ``(N, dimension, h, w)`` each.

        Returns:
            torch.Tensor: Count of images, sum of each position and sum of outer products of each block, in one row and
            double precision.
        """
        count, sums, products = 0, torch.zeros(()), torch.zeros(())
        for embedding in embeddings:
            self.mean = self.mean.new_zeros(embedding.shape[1:])
            patches = self._blocks(embedding.float())
            count += len(embedding)
            sums = sums + embedding.double().sum(dim=0).cpu()
            products = products + (patches.mT @ patches).double().cpu()
        return torch.cat([torch.tensor([count]), sums.flatten(), products.flatten()])

    def fit(self, moments: torch.Tensor) -> None:
        """Take means and covariances from :meth:`moments`.

        Raises:
            ValueError: If they are of one image only.
        """
        if moments[0] < 2:
            msg = 'There is 1 training image, expected 2 or more: whiten "local" compares images. Set whiten to true.'
            raise ValueError(msg)
        count, places = moments[0], self.mean.numel()
        mean = (moments[1 : 1 + places] / count).view(self.mean.shape)
        products = moments[1 + places :].view(-1, self.out_features, self.out_features)
        means = self._blocks(mean[None])  # blocks, positions, dimension
        inside = self._blocks(torch.ones_like(mean)[None])[..., 0].sum(dim=1)[:, None, None]  # positions of a block
        scatter = products - count * means.mT @ means
        samples = (count - 1) * inside
        covariance = scatter.sum(dim=0) / samples.sum()
        share = self.out_features / (self.out_features + samples)
        local = (1 - share) * scatter / samples + share * covariance
        self.mean = mean.to(self.mean)
        self.weight = torch.stack([_inverse_root(each) for each in local]).to(self.weight)
        self.fitted.fill_(True)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:  # noqa: ANN401
        for name in ("mean", "weight"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, getattr(self, name).new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _inverse_root(covariance: torch.Tensor) -> torch.Tensor:
    """Inverse square root, symmetric."""
    variance, directions = torch.linalg.eigh(covariance)
    scale = (variance.clamp(min=0) + REGULARISATION * variance.mean()).rsqrt()
    return directions * scale @ directions.T
