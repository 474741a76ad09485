"""Every use of a private or undocumented name of another library.

Each function says what it is for and where upstream discusses it; ``tests/unit/test_upstream.py`` says in a sentence
what changed should one stop working.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer


def run_validation(trainer: Trainer) -> None:
    """Validate in the middle of a fit, as Lightning does at an epoch's end.

    Purpose: thresholds for the last weights, whatever ended training. ``Trainer.validate`` would end the fit. The loop
    is reached by documented attributes, but running it by hand is not documented
    (https://github.com/Lightning-AI/pytorch-lightning/issues/8650 asks for a public way).
    """
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def resample_position_embeddings_without_antialias() -> None:
    """Have timm's ViTs interpolate position embeddings for other image sizes as exported models will.

    OpenVINO's reader of ONNX ignores ``antialias``. anomalib switches it off in the whole process as soon as one of
    its models builds a ViT (``TimmFeatureExtractor``): scores would depend on what was built before.
    """
    from anomalib.models.components.feature_extractors.timm import _disable_pos_embed_antialiasing

    _disable_pos_embed_antialiasing()


@contextmanager
def one_try_at_the_hub() -> Iterator[Exception | None]:
    """Ask the Hugging Face Hub once whether it is reachable; if not, take its cache alone, without more requests.

    ``hf_hub_download`` retries five times for each of timm's file names, over a minute in all, even where the file is
    in the cache, and no argument or variable limits that. ``HF_HUB_OFFLINE=1`` in the environment does, but is read
    when huggingface_hub is imported (https://github.com/huggingface/huggingface_hub/issues/1508).

    Yields:
        Exception | None: Why the hub is not reachable.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        yield OSError("HF_HUB_OFFLINE is set, and they are not in the cache.")
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # noqa: BLE001  # httpx's or requests', with the version of huggingface_hub
        constants.HF_HUB_OFFLINE = True
        try:
            yield OSError(f"{constants.ENDPOINT} is not reachable ({error or type(error).__name__}).")
        finally:
            constants.HF_HUB_OFFLINE = False
    else:
        yield None
