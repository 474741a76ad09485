"""Anomaly map."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .ops import resize_matrix


class AnomalyMapGenerator(nn.Module):
    """Resize patch scores to the image and smooth them, as the authors do with scipy's ``gaussian_filter``.

    The Gaussian is cut off at four standard deviations, with the border reflected (its edge pixel repeated, whatever
    the size of the image). Resizing and smoothing are linear and separable, so both together are one matrix for the
    rows and one for the columns.

    Args:
        sigma (float): Standard deviation of the smoothing, in pixels; ``0`` for none. Defaults to ``4``, the paper's.
    """

    def __init__(self, sigma: float = 4.0) -> None:
        super().__init__()
        radius = int(4 * sigma + 0.5)
        kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / max(sigma, 1e-6)) ** 2)
        self.register_buffer("kernel", (kernel / kernel.sum()).float(), persistent=False)

    def forward(self, patch_scores: torch.Tensor, image_size: tuple[int, int] | torch.Size) -> torch.Tensor:
        """Make maps ``(N, 1, H, W)`` of image size ``(H, W)`` from patch scores ``(N, 1, h, w)``, in the same units."""
        with torch.autocast(patch_scores.device.type, enabled=False):
            rows, columns = (
                self._smooth(resize_matrix(size, out, patch_scores, antialias=False))
                for size, out in zip(patch_scores.shape[-2:], image_size, strict=True)
            )
            return rows @ patch_scores @ columns.mT

    def _smooth(self, matrix: torch.Tensor) -> torch.Tensor:
        """Smooth the columns of a matrix ``(1, 1, H, h)``."""
        size, radius = matrix.shape[2], len(self.kernel) // 2  # len() would fix the size of exported graphs
        # Padded as d c b a | a b c d | d c b a, which F.pad cannot.
        index = torch.arange(-radius, size + radius, device=matrix.device)
        index = index.remainder(torch.full_like(index, 2 * size))  # ONNX has no remainder of a size that is not fixed
        padded = matrix.index_select(2, torch.minimum(index, 2 * size - 1 - index))
        return F.conv2d(padded, self.kernel.to(matrix.dtype).view(1, 1, -1, 1))
