"""SimpleNet (CVPR 2023) as a model of anomalib.

Importing this package imports neither torch nor anomalib: the names below are loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lightning_model import SimpleNet
    from .torch_model import SimpleNetModel

__all__ = ["SimpleNet", "SimpleNetModel"]

_MODULES = {"SimpleNet": ".lightning_model", "SimpleNetModel": ".torch_model"}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name == "__version__":
        from importlib.metadata import version

        return version("anomalib-simplenet")
    if name not in _MODULES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_MODULES[name], __name__), name)
