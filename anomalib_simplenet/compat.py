"""Every use of a private or undocumented name of another library.

Each function says what it is for and where upstream discusses it; ``tests/unit/test_upstream.py`` says in a sentence
what changed should one stop working.
"""

from collections.abc import Iterator
from contextlib import contextmanager


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
