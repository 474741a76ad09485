"""Checkpoints that load without network, folder or arguments: they hold weights and architecture."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
from anomalib.post_processing import PostProcessor
from torch import nn

from .torch_model import SimpleNetModel

logger = logging.getLogger(__name__)

FORMAT = 2
ARCHITECTURE = {name: parameter.default for name, parameter in signature(SimpleNetModel).parameters.items()}
_NOT_IN_WEIGHTS = {"pre_trained", "noise_std", "mix_noise", "noise", "patch_fraction"}
INFERENCE = {"top_patches"}
_DEFAULT_SENSITIVITY = 0.5


def portable(hyper_parameters: Mapping[str, Any], model: SimpleNetModel) -> dict[str, Any]:
    """Arguments, of plain types, that rebuild a model anywhere, from those that it was built with.

    They hold all of the architecture, the backbone as timm's name and arguments, or ``None`` for a module.
    """
    in_weights = {"pre_trained": False, "region": None}
    arguments = {**ARCHITECTURE, **hyper_parameters, **model.feature_extractor.config, **in_weights}
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
    if checkpoint.get("simplenet_format") != FORMAT:
        msg = (
            f"The checkpoint has format {checkpoint.get('simplenet_format')}, expected {FORMAT}: it was made by "
            "another version of anomalib-simplenet. Use that version, or train again."
        )
        raise ValueError(msg)
    saved, own = checkpoint["hyper_parameters"], portable(hyper_parameters, model)
    if isinstance(saved["backbone"], nn.Module):  # load_from_checkpoint puts its arguments among them
        saved = {**saved, "backbone": None}
    found = {}
    for name in ARCHITECTURE.keys() - _NOT_IN_WEIGHTS:
        requested = name in INFERENCE and own[name] != ARCHITECTURE[name]
        if _comparable(saved[name]) != _comparable(own[name]) and not requested:
            found[name] = saved[name]
    if found and None in {saved["backbone"], own["backbone"]}:
        msg = f"The checkpoint was trained with {found}: build the model with these; it does not hold a module."
        raise ValueError(msg)
    return found


@contextmanager
def keep_sensitivities(processor: nn.Module | None) -> Iterator[None]:
    """Load a checkpoint without losing the sensitivities that the user gave a post-processor.

    The default of 0.5 cannot be told from unset: the checkpoint's then stays, with a warning.
    """
    names = ("image_sensitivity", "pixel_sensitivity") if isinstance(processor, PostProcessor) else ()
    requested = {name: getattr(processor, name) for name in names}
    yield
    for name, value in requested.items():
        saved = getattr(processor, name)
        if value != _DEFAULT_SENSITIVITY:
            setattr(processor, name, value)
        elif saved != value:
            logger.warning(
                "Using %s=%s from the checkpoint. %s cannot be told from unset: for it, pass %s.",
                *(name, saved, value, _DEFAULT_SENSITIVITY + 1e-3),
            )


def _comparable(value: Any) -> Any:  # noqa: ANN401
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
