"""SimpleNet in plain PyTorch."""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, Literal

import torch
from anomalib.data import InferenceBatch
from torch import nn

from .checks import check_number
from .components.adapter import Adapter
from .components.anomaly_generator import AnomalyGenerator
from .components.anomaly_map import AnomalyMapGenerator
from .components.discriminator import Discriminator
from .components.feature_extractor import FeatureExtractor
from .components.ops import non_finite
from .components.patch_aggregation import PatchAggregation
from .extensions.averaging import PolynomialAverage
from .extensions.brightness import equalize_brightness
from .extensions.fine_map import FineMap
from .extensions.fused_head import FusedHead, fingerprint, noisy_scores
from .extensions.patch_sampling import sample_patches
from .extensions.region import Region, load_region
from .extensions.tiling import extract_tiles
from .extensions.whitening import Affine, Whitening


class SimpleNetModel(nn.Module):
    """SimpleNet: A Simple Network for Image Anomaly Detection and Localization (CVPR 2023, arXiv 2303.15140).

    Args:
        backbone (str | nn.Module): Name of a CNN or transformer of timm, ``local-dir:FOLDER`` (a folder with timm's
            ``config.json`` and weights), or in Python a module. Defaults to ``"wide_resnet50_2.tv_in1k"``.
        layers (Sequence[str]): The backbone's layers; the first gives the grid. Defaults to ``("layer2", "layer3")``.
        pre_trained (bool): Whether to load the backbone's pre-trained weights. Defaults to ``True``.
        backbone_args (dict[str, Any] | None): More arguments for ``timm.create_model``. Defaults to ``None``.
        patch_size (int): Side of the neighbourhood pooled into a patch, odd. Defaults to ``3``.
        pretrain_embed_dimension (int | None): What each layer's patches are pooled to; ``None`` for its own number of
            channels. Defaults to ``1536``.
        target_embed_dimension (int | None): Size of an embedding; ``None`` for all channels. Defaults to ``1536``.
        adapter_layers (int): Linear layers of the adapter; ``0`` for none. Defaults to ``1``.
        discriminator_layers (int): Linear layers of the discriminator. Defaults to ``2``.
        discriminator_hidden (int | None): Size of hidden layers; ``None`` shrinks by 1.5 each. Defaults to ``1024``.
        noise_std (float): Standard deviation of the noise that makes anomalies. Must suit the scale of the backbone's
            features. Defaults to ``0.015``.
        mix_noise (int): Number of noise scales, ``noise_std * 1.1**k``. Defaults to ``1``.
        noise (str): ``"gaussian"``, the paper's, or ``"radial"``, for whitened features (:class:`AnomalyGenerator`).
            Defaults to ``"gaussian"``.
        whiten (bool | str): Not in the paper: whether to whiten embeddings with statistics of the training images. Puts
            ``noise_std`` in units of their standard deviation. ``"local"``: of each position. Defaults to ``False``.
        components (int | None): Principal components that whitening keeps. Defaults to ``None``: all.
        normalize_brightness (bool): Whether to divide each image by its mean brightness. Defaults to ``False``.
        patch_fraction (float): Share of a batch's patches, drawn at random in each step, to train on, above 0.
            Defaults to ``1.0``: all, as in the paper.
        top_patches (int): The image score is the mean of the k highest patch scores. Defaults to ``1``, the paper's.
        map_layer (str | None): One of ``layers`` whose Mahalanobis distance, on its own finer grid, is added to anomaly
            maps, in place of smoothing (:class:`FineMap`). Needs whitening. Defaults to ``None``.
        averaging (bool): Not in the paper: whether to predict with the average of the weights over about the last
            quarter of training instead of those of the last step. Defaults to ``False``.

    Attributes:
        feature_extractor (FeatureExtractor): Frozen backbone.
        adapter (Adapter), anomaly_generator (AnomalyGenerator), discriminator (Discriminator): Sections 3.2 to 3.4.
        region (Region | None): Not in the paper: the pixels that count. ``None`` for all.
        tiler (Tiler | None): Set by anomalib's ``TilerConfigurationCallback``: the backbone sees one tile at a time.

    Raises:
        ValueError: If an argument is out of its range; the message says which and what is expected.

    Example:
        >>> model = SimpleNetModel("resnet18", pre_trained=False, target_embed_dimension=64).eval()
        >>> prediction = model(torch.zeros(2, 3, 64, 96))
        >>> prediction.pred_score.shape, prediction.anomaly_map.shape
        (torch.Size([2]), torch.Size([2, 1, 64, 96]))
    """

    def __init__(
        self,
        # str | nn.Module, but then --model.help would list every module there is.
        backbone: str | Any = "wide_resnet50_2.tv_in1k",  # noqa: ANN401
        layers: Sequence[str] = ("layer2", "layer3"),
        pre_trained: bool = True,
        backbone_args: dict[str, Any] | None = None,
        patch_size: int = 3,
        pretrain_embed_dimension: int | None = 1536,
        target_embed_dimension: int | None = 1536,
        adapter_layers: int = 1,
        discriminator_layers: int = 2,
        discriminator_hidden: int | None = 1024,
        noise_std: float = 0.015,
        mix_noise: int = 1,
        noise: Literal["gaussian", "radial"] = "gaussian",
        whiten: bool | Literal["local"] = False,
        components: int | None = None,
        normalize_brightness: bool = False,
        patch_fraction: float = 1.0,
        top_patches: int = 1,
        map_layer: str | None = None,
        averaging: bool = False,
    ) -> None:
        super().__init__()
        check_number("patch_fraction", patch_fraction, above=0, at_most=1)
        check_number("top_patches", top_patches, at_least=1, integer=True)
        if not (isinstance(whiten, bool) or whiten == "local") or (noise == "radial" and not whiten):
            msg = f"whiten is {whiten!r}, expected True, False or 'local', and not False where noise is radial."
            raise ValueError(msg)
        if components is not None and not whiten:
            msg = f"components is {components}, but only whitening keeps components: set whiten to true or 'local'."
            raise ValueError(msg)
        self.normalize_brightness = normalize_brightness
        self.patch_fraction, self.top_patches = patch_fraction, top_patches
        self.feature_extractor = FeatureExtractor(backbone, layers, pre_trained, backbone_args)
        channels = self.feature_extractor.channels
        dimension = sum(channels) if target_embed_dimension is None else target_embed_dimension
        self.patch_aggregation = PatchAggregation(channels, patch_size, pretrain_embed_dimension, dimension)
        self.whitening = Whitening(dimension, whiten == "local", components) if whiten else None
        self.fine_map = None if map_layer is None else FineMap(map_layer, layers, channels, whiten)
        dimension = components or dimension
        self.adapter = Adapter(dimension, adapter_layers)
        self.anomaly_generator = AnomalyGenerator(noise_std, mix_noise, noise)
        self.discriminator = Discriminator(dimension, discriminator_layers, discriminator_hidden)
        self.anomaly_map_generator = AnomalyMapGenerator(sigma=4.0 if map_layer is None else 0.0)
        self.region: Region | None = None
        self.tiler: Any = None
        self.averaged = PolynomialAverage(self.trained) if averaging else None
        self._fused_head: FusedHead | None = None
        self._fused_from: tuple[float, ...] = ()
        self.register_load_state_dict_pre_hook(load_region)
        self.register_load_state_dict_post_hook(SimpleNetModel.fuse)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | InferenceBatch:
        """Score normalised images ``(N, 3, H, W)``, or in training mode real and fake patches.

        In training mode returns scores of real and fake patches, ``(N * h * w,)`` each, or as many as are drawn; in
        eval mode ``pred_score`` ``(N,)`` and ``anomaly_map`` ``(N, 1, H, W)``, higher for more anomalous, unbounded.
        """
        features = self.extract(images)  # of each layer (N, C, h, w)
        if self.training:
            embedding = self.patch_aggregation(features)  # (N, D, h, w), section 3.1
            white = embedding if self.whitening is None else self.whitening(embedding)
            patches = sample_patches(white, self.patch_fraction, self.region)  # (patches, D)
            adapted = self.adapter(patches)  # section 3.2
            noisy = self.anomaly_generator(adapted)  # section 3.3
            # In one batch: batch norm sees real and fake patches together, as in the authors' code.
            real, fake = self.discriminator(torch.cat([adapted, noisy])).chunk(2)  # section 3.4
            return real, fake

        patch_scores = -self.score_patches(features)  # (N, 1, h, w)
        grids = [patch_scores] if self.fine_map is None else [patch_scores, self.fine_map(features)]
        if self.region is None:
            highest = patch_scores.flatten(1).topk(min(self.top_patches, patch_scores[0].numel()), dim=1).values
            score = highest.mean(dim=1)
            anomaly_map = reduce(torch.add, [self.anomaly_map_generator(grid, images.shape[-2:]) for grid in grids])
        else:
            score, anomaly_map = self.region.summarise(grids, self.top_patches, self.anomaly_map_generator)
        # So that no exported model takes an image that it could not score for normal.
        unusable = non_finite(images if self.region is None else self.region.fill(images), grids)
        return InferenceBatch(
            pred_score=score.masked_fill(unusable, torch.inf),
            anomaly_map=anomaly_map.masked_fill(unusable[:, None, None, None], torch.inf),
        )

    def train(self, mode: bool = True) -> "SimpleNetModel":
        """Enter training or eval mode; eval mode fuses the head (:meth:`fuse`)."""
        super().train(mode)
        self.fuse()
        return self

    def extract(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract the backbone's maps from images ``(N, 3, H, W)``: for each layer ``(N, C, h, w)``."""
        images = equalize_brightness(images, self.region) if self.normalize_brightness else images
        images = images if self.region is None else self.region.fill(images)
        return extract_tiles(self.feature_extractor, images, self.tiler)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embed the patches of images ``(N, 3, H, W)``: ``(N, target_embed_dimension, h, w)``, on the first grid."""
        return self.patch_aggregation(self.extract(images))

    def discriminate(self, features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Score real and fake patches of feature maps as :meth:`forward` does in training mode, in fewer products."""
        parts, segments = self._parts(features)
        if self.patch_fraction < 1 or self.region is not None:
            local = self.whitening is not None and self.whitening.affine is None
            embedding = next(iter(parts)) if local else self.patch_aggregation(features)
            parts = sample_patches(embedding, self.patch_fraction, self.region)
        linear = [*self._global_whitening, *self.adapter]
        return noisy_scores(parts, segments, linear, self.anomaly_generator, self.discriminator)

    def score_patches(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Score patches of feature maps in eval mode, in fewer products (:class:`FusedHead`): ``(N, 1, h, w)``."""
        if not (torch.compiler.is_exporting() or torch.jit.is_tracing()):
            self.fuse()
        parts, _ = self._parts(features)
        return self._fused_head(parts).float()  # type: ignore[misc]

    @torch.compiler.disable
    def fuse(self, *_hook_arguments: object) -> None:
        """Bring the fused head up to date with changed weights, as eval mode and predictions do; not while tracing."""
        if self.training:
            self._fused_head = None  # callbacks that average models pair their buffers
            return
        adapter, discriminator = self.trained
        if self.averaged is not None and self.averaged.steps:
            adapter, discriminator = self.averaged.module
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            whitening = self._global_whitening
            fused_from = fingerprint([adapter, discriminator], whitening)
            if self._fused_head is None or fused_from != self._fused_from:
                linear, segments = [*whitening, *adapter], self._parts([])[1]
                self._fused_head, self._fused_from = FusedHead(linear, discriminator, segments), fused_from

    @property
    def trained(self) -> nn.ModuleList:
        """Adapter and discriminator."""
        return nn.ModuleList([self.adapter, self.discriminator])

    @property
    def _global_whitening(self) -> list[Affine]:
        affine = None if self.whitening is None else self.whitening.affine
        return [] if affine is None else [affine]

    def _parts(self, features: Sequence[torch.Tensor]) -> tuple[Iterable[torch.Tensor], list[slice]]:
        """What adds up to the embedding, each part on its layer's own grid, and the channels that each adds to."""
        if self.whitening is not None and self.whitening.affine is None:
            return (self.whitening(self.patch_aggregation(features)) for _ in range(1)), [slice(None)]
        return self.patch_aggregation.pool(features), self.patch_aggregation.segments
