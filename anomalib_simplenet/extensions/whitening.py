"""Whitening of embeddings with statistics of the training images (not in the paper)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Of the mean variance: keeps directions without information from being blown up.
REGULARISATION = 1e-2
LOCAL_REGULARISATION = 1e-3
SMALLEST_VARIANCE = 1e-6  # of the mean square
LARGEST_LOCAL = 2 * 2**30  # bytes; larger weights fit no ONNX file
_CHUNK = 64  # matrices in one call of eigh


class Whitening(nn.Module):
    """Shift and rotate embeddings to mean 0 and covariance 1 over normal patches, so that noise suits any backbone.

    The identity until :meth:`fit` was called; never trained.

    Args:
        dimension (int): Size of a patch embedding.

    Attributes:
        weight (torch.Tensor): ``(dimension, dimension)``.
        bias (torch.Tensor): ``(dimension,)``.
        fitted (torch.Tensor): 1 after :meth:`fit`, else 0. A float, since callbacks that average models average it.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.dimension = dimension
        self.weight: torch.Tensor
        self.bias: torch.Tensor
        self.fitted: torch.Tensor
        self.register_buffer("weight", torch.eye(dimension))
        self.register_buffer("bias", torch.zeros(dimension))
        self.register_buffer("fitted", torch.tensor(0.0))

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Whiten embeddings of shape ``(N, dimension, h, w)``; shape as given."""
        return nn.functional.conv2d(embedding, self.weight[:, :, None, None], self.bias)

    def moments(self, embeddings: Iterable[torch.Tensor]) -> torch.Tensor:
        """Count, sum and second moments of patches; those of several sets add up.

        Args:
            embeddings (Iterable[torch.Tensor]): Of batches, of shape ``(N, dimension, h, w)`` each.

        Returns:
            torch.Tensor: Sum over patches ``x`` of the outer product of ``[1, x]`` with itself: of a batch's in single
            precision, of the batches in double.
        """
        moments = torch.zeros(self.dimension + 1, self.dimension + 1, dtype=torch.float64)
        for embedding in embeddings:
            patches = embedding.float().permute(0, 2, 3, 1).flatten(0, 2)
            extended = nn.functional.pad(patches, (1, 0), value=1.0)
            moments += (extended.T @ extended).cpu()
        return moments

    def fit(self, moments: torch.Tensor) -> None:
        """Take mean and covariance from :meth:`moments`.

        Raises:
            ValueError: If the patches do not differ, or are too large for a covariance.
        """
        mean = moments[0, 1:] / moments[0, 0]
        covariance = moments[1:, 1:] / moments[0, 0] - torch.outer(mean, mean)
        _check_variance(covariance, mean)
        weight = _inverse_root(covariance, REGULARISATION)
        self.weight.copy_(weight)
        self.bias.copy_(-weight @ mean)
        self.fitted.fill_(1.0)


class LocalWhitening(nn.Module):
    """Whiten each position of maps of embeddings with a mean and a covariance of its own (Padim, arXiv 2011.08785).

    For parts in a fixed position. Each covariance is shrunk towards the mean of all, the more, the fewer images it was
    estimated from. The identity until :meth:`fit` was called; never trained.

    Args:
        dimension (int): Size of a patch embedding.

    Attributes:
        fitted (torch.Tensor): 1 after :meth:`fit`, else 0.
        mean (torch.Tensor): ``(dimension, h, w)``.
        weight (torch.Tensor): A symmetric matrix for each position, row by row, ``(h * w, dimension, dimension)``.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.dimension = dimension
        self.fitted: torch.Tensor
        self.mean: torch.Tensor
        self.weight: torch.Tensor
        self.register_buffer("fitted", torch.tensor(0.0))
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
        return white.permute(1, 2, 0).reshape(-1, self.dimension, height, width)

    def moments(self, embeddings: Iterable[torch.Tensor]) -> torch.Tensor:
        """Moments of maps; those of several sets add up.

        Args:
            embeddings (Iterable[torch.Tensor]): Of batches, of shape ``(N, dimension, h, w)`` each.

        Returns:
            torch.Tensor: Of each position the count of images, the sum and the sum of outer products, of shape
            ``(1 + dimension + dimension**2, h, w)``: of a batch's in single precision, of the batches in double.

        Raises:
            ValueError: If the matrices would take more than 2 GiB.
        """
        moments = torch.zeros(())
        for embedding in embeddings:
            _, _, height, width = embedding.shape
            size = height * width * self.dimension**2 * 4
            if size > LARGEST_LOCAL:
                msg = (
                    f'whiten is "local", whose {height} x {width} matrices of {self.dimension} x {self.dimension} take '
                    f"{size / 2**30:.1f} GiB, expected at most {LARGEST_LOCAL / 2**30:.0f} GiB: lower "
                    "target_embed_dimension or the image size, or set whiten to true."
                )
                raise ValueError(msg)
            patches = _positions(embedding.float())
            products = (patches.mT @ patches).flatten(1).mT.unflatten(1, (height, width))
            count = torch.full((1, height, width), len(embedding))
            moments = moments + torch.cat([count, embedding.double().sum(dim=0).cpu(), products.double().cpu()])
        return moments

    def fit(self, moments: torch.Tensor) -> None:
        """Take means and covariances from :meth:`moments`.

        Raises:
            ValueError: If they are of one image only, of images that are all the same, or too large.
        """
        count, dimension = moments[0, 0, 0], self.dimension
        if count < 2:
            msg = 'There is 1 training image, expected 2 or more: whiten "local" compares images. Set whiten to true.'
            raise ValueError(msg)
        mean = moments[1 : 1 + dimension] / count
        products = moments[1 + dimension :].flatten(1).mT.unflatten(1, (dimension, dimension))
        means = _positions(mean[None])
        local = (products - count * means.mT @ means) / (count - 1)
        share = dimension / (dimension + 4 * count)
        _check_variance(local, mean)
        shrunk = local.lerp_(local.mean(dim=0), share)
        weight = torch.cat(
            [_inverse_root(chunk, LOCAL_REGULARISATION).to(self.weight) for chunk in shrunk.split(_CHUNK)]
        )
        self.mean, self.weight = mean.to(self.mean), weight
        self.fitted.fill_(1.0)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:  # noqa: ANN401
        for name in ("mean", "weight"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, getattr(self, name).new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def make_whitening(whiten: bool | str, dimension: int) -> Whitening | LocalWhitening | None:
    """Whitening for ``True``, local whitening for ``"local"``, neither for ``False``."""
    if not (isinstance(whiten, bool) or whiten == "local"):
        msg = f"whiten is {whiten!r}, expected True, False or 'local'."
        raise ValueError(msg)
    if not whiten:
        return None
    return LocalWhitening(dimension) if whiten == "local" else Whitening(dimension)


def _positions(maps: torch.Tensor) -> torch.Tensor:
    """Patches of each position, ``(h * w, N, dimension)``."""
    return maps.flatten(2).permute(2, 0, 1)


def _check_variance(covariance: torch.Tensor, mean: torch.Tensor) -> None:
    """Raise unless the patches are finite and differ by more than rounding."""
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean()
    if not covariance.isfinite().all() or variance > 1e30:
        msg = (
            f"The training images' patches are too large to whiten (mean variance {variance:.3g}): check the "
            "backbone's weights, and that pixels are normalised."
        )
        raise ValueError(msg)
    if variance <= SMALLEST_VARIANCE * mean.square().mean():
        msg = (
            f"The training images' patches have no variance (mean {variance:.3g}), expected images that differ: give "
            "other images, or set whiten to false."
        )
        raise ValueError(msg)


def _inverse_root(covariance: torch.Tensor, regularisation: float) -> torch.Tensor:
    """Inverse square root of symmetric matrices ``(..., dimension, dimension)``, itself symmetric."""
    variance, directions = torch.linalg.eigh(covariance)
    scale = (variance.clamp(min=0) + regularisation * variance.mean(dim=-1, keepdim=True)).rsqrt()
    return (directions * scale[..., None, :]) @ directions.mT
