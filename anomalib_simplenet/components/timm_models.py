"""timm's models by name, from a folder or from the hub, with refusals as sentences."""

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from timm.models import load_model_config_from_hf
from torch import nn


def plain_args(backbone_args: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments as JSON gives them back, with lists for tuples: checkpoints hold nothing else."""
    try:
        return json.loads(json.dumps(dict(backbone_args or {})))
    except (TypeError, ValueError) as error:
        msg = f"backbone_args is {backbone_args!r}, expected a dictionary of numbers, strings and lists: {error}."
        raise ValueError(msg) from error


def saved_args(source: str, place: str) -> dict[str, Any]:
    """What config.json in a folder or on the hub gives ``timm.create_model``."""
    if source == "hf-hub":
        return load_model_config_from_hf(place)[2]
    return json.loads(Path(place, "config.json").read_text(encoding="utf-8")).get("model_args", {})


def first_words(error: BaseException) -> str:
    """An error's message in one line, or its name where it has none."""
    return " ".join(str(error).split())[:300] or f"{type(error).__name__}."


def create(backbone: str, unreachable: Exception | None, **kwargs: Any) -> nn.Module:  # noqa: ANN401
    """``timm.create_model``, with its refusals of a name or of arguments as ``ValueError``."""
    scheme, _, folder = backbone.rpartition(":")
    try:
        return timm.create_model(backbone, **kwargs)
    except TypeError as error:
        msg = f"backbone_args: timm cannot build {backbone!r} with them: {error}."
        raise ValueError(msg) from error
    except OSError as error:
        if not scheme or "out_indices" in kwargs:  # then only the weights are missing
            raise
        msg = (
            f"backbone {backbone!r}: {first_words(unreachable or error)} "
            + (f"The folder {folder!r} must hold timm's config.json and weights. " if scheme == "local-dir" else "")
            + "To load a checkpoint without them, name the architecture instead: the checkpoint holds the weights."
        )
        raise ValueError(msg) from error
    except RuntimeError as error:
        if not str(error).startswith(("Unknown model", "Invalid pretrained tag")):
            raise
        known = timm.list_models() + timm.list_pretrained()
        near = ", ".join(get_close_matches(backbone, known, n=5)) or "see timm.list_models()"
        msg = f"backbone {backbone!r} is no model of timm: {error}. Names like it: {near}."
        raise ValueError(msg) from error
