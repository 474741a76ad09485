"""The trained head as a few affine maps, for inference."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_simplenet.components.discriminator import Discriminator
from anomalib_simplenet.components.ops import leaky_relu
from anomalib_simplenet.components.patch_aggregation import project


class FusedHead(nn.Module):
    """Whitening, adapter and discriminator in eval mode, folded together; a frozen copy without parameters or state.

    Between two activations, linear layers and batch norm are one affine map ``W x + b``. The first of them is applied
    to each layer on its own grid (:func:`project`).

    Args:
        linear (Sequence[nn.Linear]): What stands before the discriminator: whitening and adapter.
        discriminator (Discriminator): Trained discriminator.
        segments (Sequence[slice]): The part of the embedding that each layer contributes to.
        whitening (nn.Module | None): Whitening: linear and the first of ``linear``, or local and applied before.
            Defaults to ``None``.
        distance_weight (float): Weight of the whitened embedding's norm. Defaults to ``0.0``.
    """

    def __init__(
        self,
        linear: Sequence[nn.Linear],
        discriminator: Discriminator,
        segments: Sequence[slice],
        whitening: nn.Module | None = None,
        distance_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.parts = len(segments)
        like = discriminator.tail.weight
        affine = _fold([*linear, *(layer for block in discriminator.body for layer in block), discriminator.tail])
        self.depth = len(affine)
        self.hidden = len(affine[0][0])
        self.scale = 0.0 if whitening is None else distance_weight / whitening.out_features**0.5
        self.whitens = isinstance(whitening, nn.Linear) and self.scale > 0
        if self.whitens:  # with rows of the same product
            weight, bias = _fold([whitening])[0]
            affine[0] = (torch.cat([affine[0][0], weight]), torch.cat([affine[0][1], bias]))
        for index, (weight, bias) in enumerate(affine):
            columns = segments if index == 0 else [slice(None)]
            for part, segment in enumerate(columns):
                self.register_buffer(f"weight_{index}_{part}", _like(weight[:, segment, None, None], like), False)
            self.register_buffer(f"bias_{index}", _like(bias, like), False)

    def forward(self, pooled: Iterable[torch.Tensor]) -> torch.Tensor:
        """Score patches.

        Args:
            pooled (Iterable[torch.Tensor]): Each layer's contribution to the embedding, on its own grid, as
                :meth:`PatchAggregation.pool` gives it.

        Returns:
            torch.Tensor: Scores of shape ``(N, 1, h, w)`` on the grid of the first layer; high for normal patches.
        """
        if self.scale and not self.whitens:
            pooled = [white] = list(pooled)
        scores = project(pooled, [getattr(self, f"weight_0_{part}") for part in range(self.parts)], self.bias_0)
        if self.whitens:
            scores, white = scores[:, : self.hidden], scores[:, self.hidden :]
        distance = self.scale * white.square().sum(dim=1, keepdim=True).sqrt() if self.scale else 0.0
        for index in range(1, self.depth):
            scores = leaky_relu(scores, Discriminator.NEGATIVE_SLOPE)
            scores = F.conv2d(scores, getattr(self, f"weight_{index}_0"), getattr(self, f"bias_{index}"))
        return scores - distance


@torch.inference_mode(False)
@torch.no_grad()
def _fold(layers: Sequence[nn.Module]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Fold consecutive linear layers and batch norms; an activation ends one affine map and starts the next."""
    affine = []
    weight: torch.Tensor | None = None
    bias = torch.zeros(1, dtype=torch.float64)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            own = _double(layer.weight)
            if weight is None:
                bias = torch.zeros(layer.in_features, dtype=torch.float64)
            weight = own if weight is None else own @ weight
            bias = own @ bias + (0 if layer.bias is None else _double(layer.bias))
        elif isinstance(layer, nn.BatchNorm1d):
            scale = _double(layer.weight) / (_double(layer.running_var) + layer.eps).sqrt()
            weight = scale[:, None] * weight
            bias = scale * (bias - _double(layer.running_mean)) + _double(layer.bias)
        else:
            affine.append((weight, bias))
            weight = None
    return [*affine, (weight, bias)]


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().double()  # not every accelerator has double precision


@torch.inference_mode(False)
def _like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.to(like.device, like.dtype).contiguous()
