"""Anomaly maps on the grid of a finer layer (not in the paper)."""

from collections.abc import Sequence

import torch
from torch import nn

from anomalib_simplenet.components.ops import power

from .whitening import Whitening

COMPONENTS = 30  # at most
WEIGHT = 2.0  # of the distance's mean over the components, beside the discriminator's score


class FineMap(nn.Module):
    """Mahalanobis distance of one layer's patches on its own grid, to be added to the anomaly map.

    The discriminator says how anomalous an image is, on a coarse grid; the distance on a finer one says where. A mean
    and covariance of each cell of the coarse grid serve all of the layer's patches in it.

    Args:
        layer (str): Name of the layer.
        layers (Sequence[str]): All layers; the first gives the coarse grid.
        channels (Sequence[int]): Channels of each.
        whiten (bool | str): ``True`` for one mean and covariance, ``"local"`` for those of each cell.

    Raises:
        ValueError: If ``layer`` is none of ``layers``, or ``whiten`` is ``False``.
    """

    def __init__(self, layer: str, layers: Sequence[str], channels: Sequence[int], whiten: bool | str) -> None:
        super().__init__()
        if layer not in layers or not whiten:
            msg = f"map_layer is {layer!r}, expected one of layers, {', '.join(layers)}, and whiten true or 'local'."
            raise ValueError(msg)
        self.index = list(layers).index(layer)
        size = channels[self.index]
        self.whitening = Whitening(size, whiten == "local", min(size, COMPONENTS))

    def cells(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """The layer's patches of each cell of the first layer's grid ``(h, w)``, as maps: ``(N * f**2, C, h, w)``.

        Raises:
            ValueError: If the layer's grid is not ``(f * h, f * w)``.
        """
        fine, grid = features[self.index], features[0].shape[-2:]
        return self._patches(fine, grid).transpose(0, 1).unflatten(1, tuple(grid)).permute(0, 3, 1, 2)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Distances ``(N, 1, f * h, f * w)`` of patches of feature maps ``(N, C, h, w)``, one for each layer."""
        grid = features[0].shape[-2:]
        patches = self._patches(self.whitening.project(features[self.index]), grid)
        white = self.whitening.whiten(patches)
        mean = white.new_full((white.shape[2], 1), WEIGHT**2 / white.shape[2])  # products with one number lose the mark
        distance = power((white * white) @ mean, 0.5).unflatten(0, tuple(grid))  # (h, w, N * f**2, 1)
        factor = features[self.index].shape[-1] // grid[-1]
        return distance.unflatten(2, (-1, factor, factor)).permute(2, 5, 0, 3, 1, 4).flatten(4, 5).flatten(2, 3)

    @staticmethod
    def _patches(maps: torch.Tensor, grid: torch.Size) -> torch.Tensor:
        """Patches of maps ``(N, C, f * h, f * w)`` in each cell of the grid ``(h, w)``: ``(h * w, N * f**2, C)``."""
        factor = maps.shape[-1] // grid[-1]
        if maps.shape[-2:] != (factor * grid[0], factor * grid[1]):
            msg = (
                f"map_layer has {maps.shape[2]} x {maps.shape[3]} patches, expected a multiple of the {grid[0]} x "
                f"{grid[1]} of the first layer: name a finer layer, or set map_layer to null."
            )
            raise ValueError(msg)
        rows = maps.permute(0, 2, 3, 1).unflatten(2, (-1, factor)).unflatten(1, (-1, factor))  # (N, h, f, w, f, C)
        return rows.permute(1, 3, 0, 2, 4, 5).flatten(2, 4).flatten(0, 1)
