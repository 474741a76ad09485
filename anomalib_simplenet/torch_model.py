"""SimpleNet in plain PyTorch."""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Literal

import torch
from anomalib.data import InferenceBatch
from torch import nn

from .components import (
    Adapter,
    AnomalyGenerator,
    AnomalyMapGenerator,
    Discriminator,
    FeatureExtractor,
    PatchAggregation,
)
from .components.ops import non_finite
from .components.patch_aggregation import project
from .extensions.fused_head import FusedHead
from .extensions.whitening import LocalWhitening, Whitening


class SimpleNetModel(nn.Module):
    """SimpleNet: A Simple Network for Image Anomaly Detection and Localization (CVPR 2023, arXiv 2303.15140).

    Args:
        backbone (str | nn.Module): See :class:`FeatureExtractor`. Defaults to ``"wide_resnet50_2.tv_in1k"``.
        layers (Sequence[str]): Layers of the backbone; the first one gives the grid. Defaults to
            ``("layer2", "layer3")``.
        pre_trained (bool): Whether to load the backbone's ImageNet weights. Defaults to ``True``.
        patch_size (int): Side of the neighbourhood pooled into a patch, odd. Defaults to ``3``.
        pretrain_embed_dimension (int | None): What each layer's patches are pooled to; ``None`` for its own number of
            channels. Defaults to ``1536``.
        target_embed_dimension (int | None): Size of a patch embedding; ``None`` for the sum of the layers' channels.
            Defaults to ``1536``.
        adapter_layers (int): Linear layers of the adapter; ``0`` for none. Defaults to ``1``.
        discriminator_layers (int): Linear layers of the discriminator. Defaults to ``2``.
        discriminator_hidden (int | None): Size of its hidden layers; ``None`` shrinks by 1.5 a layer.
            Defaults to ``1024``.
        noise_std (float): Standard deviation of the noise that makes anomalies. Defaults to ``0.015``.
        mix_noise (int): Number of noise scales, ``noise_std * 1.1**k``. Defaults to ``1``.
        whiten (bool | str): Whether to whiten embeddings with the covariance of normal ones, which makes ``noise_std``
            a share of their deviation; ``"local"`` for a mean and a covariance of each position. Not in the paper.
            Defaults to ``False``.
        patch_fraction (float): Share of a batch's patches, drawn at random in each step, to train on.
            Defaults to ``1.0``, all.
        distance_weight (float): How much the distance of a whitened embedding from the mean, divided by the square root
            of its size, adds to a patch's score. Not in the paper. Defaults to ``0.0``.
        top_patches (int): How many of an image's highest patches make its score, by their mean. Defaults to ``1``.
        averaging (bool): Whether eval mode takes the average of adapter and discriminator over the last steps that
            :meth:`average` keeps. Not in the paper. Defaults to ``False``.

    Attributes:
        feature_extractor (FeatureExtractor): Frozen backbone.
        patch_aggregation (PatchAggregation): Feature maps to patch embeddings.
        whitening (Whitening | LocalWhitening | None): Fitted before training, if asked for.
        adapter (Adapter): Trained.
        anomaly_generator (AnomalyGenerator): Adds the noise.
        discriminator (Discriminator): Trained.

    Raises:
        ValueError: If an argument is out of its range; the message says which and what is allowed.

    Example:
        >>> model = SimpleNetModel("resnet18", pre_trained=False, target_embed_dimension=64).eval()
        >>> prediction = model(torch.zeros(2, 3, 64, 96))
        >>> prediction.pred_score.shape, prediction.anomaly_map.shape
        (torch.Size([2]), torch.Size([2, 1, 64, 96]))
    """

    def __init__(
        self,
        backbone: str | nn.Module = "wide_resnet50_2.tv_in1k",
        layers: Sequence[str] = ("layer2", "layer3"),
        pre_trained: bool = True,
        patch_size: int = 3,
        pretrain_embed_dimension: int | None = 1536,
        target_embed_dimension: int | None = 1536,
        adapter_layers: int = 1,
        discriminator_layers: int = 2,
        discriminator_hidden: int | None = 1024,
        noise_std: float = 0.015,
        mix_noise: int = 1,
        whiten: bool | Literal["local"] = False,
        patch_fraction: float = 1.0,
        distance_weight: float = 0.0,
        top_patches: int = 1,
        averaging: bool = False,
    ) -> None:
        super().__init__()
        if not distance_weight >= 0:
            msg = f"distance_weight is {distance_weight}, expected 0 (no distance) or more."
            raise ValueError(msg)
        if not (isinstance(whiten, bool) or whiten == "local"):
            msg = f"whiten is {whiten!r}, expected True, False or 'local'."
            raise ValueError(msg)
        if distance_weight and not whiten:
            msg = f"distance_weight is {distance_weight}, but distances need whitened embeddings: set whiten to true."
            raise ValueError(msg)
        self.distance_weight = distance_weight
        if top_patches < 1:
            msg = f"top_patches is {top_patches}, expected 1 (the highest patch) or more."
            raise ValueError(msg)
        self.top_patches = top_patches
        if not 0 < patch_fraction <= 1:
            msg = f"patch_fraction is {patch_fraction}, expected a number above 0, up to 1 (all patches)."
            raise ValueError(msg)
        self.patch_fraction = patch_fraction
        self.feature_extractor = FeatureExtractor(backbone, layers, pre_trained)
        channels = self.feature_extractor.channels
        dimension = sum(channels) if target_embed_dimension is None else target_embed_dimension
        self.patch_aggregation = PatchAggregation(channels, patch_size, pretrain_embed_dimension, dimension)
        self.whitening: Whitening | LocalWhitening | None = None
        if whiten:
            self.whitening = (LocalWhitening if whiten == "local" else Whitening)(dimension)
        self.adapter = Adapter(dimension, adapter_layers)
        self.anomaly_generator = AnomalyGenerator(noise_std, mix_noise)
        self.discriminator = Discriminator(dimension, discriminator_layers, discriminator_hidden)
        self.averaged: nn.ModuleList | None = None
        if averaging:
            self.averaged = deepcopy(nn.ModuleList([self.adapter, self.discriminator])).requires_grad_(False)
            self.averaged_steps: torch.Tensor
            self.register_buffer("averaged_steps", torch.tensor(0))
        self.anomaly_map_generator = AnomalyMapGenerator()
        self.fused_head: FusedHead | None = None
        self.register_load_state_dict_post_hook(_fuse_after_loading)

    def train(self, mode: bool = True) -> "SimpleNetModel":
        """Enter training or eval mode; eval mode fuses adapter and discriminator (:class:`FusedHead`)."""
        super().train(mode)
        self.fuse()
        return self

    def fuse(self) -> None:
        """Bring the fused head up to date with adapter and discriminator; call it after changing them in eval mode."""
        if self.training:
            self.fused_head = None
            return
        adapter, discriminator = self.adapter, self.discriminator
        if self.averaged is not None and self.averaged_steps:
            adapter, discriminator = self.averaged
        segments = [slice(None)] if isinstance(self.whitening, LocalWhitening) else self.patch_aggregation.segments
        linear = self._linear(adapter)
        self.fused_head = FusedHead(linear, discriminator, segments, self.whitening, self.distance_weight).eval()

    def _linear(self, adapter: nn.Module) -> list[nn.Linear]:
        """What stands between pooled maps (:meth:`_pooled`) and discriminator."""
        return [*([self.whitening] if isinstance(self.whitening, Whitening) else []), *adapter]

    def _pooled(self, features: Sequence[torch.Tensor]) -> Iterable[torch.Tensor]:
        """Contributions to the embedding, on each layer's own grid, or the locally whitened embedding."""
        if isinstance(self.whitening, LocalWhitening):
            return [self.whitening(self.patch_aggregation(features))]
        return self.patch_aggregation.pool(features)

    def forget_averages(self) -> None:
        """Let the averaged weights start anew from those of the next step."""
        if self.averaged is not None:
            self.averaged_steps.zero_()

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged weights towards the trained ones; to be called after each step of the optimizer.

        Polynomial-decay averaging (Shamir and Zhang, ICML 2013, section 4): however many steps there are, about the
        last quarter of them counts.
        """
        if self.averaged is None:
            return
        self.averaged_steps += 1
        share = 4 / (self.averaged_steps + 3)
        trained = nn.ModuleList([self.adapter, self.discriminator])
        for mean, value in zip(_tensors(self.averaged), _tensors(trained), strict=True):
            mean.lerp_(value, share.to(mean.dtype))

    def extract(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract the backbone's maps from images ``(N, 3, H, W)``: for each layer ``(N, C, h, w)``."""
        return list(self.feature_extractor(images).values())

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embed the patches of images.

        Args:
            images (torch.Tensor): Normalised images of shape ``(N, 3, H, W)``.

        Returns:
            torch.Tensor: Embeddings of shape ``(N, target_embed_dimension, h, w)``, on the grid of the first layer.
        """
        return self.patch_aggregation(self.extract(images))

    def discriminate(self, features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Score real and fake patches, to train on.

        With ``W`` the discriminator's first layer and ``A`` the adapter, ``W (A x + noise) = (W A) x + W noise``: one
        product for all linear layers, on each layer's own grid, and one for the noise.

        Args:
            features (Sequence[torch.Tensor]): Feature maps of normal images (:meth:`extract`).

        Returns:
            tuple[torch.Tensor, torch.Tensor]: The discriminator's scores of the adapted patches and of the same with
            noise, ``(N * h * w,)`` each, or as many as ``patch_fraction`` leaves.
        """
        first = self.discriminator.first
        weight, bias = _compose([*self._linear(self.adapter), first])
        if self.patch_fraction < 1:
            hidden = nn.functional.linear(self._some_patches(features), weight, bias)
        else:
            local = isinstance(self.whitening, LocalWhitening)
            segments = [slice(None)] if local else self.patch_aggregation.segments
            weights = [weight[:, segment, None, None] for segment in segments]
            grid = project(self._pooled(features), weights, bias)
            hidden = grid.permute(0, 2, 3, 1).flatten(0, 2)
        noise = self.anomaly_generator(hidden.new_zeros(()).expand(len(hidden), first.in_features))
        noisy = torch.addmm(hidden, noise, first.weight.T)
        # In one batch: batch norm sees real and fake patches together, as in the authors' code.
        real, fake = self.discriminator.after_first(torch.cat([hidden, noisy])).chunk(2)
        return real, fake

    def _some_patches(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        embedding = self.patch_aggregation(features)
        if isinstance(self.whitening, LocalWhitening):
            embedding = self.whitening(embedding)
        images, _, _, width = embedding.shape
        total = images * embedding.shape[2:].numel()
        chosen = torch.randperm(total, device=embedding.device)[: max(1, round(self.patch_fraction * total))]
        place = chosen // images
        return embedding[chosen % images, :, place // width, place % width]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | InferenceBatch:
        """Score images, or in training mode real and fake patches.

        Args:
            images (torch.Tensor): Normalised images of shape ``(N, 3, H, W)``.

        Returns:
            tuple[torch.Tensor, torch.Tensor] | InferenceBatch: In training mode what :meth:`discriminate` gives. In
            eval mode, unbounded and higher for more anomalous: ``pred_score`` ``(N,)``, the mean of the highest
            ``top_patches``, and ``anomaly_map`` ``(N, 1, H, W)``, the patches' scores resized and smoothed.
        """
        features = self.extract(images)
        if self.training:
            return self.discriminate(features)

        patch_scores = -self.fused_head(self._pooled(features)).float()  # type: ignore[misc]
        anomaly_map = self.anomaly_map_generator(patch_scores, images.shape[-2:])
        unusable = non_finite(images, patch_scores)
        return InferenceBatch(
            pred_score=self._image_score(patch_scores.flatten(1)).masked_fill(unusable, torch.inf),
            anomaly_map=anomaly_map.masked_fill(unusable[:, None, None, None], torch.inf),
        )

    def _image_score(self, patch_scores: torch.Tensor) -> torch.Tensor:
        if self.top_patches == 1:
            return patch_scores.amax(dim=1)
        return patch_scores.topk(min(self.top_patches, patch_scores.shape[1]), dim=1).values.mean(dim=1)


def _compose(layers: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of consecutive linear layers as one."""
    weight, bias = layers[0].weight, layers[0].bias
    for layer in layers[1:]:
        weight = layer.weight @ weight
        bias = nn.functional.linear(bias, layer.weight, layer.bias)
    return weight, bias


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Weights and running statistics."""
    return (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())


def _fuse_after_loading(model: SimpleNetModel, _incompatible_keys: object) -> None:
    model.fuse()
