"""How anomalib finds SimpleNet although it has no plug-in entry point.

``anomalib --model NAME`` and ``get_model`` look among classes that are already imported, so the model has to be
imported and published whenever anomalib's models are, by whoever. Three steps do it, in every order of imports:

1. :func:`autoload` is an entry point of the group ``torch.backends``: PyTorch calls it at the end of ``import torch``.
2. It registers a hook that imports our model right after ``anomalib.models.image``. Hooking ``anomalib.models`` itself
   fails: torch is often first imported while that package is still being imported.
3. The decorator :func:`register` publishes the class. The hook cannot: where our module is imported first, the hook
   meets it half made. For the same reason, no module that ``lightning_model`` needs may import ``anomalib.models``.

``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` switches this off; ``--model anomalib_simplenet.SimpleNet`` still works then.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import TypeVar

logger = logging.getLogger(__name__)

_T = TypeVar("_T", bound=type)


def autoload() -> None:
    """Arrange for SimpleNet to be imported with anomalib's models.

    Called by ``import torch``, where an exception would break PyTorch for everybody in the environment: never raises.
    """
    with _exceptions_logged():
        from wrapt import register_post_import_hook

        register_post_import_hook(partial(_import, "anomalib_simplenet.lightning_model"), "anomalib.models.image")
        # Inferencers take the p-values of exports, with no model imported.
        register_post_import_hook(partial(_import, "anomalib_simplenet.calibration"), "anomalib.deploy.inferencers")


def register(cls: _T) -> _T:
    """Publish a model class where anomalib looks models up by name; use as a class decorator.

    The class says that it lives there: ``get_model`` refuses class paths of other packages, such as those that a saved
    ``config.yaml`` would name.
    """
    cls.__module__ = "anomalib.models"
    for module in ("anomalib.models", "anomalib.models.image"):
        setattr(sys.modules[module], cls.__name__, cls)
    return cls


def _import(name: str, _module: ModuleType) -> None:
    with _exceptions_logged():  # anomalib must stay usable without us
        import_module(name)


@contextmanager
def _exceptions_logged() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001
        # Logged, since warnings.warn raises where warnings are errors.
        problem = "anomalib-simplenet could not register its model with anomalib, so `--model SimpleNet` is unknown"
        logger.warning("%s: %r", problem, error)
