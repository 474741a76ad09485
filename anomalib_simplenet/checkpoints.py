"""Checkpoints that load without network, folder or arguments: they hold weights and architecture."""

import logging
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule
from torch import nn

from .torch_model import SimpleNetModel

logger = logging.getLogger(__name__)

FORMAT, READABLE = 3, {2, 3}  # those of format 2 have top_patches and rate among the hyper-parameters
ARCHITECTURE = {name: parameter.default for name, parameter in signature(SimpleNetModel).parameters.items()}
_NOT_IN_WEIGHTS = {"pre_trained", "noise_std", "mix_noise", "noise", "patch_fraction", "top_patches"}
# What inference can be asked for, with the values that mean unset: a checkpoint's then count.
UNSET = {
    "false_alarm_rate": None,
    "image_sensitivity": 0.5,
    "pixel_sensitivity": 0.5,
    "top_patches": ARCHITECTURE["top_patches"],
}


def portable(hyper_parameters: Mapping[str, Any], model: SimpleNetModel) -> dict[str, Any]:
    """Arguments, of plain types, that rebuild a model anywhere, from those that it was built with.

    They hold all of the architecture, the backbone as timm's name and arguments, or ``None`` for a module. What a
    checkpoint keeps elsewhere is unset: a model built with it would seem to have been asked for it.
    """
    unset = {"pre_trained": False, "region": None, "false_alarm_rate": None, "top_patches": UNSET["top_patches"]}
    arguments = {**ARCHITECTURE, **hyper_parameters, **model.feature_extractor.config, **unset}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in arguments.items()}


def differing(
    checkpoint: Mapping[str, Any], hyper_parameters: Mapping[str, Any], model: SimpleNetModel
) -> dict[str, Any]:
    """Arguments of the architecture that a checkpoint needs, where they differ from those a model was built with.

    Raises:
        ValueError: If it is no checkpoint of SimpleNet, or of a state before the first release.
    """
    if "model.discriminator.tail.weight" not in checkpoint["state_dict"]:
        msg = "This is no checkpoint of SimpleNet: it has no discriminator. Pass its own model with --model."
        raise ValueError(msg)
    if checkpoint.get("simplenet_format") not in READABLE:
        msg = (
            f"The checkpoint has format {checkpoint.get('simplenet_format')}, expected {FORMAT}: it was made by "
            "another version of anomalib-simplenet. Use that version, or train again."
        )
        raise ValueError(msg)
    # Older checkpoints lack arguments added since.
    saved, own = {**ARCHITECTURE, **checkpoint["hyper_parameters"]}, portable(hyper_parameters, model)
    if isinstance(saved["backbone"], nn.Module):  # load_from_checkpoint puts its arguments among them
        saved = {**saved, "backbone": None}
    names = ARCHITECTURE.keys() - _NOT_IN_WEIGHTS
    found = {name: saved[name] for name in names if _comparable(saved[name]) != _comparable(own[name])}
    if found and None in {saved["backbone"], own["backbone"]}:
        msg = f"The checkpoint was trained with {found}: build the model with these; it does not hold a module."
        raise ValueError(msg)
    return found


class Requests:
    """Which settings of inference the user asked a model for, though checkpoints bring others, one after another."""

    def __init__(self) -> None:
        self._brought: dict[str, Any] = {}

    def of(self, module: LightningModule) -> dict[str, Any]:
        """Settings that are neither unset nor those that the last checkpoint brought."""
        now = _in_force(module).items()
        return {name: value for name, value in now if value not in {UNSET[name], self._brought.get(name)}}

    def restore(self, module: LightningModule, requested: Mapping[str, Any], top_patches: int) -> None:
        """Put settings back that a checkpoint, whose ``top_patches`` these are, has just replaced with its own.

        A sensitivity of 0.5 cannot be told from unset: the checkpoint's then stays, with a warning.

        Raises:
            ValueError: If a rate is asked for, and the checkpoint was trained without post-processor.
        """
        module.model.top_patches = top_patches
        self._brought = _in_force(module)
        for name, value in requested.items():
            if (owner := _owner(module, name)) is not None:
                setattr(owner, name, value)
            elif name == "false_alarm_rate":
                msg = f"false_alarm_rate is {value}, but the checkpoint was trained without post_processor: omit it."
                raise ValueError(msg)
            del self._brought[name]
        for name in ("image_sensitivity", "pixel_sensitivity"):
            if self._brought.get(name, UNSET[name]) != UNSET[name]:
                logger.warning(
                    "Using %s=%s from the checkpoint. %s cannot be told from unset: for it, pass %s.",
                    *(name, self._brought[name], UNSET[name], UNSET[name] + 1e-3),
                )
        if requested.get("top_patches", top_patches) != top_patches:
            logger.warning(
                "top_patches is %d, but thresholds and p-values of the checkpoint are those of %d: validate anew.",
                *(requested["top_patches"], top_patches),
            )


def _in_force(module: LightningModule) -> dict[str, Any]:
    return {name: getattr(_owner(module, name), name, unset) for name, unset in UNSET.items()}


def _owner(module: LightningModule, name: str) -> Any:  # noqa: ANN401
    return module.model if name == "top_patches" else module.post_processor


def _comparable(value: Any) -> Any:  # noqa: ANN401
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
