"""What the trainer lacks: errors that name the image, and several processes that share images and results."""

import logging
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, SupportsIndex
from zipfile import is_zipfile

import wrapt
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

logger = logging.getLogger(__name__)


def mend_loaders(trainer: Trainer) -> None:
    """Let the trainer, about to run, give the data loaders that it is going to ask for what they lack.

    Images that cannot be read raise with their name. Those whose pixels have more than eight bits, which anomalib cuts
    off, are named in a warning. Several processes that validate or test share the images without repeating some.
    """
    fit = trainer.fit_loop
    for loop in (fit, fit.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        repeats = loop in {fit, trainer.predict_loop}  # training needs as many batches for each; Lightning predicts so
        source = loop._data_source  # noqa: SLF001
        loop._data_source = _Source(source.instance, source.name, None if repeats else trainer)  # noqa: SLF001


def share_results_folder(trainer: Trainer) -> None:
    """Let all processes write into the first one's folder; anomalib makes another version of it for each."""
    own = Path(trainer.default_root_dir)
    shared = Path(trainer.strategy.broadcast(str(own)))
    if own != shared:
        trainer._default_root_dir = str(shared)  # noqa: SLF001
        if own.is_dir() and not any(own.iterdir()):
            own.rmdir()
    trainer.strategy.barrier()
    latest = shared.absolute().with_name("latest")
    if trainer.is_global_zero and latest.is_symlink() and not latest.exists():  # it named one of those
        latest.unlink()
        latest.symlink_to(shared.absolute(), target_is_directory=True)


def check_checkpoints(trainer: Trainer) -> None:
    """Let the trainer name a checkpoint that was cut off, instead of a byte that it could not read."""
    if not isinstance(trainer.strategy.checkpoint_io, _CheckingIO):
        trainer.strategy.checkpoint_io = _CheckingIO(trainer.strategy.checkpoint_io)


class _CheckingIO(wrapt.ObjectProxy):
    def load_checkpoint(self, path: str | Path, *args, **kwargs) -> dict[str, Any]:
        if Path(path).is_file() and not is_zipfile(path):
            msg = f"{path} is no checkpoint, or was cut off while it was written or copied: take another."
            raise ValueError(msg)
        return self.__wrapped__.load_checkpoint(path, *args, **kwargs)


class _Source(_DataLoaderSource):
    def __init__(self, instance: Any, name: str, trainer: Trainer | None) -> None:  # noqa: ANN401
        super().__init__(instance, name)
        self.trainer = trainer

    def dataloader(self) -> Any:  # noqa: ANN401
        return apply_to_collection(super().dataloader(), DataLoader, self._mend)

    def _mend(self, loader: DataLoader) -> DataLoader:
        if type(loader) is not DataLoader:
            return loader
        paths = _paths(loader.dataset)
        if paths is not None and not isinstance(loader.dataset, _Naming):
            loader = altered(loader, dataset=_Naming(loader.dataset, paths))
        trainer = self.trainer
        if (
            trainer is not None
            and 1 < trainer.world_size <= len(loader.dataset)
            and trainer._accelerator_connector.use_distributed_sampler  # noqa: SLF001
            and type(loader.sampler) is SequentialSampler
            and type(loader.batch_sampler) is BatchSampler
        ):
            sampler = UnrepeatedDistributedSampler(loader.dataset, **trainer.distributed_sampler_kwargs, shuffle=False)
            batches = BatchSampler(sampler, loader.batch_sampler.batch_size, loader.batch_sampler.drop_last)
            loader = altered(loader, sampler=sampler, batch_sampler=batches)
        return loader


def altered(loader: DataLoader, **attributes: Any) -> DataLoader:  # noqa: ANN401
    """A copy of a data loader with other attributes, also those that it refuses to have set."""
    loader = copy(loader)
    # Lightning may have noted on it how to build it again; it may keep workers, which read the old data set.
    for name in [name for name in vars(loader) if name.startswith("__pl_saved")]:
        del vars(loader)[name]
    vars(loader).update(attributes, _iterator=None)
    return loader


def _paths(dataset: Dataset) -> Sequence[str | Path] | None:
    """Files of anomalib's data sets, by place."""
    if hasattr(dataset, "image_filenames"):
        return dataset.image_filenames
    samples = getattr(dataset, "samples", None)
    return None if samples is None or "image_path" not in samples else list(samples.image_path)


class _Naming(wrapt.ObjectProxy):
    """A data set that names images which it cannot read, or not in full."""

    def __init__(self, dataset: Dataset, paths: Sequence[str | Path]) -> None:
        super().__init__(dataset)
        self._self_paths = paths
        self._self_warned = False

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401
        path = self._self_paths[index]
        try:
            item = self.__wrapped__[index]
        except Exception as error:
            msg = f"{path}, or its mask, cannot be read: {type(error).__name__}: {error}. Mend it or take it away."
            raise ValueError(msg) from error
        if not self._self_warned:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    logger.warning(
                        "%s has more than 8 bits a pixel (%s), and anomalib takes all above 255 for white: convert "
                        "such images to 8 bits.",
                        path,
                        image.mode,
                    )
                    self._self_warned = True
        return item

    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[type, tuple[Dataset, Sequence[str | Path]]]:
        return _Naming, (self.__wrapped__, self._self_paths)  # for workers that are not forked
