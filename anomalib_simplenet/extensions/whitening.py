"""Whitening of embeddings."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Of the mean variance: keeps directions without information from being blown up.
REGULARISATION = 1e-2
LOCAL_REGULARISATION = 1e-3
SMALLEST_VARIANCE = 1e-6  # of the mean square


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
            torch.Tensor: Sum over patches ``x`` of the outer product of ``[1, x]`` with itself: of a batch's in single
            precision, of the batches in double.
        """
        moments = torch.zeros(self.in_features + 1, self.in_features + 1, dtype=torch.float64)
        for embedding in embeddings:
            patches = embedding.float().permute(0, 2, 3, 1).flatten(0, 2)
            extended = nn.functional.pad(patches, (1, 0), value=1.0)
            moments += (extended.T @ extended).cpu()
        return moments

    def fit(self, moments: torch.Tensor) -> None:
        """Take mean and covariance from :meth:`moments`.

        Raises:
            ValueError: If all patches are the same.
        """
        mean = moments[0, 1:] / moments[0, 0]
        covariance = moments[1:, 1:] / moments[0, 0] - torch.outer(mean, mean)
        _check_variance(covariance, mean)
        weight = _inverse_root(covariance, REGULARISATION)
        self.weight.copy_(weight)
        self.bias.copy_(-weight @ mean)
        self.fitted.fill_(True)


class LocalWhitening(nn.Module):
    """Whiten each position of maps of embeddings with a mean and a covariance of its own.

    What is normal differs over the image where all images are taken alike (Padim, arXiv 2011.08785). Each covariance is
    drawn towards the mean of all, the more, the fewer images it was taken from. The identity until :meth:`fit` was
    called; never trained.

    Args:
        dimension (int): Size of a patch embedding.

    Attributes:
        fitted (torch.Tensor): Whether :meth:`fit` was called, bool.
        mean (torch.Tensor): ``(dimension, h, w)``.
        weight (torch.Tensor): A symmetric matrix for each position, row by row, ``(h * w, dimension, dimension)``.
    """

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
                'in training: with whiten "local" all images must have one size. Resize them in the pre_processor; '
                "without one, export with --input_size as in training."
            )
            raise ValueError(msg)
        white = _positions(embedding - self.mean) @ self.weight
        return white.permute(1, 2, 0).reshape(-1, self.out_features, height, width)

    def moments(self, embeddings: Iterable[torch.Tensor]) -> torch.Tensor:
        """Moments of maps; those of several sets add up.

        Args:
            embeddings (Iterable[torch.Tensor]): Of batches, of shape ``(N, dimension, h, w)`` each.

        Returns:
            torch.Tensor: Count of images, and of each position the sum and the sum of outer products, in one row; of a
            batch's in single precision, of the batches in double.
        """
        count, sums, products = 0, torch.zeros(()), torch.zeros(())
        for embedding in embeddings:
            self.mean = self.mean.new_zeros(embedding.shape[1:])
            patches = _positions(embedding.float())
            count += len(embedding)
            sums = sums + embedding.double().sum(dim=0).cpu()
            products = products + (patches.mT @ patches).double().cpu()
        return torch.cat([torch.tensor([count]), sums.flatten(), products.flatten()])

    def fit(self, moments: torch.Tensor) -> None:
        """Take means and covariances from :meth:`moments`.

        Raises:
            ValueError: If they are of one image only, or of images that are all the same.
        """
        if moments[0] < 2:
            msg = 'There is 1 training image, expected 2 or more: whiten "local" compares images. Set whiten to true.'
            raise ValueError(msg)
        count, places = moments[0], self.mean.numel()
        mean = (moments[1 : 1 + places] / count).view(self.mean.shape)
        products = moments[1 + places :].view(-1, self.out_features, self.out_features)
        means = _positions(mean[None])
        local = (products - count * means.mT @ means) / (count - 1)
        share = self.out_features / (self.out_features + 4 * count)
        _check_variance(local, mean)
        shrunk = local.lerp_(local.mean(dim=0), share)
        self.mean = mean.to(self.mean)
        self.weight = torch.stack([_inverse_root(each, LOCAL_REGULARISATION).to(self.weight) for each in shrunk])
        self.fitted.fill_(True)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:  # noqa: ANN401
        for name in ("mean", "weight"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, getattr(self, name).new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _positions(maps: torch.Tensor) -> torch.Tensor:
    """Patches of each position, ``(h * w, N, dimension)``."""
    return maps.flatten(2).permute(2, 0, 1)


def _check_variance(covariance: torch.Tensor, mean: torch.Tensor) -> None:
    """Raise unless patches differ by more than rounding."""
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean()
    if variance <= SMALLEST_VARIANCE * mean.square().mean():
        msg = f"The training images' patches do not differ (mean variance {variance:.3g}): whiten has nothing to go by."
        raise ValueError(msg)


def _inverse_root(covariance: torch.Tensor, regularisation: float) -> torch.Tensor:
    """Inverse square root, symmetric."""
    variance, directions = torch.linalg.eigh(covariance)
    scale = (variance.clamp(min=0) + regularisation * variance.mean()).rsqrt()
    return directions * scale @ directions.T
