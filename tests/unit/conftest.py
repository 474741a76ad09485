"""What several unit tests take."""

import torch
from torch import nn


class TwoStages(nn.Module):
    """A module as backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.late = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.unused = nn.Conv2d(10, 10, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.unused(self.late(self.early(images)))
