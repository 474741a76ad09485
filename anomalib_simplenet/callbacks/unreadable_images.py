"""Errors and warnings that name the image file."""

import logging
from contextlib import suppress
from functools import partial
from typing import Any, SupportsIndex

import wrapt
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from anomalib_simplenet.compat import clone_dataloader, data_loops, wrap_dataloaders

logger = logging.getLogger(__name__)
UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for files cut off or damaged


class UnreadableImages(Callback):
    """Name image files that anomalib's data sets cannot read, or of which they cut off bits.

    Data sets with their own ``__getitem__`` are left alone: what they read, and what their errors mean, is theirs.
    """

    def setup(self, trainer: Trainer, *_args: object, **_kwargs: object) -> None:
        """Have the data loaders wrapped when the trainer asks for them."""
        for loop in data_loops(trainer):
            wrap_dataloaders(loop, "paths", partial(apply_to_collection, dtype=DataLoader, function=_wrap))


def _wrap(loader: DataLoader) -> DataLoader:
    read = getattr(type(loader.dataset), "__getitem__", None)
    if type(loader) is not DataLoader or getattr(read, "__module__", "").partition(".")[0] != "anomalib":
        return loader
    paths = image_paths(loader.dataset)
    if not paths:
        return loader
    with suppress(*UNREADABLE), Image.open(paths[0]) as image:  # the header of one image alone
        if image.mode.startswith(("I", "F")):
            logger.warning("%s has more than 8 bits a pixel, of which anomalib takes 8: convert such images.", paths[0])
    return clone_dataloader(loader, dataset=PathErrorDataset(loader.dataset))


def image_paths(dataset: Any) -> list[Any]:  # noqa: ANN401
    """Files of ``PredictDataset``, of other data sets of images, or none."""
    samples: Any = getattr(dataset, "samples", None)  # a table in anomalib's data sets
    paths = samples["image_path"] if "image_path" in getattr(samples, "columns", ()) else []
    return list(getattr(dataset, "image_filenames", paths))


class PathErrorDataset(wrapt.ObjectProxy):
    """A data set of anomalib that names images which it cannot read, or not in full."""

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401
        try:
            return self.__wrapped__[index]
        except UNREADABLE as error:
            if getattr(error, "filename", None) is not None:
                raise  # of the operating system, which names the file
            problem = f"cannot be read: {type(error).__name__}: {error}. Replace or remove the file."
            msg = f"{image_paths(self)[index]}, or its mask, {problem}"
            raise ValueError(msg) from error

    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[type, tuple[Dataset]]:
        return PathErrorDataset, (self.__wrapped__,)  # for workers that are not forked
