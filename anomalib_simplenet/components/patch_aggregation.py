"""Patch aggregation as one fixed convolution a layer."""

from collections.abc import Iterable, Iterator, Sequence
from math import gcd

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_simplenet.checks import check_number

from .ops import add, resize


class PatchAggregation(nn.Module):
    """Pool the neighbourhood of each position of several feature maps into one patch embedding (paper, section 3.1).

    The authors unfold each map into ``patch_size x patch_size`` patches, average-pool each flattened patch (channel,
    row, column) to ``pretrain_embed_dimension``, resize the grids of all layers to that of the first, concatenate, and
    average-pool to ``target_embed_dimension``. Both poolings are linear and commute with the resize. So each layer
    needs one fixed convolution on its own grid, whose few non-zero weights fall into groups, and then the resize.

    Args:
        channels (Sequence[int]): Channels of each layer's map.
        patch_size (int): Side of the neighbourhood, odd. Defaults to ``3``.
        pretrain_embed_dimension (int | None): What each layer is pooled to; ``None`` for its own number of channels,
            which leaves each channel's mean over the neighbourhood. Defaults to ``1536``.
        target_embed_dimension (int): Size of the embedding. Defaults to ``1536``.

    Attributes:
        segments (list[slice]): The part of the embedding that each layer contributes to. Where a pooling window reaches
            over the border between two layers, their segments overlap and their contributions add up.

    Raises:
        ValueError: If ``patch_size`` is no odd integer of at least 1, or a dimension no integer of at least 1.
    """

    def __init__(
        self,
        channels: Sequence[int],
        patch_size: int = 3,
        pretrain_embed_dimension: int | None = 1536,
        target_embed_dimension: int = 1536,
    ) -> None:
        super().__init__()
        check_number("patch_size", patch_size, at_least=1, integer=True, hint="and odd (the paper's is 3)")
        if patch_size % 2 == 0:
            msg = f"patch_size is {patch_size}, expected an odd integer, such as 3 (the paper's)."
            raise ValueError(msg)
        if pretrain_embed_dimension is not None:
            check_number("pretrain_embed_dimension", pretrain_embed_dimension, at_least=1, integer=True)
        check_number("target_embed_dimension", target_embed_dimension, at_least=1, integer=True)
        self.dimension, self.padding = target_embed_dimension, patch_size // 2
        self.segments: list[slice] = []
        self.groups: list[int] = []

        sizes = [pretrain_embed_dimension or layer_channels for layer_channels in channels]
        layers = _pooling_matrix(sum(sizes), target_embed_dimension).split(sizes, dim=1)
        for index, (layer_channels, size, columns) in enumerate(zip(channels, sizes, layers, strict=True)):
            rows = columns.any(dim=1).nonzero()
            segment = slice(int(rows[0]), int(rows[-1]) + 1)
            weight = columns[segment].to_sparse() @ _pooling_matrix(layer_channels * patch_size**2, size)
            groups, weight = _group(weight.reshape(-1, layer_channels, patch_size, patch_size))
            self.segments.append(segment)
            identity = weight.shape == (layer_channels, 1, 1, 1) and bool((weight == 1).all())
            self.groups.append(0 if identity else groups)
            # Fixed by the arguments, so no part of a checkpoint.
            self.register_buffer(f"weight_{index}", weight.float(), persistent=False)

    def pool(self, features: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Each layer's contribution to the embedding, ``(N, size of its segment, h, w)``; one by one, to save memory.

        Takes the map of each layer, ``(N, C, h, w)`` with sizes of its own, which its contribution keeps.
        """
        for index, (feature, groups) in enumerate(zip(features, self.groups, strict=True)):
            weight = getattr(self, f"weight_{index}")
            yield F.conv2d(feature, weight, padding=self.padding, groups=groups) if groups else feature

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed patches of maps as :meth:`pool` takes: ``(N, target_embed_dimension, h, w)`` on the first grid."""
        grid = features[0].shape[-2:]
        pooled = [resize(contribution, grid) for contribution in self.pool(features)]
        stops = [segment.stop for segment in self.segments]
        if all(segment.start == stop for segment, stop in zip(self.segments, [0, *stops], strict=False)):
            return torch.cat(pooled, dim=1)
        # A window reaches over the border between two layers: F.pad puts each contribution in its place.
        places = [(0, 0, 0, 0, segment.start, self.dimension - segment.stop) for segment in self.segments]
        return torch.stack([F.pad(part, place) for part, place in zip(pooled, places, strict=True)]).sum(dim=0)


def project(pooled: Iterable[torch.Tensor], weights: Sequence[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear map of the embedding to each layer on its own grid, coarser for deeper layers.

    The map commutes with the bilinear resize, so ``W [x1; up(x2)] + b = W1 x1 + up(W2 x2) + b``. Takes what
    :meth:`PatchAggregation.pool` gives, each segment's columns of ``W``, ``(out, size of the segment, 1, 1)``, and
    ``b``, ``(out,)``; returns ``(N, out, h, w)`` on the grid of the first layer.
    """
    parts: list[torch.Tensor] = []
    for part, weight in zip(pooled, weights, strict=True):
        projected = F.conv2d(part, weight, None if parts else bias)
        parts.append(resize(projected, parts[0].shape[-2:]) if parts else projected)
    return add(parts)


def _pooling_matrix(size: int, out: int) -> torch.Tensor:
    """Return ``adaptive_avg_pool1d`` as a matrix of shape ``(out, size)``."""
    index, position = torch.arange(out)[:, None], torch.arange(size)
    window = (position >= index * size // out) & (position < -(-(index + 1) * size // out))
    return window.double() / window.sum(dim=1, keepdim=True)


def _group(weight: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Most groups in which a weight ``(out, in, k, k)`` is block-diagonal, and its form for ``conv2d(groups=...)``."""
    out_channels, in_channels = weight.shape[:2]
    most = gcd(out_channels, in_channels)
    out_index, in_index = weight.abs().sum(dim=(2, 3)).nonzero().T
    groups = next(
        n
        for n in range(most, 0, -1)
        if most % n == 0 and torch.equal(out_index // (out_channels // n), in_index // (in_channels // n))
    )
    blocks = weight.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))
    diagonal = torch.arange(groups)
    return groups, blocks[diagonal, :, diagonal].flatten(0, 1)
