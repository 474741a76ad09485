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
        if layer not in layers:
            msg = f"map_layer is {layer!r}, expected one of layers ({', '.join(layers)}) or null."
            raise ValueError(msg)
        if not whiten:
            msg = f"map_layer is {layer!r}, but whiten is False: set it to true or 'local', or map_layer to null."
            raise ValueError(msg)
        self.index = list(layers).index(layer)
        size = channels[self.index]
        self.whitening = Whitening(size, whiten == "local", min(size, COMPONENTS))

    def cells(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """The layer's patches, as the whitening takes them: one map ``(N, C, H, W)`` where all share one covariance.

        Else those of each cell of the first layer's grid ``(h, w)``: ``(N * f**2, C, h, w)``.

        Raises:
            ValueError: If cells have their own and the layer's grid is not ``(f * h, f * w)``.
        """
        fine, grid = features[self.index], features[0].shape[-2:]
        if not self.whitening.local:
            return fine
        return self._patches(fine, grid).transpose(0, 1).unflatten(1, tuple(grid)).permute(0, 3, 1, 2)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Distances ``(N, 1, H, W)`` of patches of feature maps ``(N, C, h, w)``, one for each layer."""
        fine, grid = features[self.index].to(self.whitening.mean.dtype), features[0].shape[-2:]
        with torch.autocast(fine.device.type, enabled=False):  # squares overflow half precision
            if not self.whitening.local:  # which needs no cells, and so any grid
                return self._distance(self.whitening(fine).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            patches = self._patches(self.whitening.project(fine), grid)
            distance = self._distance(self.whitening.whiten(patches))  # (h * w, N * f**2, 1)
        factor = fine.shape[-1] // grid[-1]
        distance = distance.unflatten(1, (-1, factor, factor)).unflatten(0, tuple(grid))  # (h, w, N, f, f, 1)
        return distance.permute(2, 5, 0, 3, 1, 4).flatten(4, 5).flatten(2, 3)

    @staticmethod
    def _distance(white: torch.Tensor) -> torch.Tensor:
        """Root of the mean square in the last dimension, times its weight; the dimension is kept."""
        mean = white.new_full((white.shape[-1], 1), WEIGHT**2 / white.shape[-1])
        return power((white * white) @ mean, 0.5)

    @staticmethod
    def _patches(maps: torch.Tensor, grid: torch.Size) -> torch.Tensor:
        """Patches of maps ``(N, C, f * h, f * w)`` in each cell of the grid ``(h, w)``: ``(h * w, N * f**2, C)``."""
        factor = maps.shape[-1] // grid[-1]
        if maps.shape[-2:] != (factor * grid[0], factor * grid[1]):
            msg = (
                f"map_layer has {maps.shape[2]} x {maps.shape[3]} patches, expected a multiple of the {grid[0]} x "
                f"{grid[1]} of the first layer: resize images to a multiple of the backbone's stride, name a finer "
                "layer, or set map_layer to null."
            )
            raise ValueError(msg)
        rows = maps.permute(0, 2, 3, 1).unflatten(2, (-1, factor)).unflatten(1, (-1, factor))  # (N, h, f, w, f, C)
        return rows.permute(1, 3, 0, 2, 4, 5).flatten(2, 4).flatten(0, 1)
