"""Feature maps of the training images, kept from the first time that each is seen."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from anomalib_simplenet.compat import batch_to_device, clone_dataloader, release_workers, wrap_dataloaders

from .feature_store import CachedBatch, CachedCollate, FeatureStore, IndexedDataset, MissingImages, free_memory, refuse

_FRACTION_OF_FREE_MEMORY = 0.5
_DETERMINISTIC = (v2.Resize, v2.CenterCrop, v2.Pad, v2.Normalize, v2.ToDtype, v2.ToImage, v2.Grayscale, v2.RGB)
_HOOKS_WITH_A_BATCH = (
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_train_batch_start",
    "training_step",
)
_KNOWN_PACKAGES = {"anomalib", "anomalib_simplenet", "lightning", "pytorch_lightning"}


class FeatureCache(Callback):
    """Keep the feature maps of a frozen backbone in main memory, so that it sees each training image once.

    Puts a data loader of :class:`CachedBatch` between the training data and the model, unless there is a reason not
    to, and fills in each batch's features. Must stand after the pre-processor in the trainer's callbacks.

    Args:
        mode (bool | str): ``False`` for no cache; ``"auto"`` for none, and a line in the log, where images may differ
            from epoch to epoch or the maps do not fit; ``True`` to raise in these cases, but to trust data sets, data
            loaders, hooks and callbacks that are not anomalib's.
        memory (float | None): GiB that the maps may take; ``None`` for half of what is free, shared by the processes
            of this machine.
        dtype (str): ``"float16"`` or ``"float32"``.
    """

    def __init__(
        self, mode: bool | Literal["auto"], memory: float | None, dtype: Literal["float16", "float32"]
    ) -> None:
        self.mode, self.memory = mode, memory
        self.dtype = {"float16": torch.float16, "float32": torch.float32}[dtype]
        self.store: FeatureStore | None = None
        self._logged = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the training data loader wrapped when the trainer asks for it."""
        if stage == "fit" and self.mode is not False:
            wrap_dataloaders(trainer.fit_loop, "cache", partial(self._wrap, trainer, pl_module))

    def _wrap(self, trainer: Trainer, pl_module: LightningModule, loader: Any) -> Any:  # noqa: ANN401
        self.store = None  # frees the memory of an earlier one
        pre_processor = getattr(pl_module, "pre_processor", None)
        reason = next(_reasons_against(trainer, loader, pre_processor, trusting=self.mode is True), None)
        if reason is not None:
            if not self._logged:  # the trainer may load the data again and again
                refuse(reason, required=self.mode is True)
            self._logged = True
            return loader
        if self.memory is None:
            memory = int(free_memory() * _FRACTION_OF_FREE_MEMORY) // trainer.num_devices
        else:
            memory = int(self.memory * 2**30)
        self.store = FeatureStore(len(loader.dataset), self.dtype, memory, required=self.mode is True)
        dataset = IndexedDataset(loader.dataset, self.store.seen)
        return clone_dataloader(loader, dataset=dataset, collate_fn=CachedCollate(loader.collate_fn))

    def on_train_epoch_start(self, trainer: Trainer, _pl_module: LightningModule) -> None:
        """Stop the data loader's workers once they have nothing left to read."""
        if self.store is not None and self.store.complete:
            release_workers(trainer.train_dataloader)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, _batch_idx: int) -> None:  # noqa: ANN401
        """Fill in the features of a cached batch, and remove its images, which later batches do not have."""
        if isinstance(batch, CachedBatch) and self.store is not None:
            with trainer.precision_plugin.train_step_context():
                features = self.store.features(batch, pl_module.model.extract)
            batch.features, batch.image, batch.gt_mask = features, MissingImages(), None

    def teardown(self, trainer: Trainer, _pl_module: LightningModule, stage: str) -> None:
        """Free the maps."""
        if stage == "fit":
            self._release(trainer)

    def on_exception(self, trainer: Trainer, _pl_module: LightningModule, _exception: BaseException) -> None:
        """Free the maps."""
        self._release(trainer)

    def _release(self, trainer: Trainer) -> None:
        self.store = None
        wrap_dataloaders(trainer.fit_loop, "cache", None)


def iterate_features(trainer: Trainer, pl_module: LightningModule, title: str) -> Iterator[list[torch.Tensor]]:
    """Pass once over the training images, as they are at the start of training, and fill the cache if there is one.

    Draws no random numbers of the training's: whether there is a pass does not change it.

    Args:
        trainer (Trainer): In ``on_train_start`` or later.
        pl_module (LightningModule): With a ``model`` that has ``extract``.
        title (str): For the progress bar, which is shown where the trainer shows its own.

    Yields:
        list[torch.Tensor]: Feature maps of a batch in float32, for each layer ``(N, C, h, w)``.

    Raises:
        ValueError: If the number of batches is not known, so that the pass might never end.
    """
    count = trainer.num_training_batches
    if count == float("inf"):
        msg = f"{title} needs one pass over the training images, but their number is unknown: set limit_train_batches."
        raise ValueError(msg)
    loader = trainer.train_dataloader
    if isinstance(loader, DataLoader):  # persistent workers have the first epoch's batches ready: use others
        loader = clone_dataloader(loader)
    preparing = [
        callback.on_train_batch_start
        for callback in trainer.callbacks
        if isinstance(callback, FeatureCache | PreProcessor)
    ]
    bar = trainer.progress_bar_callback
    hidden = bar is None or not bar.is_enabled or not trainer.is_global_zero
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for index, loaded in enumerate(tqdm(islice(loader, int(count)), title, int(count), disable=hidden)):
            batch = batch_to_device(trainer, loaded)
            for prepare in preparing:
                prepare(trainer, pl_module, batch, index)
            if isinstance(batch, CachedBatch):
                features = batch.features
            else:
                with trainer.precision_plugin.train_step_context():
                    features = pl_module.model.extract(batch.image)
            yield [maps.float() for maps in features]


def _reasons_against(trainer: Trainer, loader: Any, pre_processor: Any, *, trusting: bool) -> Iterator[str]:  # noqa: ANN401
    """Why images need not be the same in every epoch, and what to change."""
    if trainer.reload_dataloaders_every_n_epochs:
        yield "the trainer reloads the training data: set reload_dataloaders_every_n_epochs to 0"
    if not isinstance(loader, DataLoader):
        yield f"the training data are no DataLoader but {type(loader).__name__}: give one"
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        yield "the DataLoader makes no batches of numbered images: give it a map-style data set and a batch size"
    rebuilt = trainer.world_size > 1 or trainer.overfit_batches
    if rebuilt and (type(loader) is not DataLoader or type(loader.batch_sampler) is not BatchSampler):
        yield "Lightning cannot build this DataLoader again: give a plain one, with a sampler and a batch size"
    if not trusting and (custom := _custom_code(trainer, loader, pre_processor)):
        yield f"{custom} may give other images in every epoch: set feature_cache to true if that is not so"
    augmentations = getattr(loader.dataset, "augmentations", None)
    transforms = [*_flat(augmentations), *_flat(getattr(pre_processor, "transform", None))]
    if random := [type(step).__name__ for step in transforms if type(step) not in _DETERMINISTIC]:
        yield f"{', '.join(random)} may change the training images in every epoch: leave it out"


def _custom_code(trainer: Trainer, loader: DataLoader, pre_processor: Any) -> str | None:  # noqa: ANN401
    """What between file and model is not anomalib's or Lightning's, and so may do anything."""
    if type(loader) is not DataLoader:
        return type(loader).__name__
    if loader.dataset.__class__.__module__.partition(".")[0] != "anomalib":
        return loader.dataset.__class__.__name__
    if loader.collate_fn != loader.dataset.collate_fn:
        return "the DataLoader's collate_fn"
    if pre_processor is not None and type(pre_processor) is not PreProcessor:
        return type(pre_processor).__name__
    for owner in (trainer.lightning_module, trainer.datamodule, *trainer.callbacks):
        for hook in _HOOKS_WITH_A_BATCH:
            method = getattr(owner, hook, None)
            if method is not None and method.__module__.partition(".")[0] not in _KNOWN_PACKAGES:
                return f"{type(owner).__name__}.{hook}"
    return None


def _flat(transform: Any) -> Iterator[Any]:  # noqa: ANN401
    if type(transform) is v2.Compose:  # a subclass may do anything
        for step in transform.transforms:
            yield from _flat(step)
    elif transform is not None:
        yield transform
