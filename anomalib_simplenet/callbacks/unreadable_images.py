"""Errors and warnings that name the image file."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import wrapt
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from anomalib_simplenet.compat import clone_dataloader, wrap_dataloaders

logger = logging.getLogger(__name__)
_UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for files cut off or damaged


class UnreadableImages(Callback):
    """Name image files that anomalib's data sets cannot read, or of which they cut off bits.

    Data sets with their own ``__getitem__`` are left alone: what they read, and what their errors mean, is theirs.
    """

    def setup(self, trainer: Trainer, _pl_module: LightningModule, stage: str) -> None:
        """Have the data loaders wrapped when the trainer asks for them."""
        fit = trainer.fit_loop
        loops = {
            "fit": (fit, fit.epoch_loop.val_loop),
            "validate": (trainer.validate_loop,),
            "test": (trainer.test_loop,),
            "predict": (trainer.predict_loop,),
        }
        for loop in loops[stage]:
            wrap_dataloaders(loop, "paths", _wrap_all)


def _wrap_all(loaders: Any) -> Any:  # noqa: ANN401
    return apply_to_collection(loaders, DataLoader, _wrap)


def _wrap(loader: DataLoader) -> DataLoader:
    dataset = loader.dataset
    read = getattr(type(dataset), "__getitem__", None)
    if type(loader) is not DataLoader or getattr(read, "__module__", "").partition(".")[0] != "anomalib":
        return loader
    if hasattr(dataset, "image_filenames"):
        paths = list(dataset.image_filenames)
    else:
        samples = getattr(dataset, "samples", None)
        if samples is None or "image_path" not in samples:
            return loader
        paths = list(samples.image_path)
    _warn_of_lost_bits(paths[:1])
    return clone_dataloader(loader, dataset=PathErrorDataset(dataset, paths))


def _warn_of_lost_bits(paths: Sequence[str | Path]) -> None:
    for path in paths:
        try:
            with Image.open(path) as image:  # its header alone
                mode = image.mode
        except _UNREADABLE:
            return  # which is an error when, and if, it is read
        if mode.startswith(("I", "F")):
            logger.warning(
                "%s has more than 8 bits a pixel (%s), and anomalib takes all above 255 for white: convert such images "
                "to 8 bits. Only the first image of a data set is checked.",
                path,
                mode,
            )


class PathErrorDataset(wrapt.ObjectProxy):
    """A data set of anomalib that names images which it cannot read, or not in full."""

    def __init__(self, dataset: Dataset, paths: Sequence[str | Path]) -> None:
        super().__init__(dataset)
        self._self_paths = paths

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401
        try:
            return self.__wrapped__[index]
        except _UNREADABLE as error:
            if getattr(error, "filename", None) is not None:
                raise  # of the operating system, which names the file
            msg = (
                f"{self._self_paths[index]}, or its mask, cannot be read: {type(error).__name__}: {error}. "
                "Replace or remove the file."
            )
            raise ValueError(msg) from error

    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[type, tuple[Dataset, Sequence[str | Path]]]:
        return PathErrorDataset, (self.__wrapped__, self._self_paths)  # for workers that are not forked
