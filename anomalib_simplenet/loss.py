"""Truncated L1 loss."""

import torch
from torch import nn

from .checks import check_number


class TruncatedL1Loss(nn.Module):
    """Push scores of real patches above ``margin`` and those of fake ones below ``-margin`` (paper, eq. 7).

    Args:
        margin (float): Scores beyond it cost nothing. Defaults to ``0.5``, the paper's value.

    Raises:
        ValueError: If ``margin`` is not positive.

    Example:
        >>> TruncatedL1Loss(margin=0.5)(torch.tensor([0.5, 0.25]), torch.tensor([-1.0, 0.5]))
        tensor(0.6250)
    """

    def __init__(self, margin: float = 0.5) -> None:
        super().__init__()
        check_number("margin", margin, above=0, hint="(the paper's is 0.5)")
        self.margin = margin

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Mean loss, a scalar of at least 0, of scores of real patches and of those with noise, each of any shape."""
        return (self.margin - real).clamp(min=0).mean() + (self.margin + fake).clamp(min=0).mean()
