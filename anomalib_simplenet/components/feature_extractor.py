"""Frozen backbone."""

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import nn
from torch.fx import GraphModule
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

logger = logging.getLogger(__name__)


class PretrainedWeightsError(RuntimeError):
    """Raised on use of a backbone whose pre-trained weights could not be had, and no checkpoint brought them."""


class FeatureExtractor(nn.Module):
    """Feature maps of some layers of a frozen backbone, which is cut off after the last of them.

    Stays in eval mode and without gradients whatever the model around it does, so its batch-norm statistics never move.
    Where the pre-trained weights cannot be had, it is built all the same, with a warning, since a checkpoint may bring
    them; using it without raises.

    Args:
        backbone (str | nn.Module): Name of a CNN or a ``vit_*`` of timm, ``local-dir:FOLDER`` (a folder with timm's
            ``config.json`` and weights), or any module that torchvision's ``create_feature_extractor`` can trace.
        layers (Sequence[str]): Names of the layers, in any order.
        pre_trained (bool): Whether to load the backbone's ImageNet weights; without meaning for a module.
            Defaults to ``True``.

    Attributes:
        architecture (str | None): timm's name of the architecture, without weights; ``None`` for a module.
        channels (list[int]): Channels of each layer.
        stride (int): How many pixels of the image one position of the coarsest layer covers.
        patch_size (int): What height and width of images must be a multiple of; ``1`` for CNNs.

    Raises:
        ValueError: If the backbone is unknown, or ``layers`` is empty, repeats a layer or names an unknown one.
    """

    def __init__(self, backbone: str | nn.Module, layers: Sequence[str], pre_trained: bool = True) -> None:
        super().__init__()
        if isinstance(layers, str) or not layers or not all(isinstance(layer, str) for layer in layers):
            msg = f"layers is {layers!r}, expected a list with the name of at least one layer, such as ['layer2']."
            raise ValueError(msg)
        if len(set(layers)) != len(layers):
            msg = f"layers is {list(layers)}: each layer may be named once."
            raise ValueError(msg)
        self.layers = list(layers)
        self.patch_size = 1
        self.architecture: str | None = None
        self.missing_weights: PretrainedWeightsError | None = None
        self.register_load_state_dict_post_hook(_weights_loaded)
        if isinstance(backbone, nn.Module):
            self.net = self._trace(backbone)
        elif isinstance(backbone, str):
            self.net = self._create(backbone, pre_trained)
        else:
            msg = (
                f"backbone is {backbone!r}, expected the name of a timm model or an nn.Module. (A checkpoint trained "
                "with a module as backbone does not hold it: give it again, load_from_checkpoint(..., backbone=...).)"
            )
            raise ValueError(msg)  # noqa: TRY004  # one kind of error for all wrong arguments
        self.requires_grad_(requires_grad=False)
        self.train(mode=False)
        # 224 is a multiple of every common ViT patch size and of every CNN stride.
        probe = torch.zeros(1, 3, 224, 224)
        try:  # convolutions are faster in this layout, but Tensor.view() may refuse it
            self._arrange(channels_last=True)
            maps = list(self._extract(probe).values())
        except RuntimeError:
            self._arrange(channels_last=False)
            maps = list(self._extract(probe).values())
        if any(feature.ndim != 4 or feature.shape[-2] != feature.shape[-1] for feature in maps):
            msg = (
                f"backbone {backbone!r} does not give maps (N, C, h, w) at {', '.join(layers)}: take a CNN or a vit_*."
            )
            raise ValueError(msg)
        self.channels = [feature.shape[1] for feature in maps]
        self.stride = max(round(224 / feature.shape[-1]) for feature in maps)

    def train(self, mode: bool = True) -> "FeatureExtractor":  # noqa: ARG002
        """Stay in eval mode."""
        return super().train(mode=False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Extract feature maps.

        Args:
            images (torch.Tensor): Normalised images of shape ``(N, 3, H, W)``.

        Returns:
            dict[str, torch.Tensor]: Map of each layer, in the order asked for, of shape ``(N, C, h, w)``.

        Raises:
            PretrainedWeightsError: If the pre-trained weights could not be had.
        """
        if self.missing_weights is not None:
            raise self.missing_weights
        return self._extract(images)

    @torch.no_grad()
    def _extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.channels_last and not torch.compiler.is_exporting():
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.net(images)
        if not isinstance(features, dict):
            features = dict(zip(self.by_depth, features, strict=True))
        return {layer: features[layer] for layer in self.layers}

    def _arrange(self, channels_last: bool) -> None:
        self.channels_last = channels_last
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=memory_format)

    def _trace(self, backbone: nn.Module) -> nn.Module:
        _input, *nodes = get_graph_node_names(backbone.eval())[1]
        # A module stands for the last of its nodes.
        names = dict.fromkeys(".".join(node.split(".")[: depth + 1]) for depth in range(9) for node in nodes)
        self._check_layers(type(backbone).__name__, list(names))
        net = create_feature_extractor(backbone, return_nodes={layer: layer for layer in self.layers}).eval()
        # torchvision keeps two graphs, one to train, and forgets on deepcopy that it was in eval mode.
        return GraphModule(net, net.graph)

    def _create(self, backbone: str, pre_trained: bool) -> nn.Module:
        # On the meta device a model costs next to nothing. It tells the layers, and that the name is right.
        with torch.device("meta"):
            probe = _timm(backbone, features_only=True)
        names = probe.feature_info.module_name()
        is_transformer = isinstance(probe, FeatureGetterNet)
        if is_transformer:
            # timm lists the last blocks only.
            stem, last = names[-1].rsplit(".", 1)
            names = [f"{stem}.{block}" for block in range(int(last) + 1)]
        self._check_layers(backbone, names)
        self.architecture = (probe.model if is_transformer else probe).pretrained_cfg["architecture"]
        # timm returns maps by depth, whatever the order of the indices.
        self.by_depth = sorted(self.layers, key=names.index)
        out_indices = [names.index(layer) for layer in self.by_depth]
        build = self._create_transformer if is_transformer else self._create_cnn
        if pre_trained:
            try:
                return build(backbone, out_indices, pre_trained=True)
            except (OSError, RuntimeError) as error:
                msg = (
                    f"The pre-trained weights of backbone {backbone!r} cannot be had: {str(error).splitlines()[0]} "
                    "Without a network, give a folder with config.json and model.safetensors as 'local-dir:FOLDER' "
                    "(`python -m anomalib_simplenet.quickstart` makes one) or load a checkpoint, which holds the "
                    "weights. HF_HUB_OFFLINE=1 in the environment saves the wait for the hub."
                )
                logger.warning(msg)
                self.missing_weights = PretrainedWeightsError(msg)
        return build(backbone, out_indices, pre_trained=False)

    def _create_cnn(self, backbone: str, out_indices: list[int], pre_trained: bool) -> nn.Module:
        net = _timm(backbone, pretrained=pre_trained, features_only=True, out_indices=out_indices)
        if hasattr(net, "_stage_out_idx"):
            # EfficientNet and MobileNet are the families that timm does not cut off.
            net.blocks = net.blocks[: max(net._stage_out_idx)]  # noqa: SLF001
        return net

    def _create_transformer(self, backbone: str, out_indices: list[int], pre_trained: bool) -> nn.Module:
        if "vit" not in backbone.lower():
            msg = f"backbone {backbone!r} is a transformer that anomalib cannot turn into maps: take a CNN or a vit_*."
            raise ValueError(msg)
        # Here and not above: it imports anomalib's models, and with them (registry.py) the model that imports this.
        from anomalib.models.components import TimmFeatureExtractor

        net = TimmFeatureExtractor(backbone, self.by_depth, pre_trained)
        net.feature_extractor.prune_intermediate_layers(out_indices, prune_head=True)
        self.patch_size = net.patch_size
        return net

    def _check_layers(self, backbone: str, names: list[str]) -> None:
        if unknown := [layer for layer in self.layers if layer not in names]:
            known = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
            msg = f"layers: {', '.join(unknown)} not found in backbone {backbone!r}, which has {known}."
            raise ValueError(msg)


def _weights_loaded(extractor: FeatureExtractor, incompatible_keys: Any) -> None:  # noqa: ANN401
    if not incompatible_keys.missing_keys:
        extractor.missing_weights = None


def _timm(backbone: str, **kwargs: Any) -> nn.Module:  # noqa: ANN401
    """``timm.create_model``, with its refusals of a name as ``ValueError``."""
    scheme, _, folder = backbone.rpartition(":")
    try:
        return timm.create_model(backbone, **kwargs)
    except FileNotFoundError as error:
        if scheme != "local-dir":
            raise
        msg = (
            f"backbone {backbone!r}: {error}. The folder {folder!r} must hold timm's config.json and weights. "
            "To load a checkpoint without that folder, name the architecture instead: the checkpoint holds the weights."
        )
        raise ValueError(msg) from error
    except RuntimeError as error:
        if not str(error).startswith(("Unknown model", "Invalid pretrained tag")):
            raise
        known = timm.list_models() + timm.list_pretrained()
        near = ", ".join(get_close_matches(backbone, known, n=5)) or "see timm.list_models()"
        msg = f"backbone {backbone!r} is no model of timm: {error}. Names like it: {near}."
        raise ValueError(msg) from error
