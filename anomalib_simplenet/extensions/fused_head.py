"""Adapter, noise and discriminator in fewer products; the scores are those of the plain path."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_simplenet.components.anomaly_generator import AnomalyGenerator
from anomalib_simplenet.components.discriminator import Discriminator
from anomalib_simplenet.components.ops import leaky_relu
from anomalib_simplenet.components.patch_aggregation import project

from .whitening import Affine


def noisy_scores(
    embeddings: torch.Tensor | Iterable[torch.Tensor],
    segments: Sequence[slice],
    linear: Sequence[Affine],
    generator: AnomalyGenerator,
    discriminator: Discriminator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score real and fake patches in training mode.

    With ``W`` the discriminator's first layer and ``A`` the adapter, ``W (A x + noise) = (W A) x + W noise``: one
    product for all linear layers, on each layer's own grid, and one for the noise. Radial noise scales ``W A x``.

    ``embeddings`` are patches, ``(patches, dimension)``, or each layer's contribution to them, ``(N, size of its
    segment, h, w)`` (:meth:`PatchAggregation.pool`); ``linear`` are the layers before the discriminator. Returns the
    scores of real and of fake patches, ``(patches,)`` each.
    """
    first = discriminator.first
    weight, bias = first.weight, first.bias
    for layer in reversed(linear):
        bias = F.linear(layer.bias, weight, bias)
        weight = weight @ layer.weight
    if isinstance(embeddings, torch.Tensor):
        hidden = F.linear(embeddings, weight, bias)
    else:
        grid = project(embeddings, [weight[:, segment, None, None] for segment in segments], bias)
        hidden = grid.permute(0, 2, 3, 1).flatten(0, 2)
    if generator.noise == "radial":
        own = 0 if first.bias is None else first.bias
        noisy = generator(hidden - own) + own
    else:
        noise = generator(hidden.new_zeros(()).expand(len(hidden), first.in_features))
        noisy = torch.addmm(hidden, noise, first.weight.T)
    return discriminator.after_first(torch.cat([hidden, noisy])).chunk(2)


class FusedHead(nn.Module):
    """Whitening, adapter and discriminator in eval mode, folded together; a frozen copy without parameters or state.

    Between two activations, linear layers and batch norm are one affine map ``W x + b``. The first of them is applied
    to each layer on its own grid (:func:`project`).

    Args:
        linear (Sequence[Affine]): What stands before the discriminator: whitening and adapter.
        discriminator (Discriminator): Trained discriminator.
        segments (Sequence[slice]): The part of the embedding that each layer contributes to.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, linear: Sequence[Affine], discriminator: Discriminator, segments: Sequence[slice]) -> None:
        super().__init__()
        like = discriminator.tail.weight
        affine = _fold([*linear, *(layer for block in discriminator.body for layer in block), discriminator.tail])
        self.parts, self.depth = len(segments), len(affine)
        for index, (weight, bias) in enumerate(affine):
            for part, segment in enumerate(segments if index == 0 else [slice(None)]):
                columns = weight[:, segment, None, None].to(like).contiguous()
                self.register_buffer(f"weight_{index}_{part}", columns, persistent=False)
            self.register_buffer(f"bias_{index}", bias.to(like), persistent=False)

    def forward(self, pooled: Iterable[torch.Tensor]) -> torch.Tensor:
        """Score what :meth:`PatchAggregation.pool` gives: ``(N, 1, h, w)`` on the first grid, higher for normal."""
        scores = project(pooled, [getattr(self, f"weight_0_{part}") for part in range(self.parts)], self.bias_0)
        for index in range(1, self.depth):
            scores = leaky_relu(scores, Discriminator.NEGATIVE_SLOPE)
            scores = F.conv2d(scores, getattr(self, f"weight_{index}_0"), getattr(self, f"bias_{index}"))
        return scores


@torch.no_grad()
def fingerprint(modules: Iterable[nn.Module], whitening: Iterable[Affine]) -> tuple[float, ...]:
    """Norm and weighted sums of each weight and running statistic: differs after whatever way of changing one.

    PyTorch's own version counters miss writes through ``.data``, which callbacks that swap weights use.
    """
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    values = []
    for tensor in [*tensors, *(tensor for affine in whitening for tensor in affine)]:
        matrix = tensor.float().reshape(tensor.shape[0] if tensor.ndim else 1, -1)
        values.append(matrix.norm())
        for sums in (matrix.sum(dim=0), matrix.sum(dim=1)):  # weighted by position, which a plain sum ignores
            values.append((sums * torch.linspace(1, 2, len(sums), device=sums.device)).sum())
    return tuple(torch.stack([value.to(values[0].device) for value in values]).tolist())


def _fold(layers: Sequence[nn.Module | Affine]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Fold consecutive linear layers and batch norms; an activation ends one affine map and starts the next."""
    affine = []
    weight: torch.Tensor | None = None
    bias = torch.zeros(1, dtype=torch.float64)
    for layer in layers:
        if isinstance(layer, nn.LeakyReLU):
            affine.append((weight, bias))
            weight = None
        elif isinstance(layer, nn.BatchNorm1d | nn.SyncBatchNorm):
            scale = _double(layer.weight) / (_double(layer.running_var) + layer.eps).sqrt()
            weight = scale[:, None] * weight
            bias = scale * (bias - _double(layer.running_mean)) + _double(layer.bias)
        else:
            own = _double(layer.weight)
            if weight is None:
                bias = torch.zeros(own.shape[1], dtype=torch.float64)
            weight = own if weight is None else own @ weight
            bias = own @ bias + (0 if layer.bias is None else _double(layer.bias))
    return [*affine, (weight, bias)]


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().double()  # not every accelerator has double precision
