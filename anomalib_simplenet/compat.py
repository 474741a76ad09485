"""Every use of a private or undocumented name of another library.

Each function says what it is for and where upstream discusses it; ``tests/unit/test_upstream.py`` says in a sentence
what changed should one stop working.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from torch.utils.data import DataLoader


def wrap_dataloaders(loop: Any, name: str, wrap: Callable[[Any], Any] | None) -> None:  # noqa: ANN401
    """Pass the data loaders that one of the trainer's loops is going to ask for through a function.

    Lightning has no hook between a data loader's making and its use: the one that there was went away with
    https://github.com/Lightning-AI/pytorch-lightning/issues/8758, and #21448 asks for another. Wrapping when the loop
    asks, not before, lets tuners change the batch size.

    Args:
        loop (Any): Such as ``trainer.fit_loop``.
        name (str): Of the function, among those of this loop: another of the same name replaces it.
        wrap (Callable | None): From data loaders, as data modules or users give them, to data loaders; ``None``
            removes the function.
    """
    source = loop._data_source  # noqa: SLF001
    wraps = {**getattr(source, "wraps", {}), name: wrap}
    loop._data_source = _WrappedSource(source.instance, source.name)  # noqa: SLF001
    loop._data_source.wraps = wraps  # noqa: SLF001


class _WrappedSource(_DataLoaderSource):
    wraps: dict[str, Callable[[Any], Any] | None]

    def dataloader(self) -> Any:  # noqa: ANN401
        loaders = super().dataloader()
        for wrap in filter(None, self.wraps.values()):
            loaders = wrap(loaders)
        return loaders


def clone_dataloader(loader: DataLoader, **attributes: Any) -> DataLoader:  # noqa: ANN401
    """Copy a data loader, of whichever class, with other attributes and workers of its own.

    torch refuses another ``dataset`` after construction (https://github.com/pytorch/pytorch/pull/23744), and keeps
    persistent workers, which read the old one, in ``_iterator`` (#35795). Lightning notes the arguments of construction
    on it, in ``__pl_saved_*``, to build it again for several processes: without them it takes the attributes.
    """
    clone = copy(loader)
    for name in [name for name in vars(clone) if name.startswith("__pl_saved")]:
        del vars(clone)[name]
    vars(clone).update(attributes, _iterator=None)
    return clone


def release_workers(loader: DataLoader) -> None:
    """Load in this process from the next epoch on, and stop persistent workers, which ``_iterator`` keeps (#35795)."""
    loader.num_workers = loader.timeout = 0
    loader._iterator = None  # noqa: SLF001


def batch_to_device(trainer: Trainer, batch: Any) -> Any:  # noqa: ANN401
    """Move a batch to the device as Lightning's training loop does, with all the hooks of model and data module.

    ``strategy.batch_to_device`` alone leaves out ``on_before_batch_transfer``, which the loops call
    (https://github.com/Lightning-AI/pytorch-lightning/issues/14066).
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)  # noqa: SLF001
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
