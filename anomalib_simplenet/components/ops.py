"""Resizing, sum and activation in forms that exported models compute exactly.

OpenVINO computes in bfloat16 where the processor can, except operations marked as sensitive to precision
(``keep_float32`` in export/openvino.py). Interpolation, quotients, powers and leaky ReLU lose the mark in OpenVINO's
own rewriting of the graph; matrix products, sums and absolute values keep it. Exported graphs use the latter; eager and
compiled models do not.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch.nn import functional as F  # noqa: N812


def resize(feature: torch.Tensor, grid: tuple[int, int] | torch.Size) -> torch.Tensor:
    """Resize maps ``(N, C, h, w)`` bilinearly to ``(N, C, H, W)``, as the authors do without antialiasing."""
    if feature.shape[-2:] == grid:
        return feature
    if torch.compiler.is_exporting():
        fixed = all(isinstance(length, int) for length in (*feature.shape[-2:], *grid))  # comparing others fixes them
        if fixed and feature.shape[-2:] == (2 * grid[0], 2 * grid[1]):
            return F.avg_pool2d(feature, 2)  # the same, and OpenVINO takes a tenth of the time
        return resize_by_product(feature, grid, antialias=False)
    return F.interpolate(feature, size=grid, mode="bilinear", align_corners=False)


def resize_by_product(image: torch.Tensor, size: tuple[int, int] | torch.Size, *, antialias: bool) -> torch.Tensor:
    """Resize images ``(..., h, w)`` bilinearly to ``(..., H, W)``, by two matrix products."""
    rows = resize_matrix(image.shape[-2], size[0], image, antialias)
    columns = resize_matrix(image.shape[-1], size[1], image, antialias)
    return (rows @ image) @ columns.mT  # rows first, or a transposed image is transposed without the mark


def add(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add maps of one shape, ``(N, C, H, W)``, to the first of them."""
    if torch.compiler.is_exporting() and len(parts) > 1:
        # OpenVINO fuses a plain sum into a convolution, which then fails in float32 where the processor knows bfloat16.
        return torch.cat(list(parts), dim=1).unflatten(1, (len(parts), -1)).sum(dim=1)
    for part in parts[1:]:
        parts[0].add_(part)  # new memory costs more than the sum
    return parts[0]


def leaky_relu(features: torch.Tensor, negative_slope: float) -> torch.Tensor:
    """Apply leaky ReLU to maps ``(N, C, h, w)``, in place."""
    if torch.compiler.is_exporting():
        half = features.new_full((features.shape[1], 1, 1), 0.5)  # products with one number lose the mark, too
        return (1 + negative_slope) * half * features + (1 - negative_slope) * half * features.abs()
    return F.leaky_relu(features, negative_slope, inplace=True)


def resize_matrix(size: int, out: int, like: torch.Tensor, antialias: bool) -> torch.Tensor:
    """Linear interpolation of ``size`` samples at ``out`` positions, as a matrix ``(1, 1, out, size)``.

    Each output is a triangular average of the input; antialiased, the triangle is as wide as the inputs that one output
    covers. Computed in integers up to the last division.
    """
    centre = size * (2 * torch.arange(out, device=like.device) + 1)
    sample = out * (2 * torch.arange(size, device=like.device) + 1)
    # max() would fix the size of exported graphs.
    width = (size + out + abs(size - out)) // 2 if antialias else out
    # The integers get all four dimensions here, or OpenVINO rewrites the products.
    weight = (2 * width - (sample[None, None, None] - centre[None, None, :, None]).abs()).clamp(min=0)
    total = weight.sum(dim=3, keepdim=True).to(like.dtype)
    return weight.to(like.dtype) * power(total, -1)


def power(values: torch.Tensor, exponent: float, width: int = 1) -> torch.Tensor:
    """``values ** exponent`` of values above zero, or of zero where the exponent is positive.

    A last dimension of 1 is repeated to ``width``; one of another size must be fixed in exported models.
    """
    if not torch.compiler.is_exporting():
        return values.pow(exponent).repeat_interleave(width, dim=-1) if width > 1 else values.pow(exponent)
    if values.shape[-1] == 1:  # a product with one number loses the mark
        return (values.log() @ values.new_full((1, width), exponent)).exp()
    return (values.log() * values.new_full(values.shape[-1:], exponent)).exp()


def non_finite(images: torch.Tensor, grids: Sequence[torch.Tensor]) -> torch.Tensor:
    """Find images with pixels or scores that are NaN or infinite.

    Comparisons with NaN are false, so a threshold would call such an image normal. Takes images ``(N, 3, H, W)`` and
    grids of their scores, ``(N, 1, h, w)`` each, returns booleans ``(N,)``.
    """
    # A mean is not finite if one of its terms is not; it costs less than a look at each pixel.
    return ~reduce(torch.add, [values.mean(dim=(1, 2, 3)) for values in (images, *grids)]).isfinite()
