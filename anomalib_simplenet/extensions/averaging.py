"""Average of the trained weights over the last steps (not in the paper)."""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import nn


class PolynomialAverage(nn.Module):
    """Average of a module's weights and running statistics in which about the last quarter of all steps counts.

    Polynomial-decay averaging (Shamir and Zhang, ICML 2013, section 4, with eta = 3). PyTorch's ``AveragedModel`` gives
    the same numbers, but reads its counter in each step, which makes a GPU wait.

    Attributes:
        module (nn.Module): The averages, at first a copy of the module given.
        steps (torch.Tensor): Number of averaged steps, scalar; at zero, the next step starts the average anew.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = deepcopy(module).requires_grad_(requires_grad=False)
        self.register_buffer("steps", torch.tensor(0.0))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Add the weights after one more step of the optimizer."""
        self.steps += 1
        share = 4 / (self.steps + 3)
        for mean, value in zip(_tensors(self.module), _tensors(module), strict=True):
            mean.lerp_(value, share.to(mean.dtype))


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Weights and running statistics."""
    return (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())
