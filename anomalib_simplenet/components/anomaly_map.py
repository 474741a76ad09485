"""Anomaly map."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .traceable import resize


class AnomalyMapGenerator(nn.Module):
    """Resize patch scores to the image and smooth them, as the authors do with scipy's ``gaussian_filter``.

    The Gaussian is applied as two one-dimensional convolutions, cut off at four standard deviations, with the border
    reflected (its edge pixel repeated, whatever the size of the image).

    Args:
        sigma (float): Standard deviation of the smoothing, in pixels. Defaults to ``4``, the paper's value.
    """

    def __init__(self, sigma: float = 4.0) -> None:
        super().__init__()
        radius = int(4 * sigma + 0.5)
        kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
        self.kernel: torch.Tensor
        self.register_buffer("kernel", (kernel / kernel.sum()).float(), persistent=False)

    def forward(self, patch_scores: torch.Tensor, image_size: tuple[int, int] | torch.Size) -> torch.Tensor:
        """Make the anomaly map.

        Args:
            patch_scores (torch.Tensor): Anomaly scores of shape ``(N, 1, h, w)``.
            image_size (tuple[int, int] | torch.Size): ``(H, W)`` of the map.

        Returns:
            torch.Tensor: Map of shape ``(N, 1, H, W)``, in the units of the patch scores.
        """
        with torch.autocast(patch_scores.device.type, enabled=False):
            return self._smooth(resize(patch_scores, image_size))

    def _smooth(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        kernel = self.kernel.to(anomaly_map.dtype)
        anomaly_map = F.conv2d(self._reflect(anomaly_map, dim=2), kernel.view(1, 1, -1, 1))
        return F.conv2d(self._reflect(anomaly_map, dim=3), kernel.view(1, 1, 1, -1))

    def _reflect(self, image: torch.Tensor, dim: int) -> torch.Tensor:
        """Pad one dimension as ``d c b a | a b c d | d c b a``, which ``F.pad`` cannot."""
        size, radius = image.shape[dim], len(self.kernel) // 2
        index = torch.arange(-radius, size + radius, device=image.device)
        index = index.remainder(torch.full_like(index, 2 * size))  # ONNX has no remainder of a size that is not fixed
        return image.index_select(dim, torch.minimum(index, 2 * size - 1 - index))
