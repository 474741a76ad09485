"""Whitening of embeddings with statistics of the training images (not in the paper)."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from anomalib_simplenet.checks import check_number

# Of the mean variance: keeps directions without information from being blown up.
REGULARISATION = 1e-2
LOCAL_REGULARISATION = 1e-3
SMALLEST_VARIANCE = 1e-6  # of the mean square
LARGEST_VARIANCE = 1e30
LARGEST_LOCAL = 2 * 2**30  # bytes; larger weights fit no ONNX file
_CHUNK = 64  # matrices in one call of eigh


class Affine(NamedTuple):
    """``y = weight @ x + bias``."""

    weight: torch.Tensor
    bias: torch.Tensor


class Whitening(nn.Module):
    """Shift and rotate embeddings to mean 0 and covariance 1 over normal patches, so that noise suits any backbone.

    The identity until :meth:`fit` was called; never trained.

    Args:
        dimension (int): Size of a patch embedding.
        local (bool): Whether each position of the grid has a mean and a covariance of its own (Padim, arXiv
            2011.08785). Each covariance is shrunk towards the mean of all, the more, the fewer images it was estimated
            from. Defaults to ``False``.
        components (int | None): Principal components of all patches to keep, ``k`` below; ``None`` for all dimensions,
            as they are. Defaults to ``None``.

    Attributes:
        projection (torch.Tensor): Principal axes, ``(k, dimension)``; the identity without ``components``.
        mean (torch.Tensor): Of components, ``(k, h, w)``; h and w are 1 where all positions share it.
        weight (torch.Tensor): A symmetric matrix for each position, row by row, ``(h * w, k, k)``.
        fitted (torch.Tensor): 1 after :meth:`fit`, else 0. A float, since callbacks that average models average it.
    """

    def __init__(self, dimension: int, local: bool = False, components: int | None = None) -> None:
        super().__init__()
        if components is not None:
            hint = "the size of an embedding, or None for all"
            check_number("components", components, at_least=1, at_most=dimension, integer=True, hint=hint)
        self.dimension, self.local, self.components = dimension, local, components or dimension
        self.mean: torch.Tensor
        self.weight: torch.Tensor
        self.register_buffer("projection", torch.eye(self.components, dimension), persistent=components is not None)
        self.register_buffer("mean", torch.zeros(self.components, 1, 1))
        self.register_buffer("weight", torch.eye(self.components)[None])
        self.register_buffer("fitted", torch.tensor(0.0))
        self.register_load_state_dict_pre_hook(_take_sizes)

    @property
    def affine(self) -> Affine | None:
        """The same map for all positions, ``None`` if each has its own."""
        if len(self.weight) > 1:
            return None
        return Affine(self.weight[0] @ self.projection, -self.weight[0] @ self.mean.flatten())

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Whiten embeddings of shape ``(N, dimension, h, w)``: ``(N, k, h, w)``.

        Raises:
            ValueError: If positions have statistics of their own, and the grid is not the one they were fitted on.
        """
        if self.affine is not None:
            return nn.functional.conv2d(embedding, self.affine.weight[:, :, None, None], self.affine.bias)
        height, width = self.mean.shape[1:]
        if tuple(embedding.shape[-2:]) != (height, width):
            msg = (
                f"The image gives {embedding.shape[2]} x {embedding.shape[3]} patches, expected {height} x {width}, as "
                'in training: with whiten "local" all images must have one size. Resize them in the pre_processor; '
                "without one, export with --input_size as in training."
            )
            raise ValueError(msg)
        white = self.whiten(_positions(self.project(embedding)))
        return white.transpose(0, 1).unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def project(self, embedding: torch.Tensor) -> torch.Tensor:
        """Principal components ``(N, k, h, w)`` of embeddings ``(N, dimension, h, w)``."""
        if self.components == self.dimension:
            return embedding
        return nn.functional.conv2d(embedding, self.projection[:, :, None, None])

    def whiten(self, components: torch.Tensor) -> torch.Tensor:
        """Whiten components of each position, ``(h * w, N, k)``."""
        # PyTorch's product of many small matrices is thirty times as slow where they are not contiguous.
        return (components - _positions(self.mean[None])).contiguous() @ self.weight

    def moments(self, embeddings: Iterable[torch.Tensor]) -> torch.Tensor:
        """Moments of patches; those of several sets add up.

        Args:
            embeddings (Iterable[torch.Tensor]): Of batches, of shape ``(N, dimension, h, w)`` each.

        Returns:
            torch.Tensor: Count, sum and sum of outer products, of shape ``(1 + dimension + dimension**2, h, w)``, where
            h and w are 1 if positions share them: of a batch's in single precision, of the batches in double.

        Raises:
            ValueError: If the matrices would take more than 2 GiB.
        """
        dimension, grid = self.dimension, (1, 1)
        moments = torch.zeros(0, 1 + dimension + dimension**2, dtype=torch.float64)  # a row for each position
        for embedding in embeddings:
            height, width = grid = tuple(embedding.shape[-2:]) if self.local else (1, 1)
            size = height * width * dimension**2 * 4
            if size > LARGEST_LOCAL:
                msg = (
                    f'whiten is "local", whose {height} x {width} matrices of {dimension} x {dimension} take '
                    f"{size / 2**30:.1f} GiB, expected at most {LARGEST_LOCAL / 2**30:.0f} GiB: lower the image size "
                    "or target_embed_dimension, for those of map_layer set that to null, or set whiten to true."
                )
                raise ValueError(msg)
            patches = _positions(embedding.float())  # positions, N, dimension
            patches = patches if self.local else patches.flatten(0, 1)[None]
            if not len(moments):
                moments = moments.new_zeros(len(patches), moments.shape[1])
            moments[:, 0] += patches.shape[1]
            moments[:, 1 : 1 + dimension] += patches.double().sum(dim=1).cpu()
            moments[:, 1 + dimension :] += (patches.mT @ patches).flatten(1).cpu()
        return moments.mT.unflatten(1, grid).contiguous()

    def fit(self, moments: torch.Tensor) -> None:
        """Take means and covariances from :meth:`moments`.

        Raises:
            ValueError: If they are of one patch a position, of patches that are all the same, or too large.
        """
        count, dimension = moments[0, 0, 0], self.dimension
        if count < 2:
            msg = 'There is 1 training image, expected 2 or more: whiten "local" compares images. Set whiten to true.'
            raise ValueError(msg)
        mean = moments[1 : 1 + dimension] / count
        products = moments[1 + dimension :].flatten(1).mT.unflatten(1, (dimension, dimension))
        means = _positions(mean[None])
        covariance = (products - count * means.mT @ means) / (count - 1)
        _check_variance(covariance, mean)
        if self.components < dimension:
            differences = means[:, 0] - means[:, 0].mean(dim=0)  # between the positions
            total = covariance.mean(dim=0) + differences.mT @ differences / len(differences)
            axes = torch.linalg.eigh(total).eigenvectors[:, -self.components :].mT
            mean, covariance = torch.einsum("kd,dhw->khw", axes, mean), axes @ covariance @ axes.mT
            self.projection.copy_(axes)
        if self.local:
            covariance.lerp_(covariance.mean(dim=0), self.components / (self.components + 4 * count))
        regularisation = LOCAL_REGULARISATION if self.local else REGULARISATION
        roots = [_inverse_root(chunk, regularisation) for chunk in covariance.split(_CHUNK)]
        self.mean, self.weight = mean.to(self.mean), torch.cat(roots).to(self.weight)
        self.fitted.fill_(1.0)


def _take_sizes(whitening: Whitening, state_dict: dict[str, torch.Tensor], prefix: str, *_args: object) -> None:
    """Let mean and weight have the sizes of the grid that a checkpoint was trained on."""
    for name in ("mean", "weight"):
        if prefix + name in state_dict:
            setattr(whitening, name, getattr(whitening, name).new_zeros(state_dict[prefix + name].shape))


def _positions(maps: torch.Tensor) -> torch.Tensor:
    """Patches of each position, ``(h * w, N, dimension)``."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2).transpose(0, 1)


def _check_variance(covariance: torch.Tensor, mean: torch.Tensor) -> None:
    """Raise unless the patches are finite and differ by more than rounding."""
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean()
    if not variance < LARGEST_VARIANCE:
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
