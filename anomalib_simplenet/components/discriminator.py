"""Patch discriminator."""

import torch
from torch import nn

from anomalib_simplenet.checks import check_number


class Discriminator(nn.Module):
    """Score patches: high for normal, low for anomalous ones (paper, section 3.4).

    ``[Linear, BatchNorm, LeakyReLU(0.2)] x (layers - 1)`` and a linear layer to one score, without bias.
    Linear weights start Xavier-normal.

    Args:
        dimension (int): Size of a patch embedding.
        layers (int): Number of linear layers. Defaults to ``2``.
        hidden (int | None): Size of every hidden layer; ``None`` shrinks by 1.5 a layer. Defaults to ``1024``.

    Attributes:
        body (nn.Sequential): The hidden blocks.
        tail (nn.Linear): The last layer.

    Raises:
        ValueError: If ``layers`` is below 1, ``hidden`` below 1, or a shrinking layer would be empty.
    """

    NEGATIVE_SLOPE = 0.2

    def __init__(self, dimension: int, layers: int = 2, hidden: int | None = 1024) -> None:
        super().__init__()
        check_number("discriminator_layers", layers, at_least=1, integer=True)
        if hidden is not None:
            check_number("discriminator_hidden", hidden, at_least=1, integer=True, hint="or None to shrink")
        self.body = nn.Sequential()
        for _ in range(layers - 1):
            width = hidden or int(dimension // 1.5)
            if width < 1:
                msg = f"discriminator_layers is {layers}, too many to shrink by 1.5 a layer: give discriminator_hidden."
                raise ValueError(msg)
            activation = nn.LeakyReLU(self.NEGATIVE_SLOPE, inplace=True)
            self.body.append(nn.Sequential(nn.Linear(dimension, width), nn.BatchNorm1d(width), activation))
            dimension = width
        self.tail = nn.Linear(dimension, 1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Score adapted embeddings ``(patches, dimension)``: ``(patches,)``, unbounded."""
        return self.after_first(self.first(embedding))

    @property
    def first(self) -> nn.Linear:
        """The first linear layer."""
        return self.body[0][0] if len(self.body) else self.tail

    def after_first(self, hidden: torch.Tensor) -> torch.Tensor:
        """Score patches from what :attr:`first` makes of them, ``(patches, width)``; shape ``(patches,)``."""
        if len(self.body):
            hidden = self.tail(self.body[1:](self.body[0][1:](hidden)))
        return hidden.squeeze(1)
