"""Feature maps of the training images, kept from the first time that each is seen."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from anomalib_simplenet.checks import check_number
from anomalib_simplenet.compat import batch_to_device, clone_dataloader, release_workers, wrap_dataloaders

from .feature_store import CachedBatch, FeatureStore, IndexedDataset, MissingImages, collate_unseen, free_memory, refuse

_DETERMINISTIC = (v2.Resize, v2.CenterCrop, v2.Pad, v2.Normalize, v2.ToDtype, v2.ToImage, v2.Grayscale, v2.RGB)
_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_HOOKS_WITH_A_BATCH = (*_TRANSFERS, "on_train_batch_start", "training_step")
_KNOWN_PACKAGES = {"anomalib", "anomalib_simplenet", "lightning", "pytorch_lightning"}


class FeatureCache(Callback):
    """Keep the feature maps of a frozen backbone in main memory, so that it sees each training image once.

    Makes batches of the training data :class:`CachedBatch`, unless there is a reason not to, and fills in their
    features. Must stand after the pre-processor in the trainer's callbacks. The arguments are SimpleNet's
    ``feature_cache``, where ``True`` trusts code that is not anomalib's, and ``feature_cache_memory`` in GiB, where
    ``None`` is half of what is free, shared by the processes of this machine.
    """

    def __init__(self, mode: bool | Literal["auto"] = "auto", memory: float | None = None) -> None:
        if not (isinstance(mode, bool) or mode == "auto"):
            msg = f"feature_cache is {mode!r}, expected True, False or 'auto'."
            raise ValueError(msg)
        if memory is not None:
            check_number("feature_cache_memory", memory, above=0, hint="GiB")
        self.mode, self.memory = mode, memory
        self.store: FeatureStore | None = None

    def setup(self, trainer: Trainer, _pl_module: LightningModule, stage: str) -> None:
        """Have the training data loader wrapped when the trainer asks for it."""
        if stage == "fit":
            wrap_dataloaders(trainer.fit_loop, "cache", None if self.mode is False else partial(self._wrap, trainer))

    def _wrap(self, trainer: Trainer, loader: Any) -> Any:  # noqa: ANN401
        self.store = None  # frees the memory of an earlier one
        if self not in trainer.callbacks:  # a tuner tries batch sizes without callbacks
            return loader
        if reason := _reason_against(trainer, loader, trusting=self.mode is True):
            refuse(reason, required=self.mode is True)
            wrap_dataloaders(trainer.fit_loop, "cache", None)  # says so once, however often the trainer loads the data
            return loader
        memory = free_memory() / 2**30 / 2 / trainer.num_devices if self.memory is None else self.memory
        self.store = FeatureStore(len(loader.dataset), memory, required=self.mode is True)
        dataset = IndexedDataset(loader.dataset, self.store.seen)
        return clone_dataloader(loader, dataset=dataset, collate_fn=partial(collate_unseen, loader.collate_fn))

    def on_train_epoch_start(self, trainer: Trainer, *_args: object) -> None:
        """Stop the data loader's workers once they have nothing left to read."""
        if self.store is not None and self.store.seen.all():
            release_workers(trainer.train_dataloader)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, _batch_idx: int) -> None:  # noqa: ANN401
        """Fill in the features of a cached batch, and remove its images, which later batches do not have."""
        if isinstance(batch, CachedBatch) and self.store is not None:
            with trainer.precision_plugin.train_step_context():
                features = self.store.features(batch, pl_module.model.extract)
            batch.features = [maps.to(pl_module.device) for maps in features]
            batch.image, batch.gt_mask = MissingImages(), None

    def teardown(self, trainer: Trainer, *_args: object, **_kwargs: object) -> None:
        """Free the maps."""
        self.store = None
        wrap_dataloaders(trainer.fit_loop, "cache", None)

    on_exception = teardown


def iterate_features(trainer: Trainer, pl_module: LightningModule, title: str) -> Iterator[list[torch.Tensor]]:
    """Feature maps of all training images, before training: per batch, for each layer ``(N, C, h, w)`` in float32.

    Fills the cache, and draws none of the training's random numbers.

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
    preparing = [each for each in trainer.callbacks if isinstance(each, FeatureCache | PreProcessor)]
    bar = trainer.progress_bar_callback
    hidden = bar is None or not bar.is_enabled or not trainer.is_global_zero
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for index, loaded in enumerate(tqdm(islice(loader, int(count)), title, int(count), disable=hidden)):
            batch = batch_to_device(trainer, loaded)
            for callback in preparing:
                callback.on_train_batch_start(trainer, pl_module, batch, index)
            with trainer.precision_plugin.train_step_context():
                features = batch.features if isinstance(batch, CachedBatch) else pl_module.model.extract(batch.image)
            yield [maps.float() for maps in features]


def _reason_against(trainer: Trainer, loader: Any, *, trusting: bool) -> str | None:  # noqa: ANN401
    """Why images need not be the same in every epoch, and what to change."""
    if trainer.reload_dataloaders_every_n_epochs:
        return "the trainer reloads the training data: set reload_dataloaders_every_n_epochs to 0"
    plain = type(loader) is DataLoader and type(loader.batch_sampler) is BatchSampler
    rebuilt = trainer.world_size > 1 or trainer.overfit_batches  # by Lightning, with another sampler
    numbered = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    if not (plain if rebuilt else numbered) or isinstance(loader.dataset, IterableDataset):
        return "the training data are no plain DataLoader of a map-style data set with a batch size: give one"
    if not trusting and (custom := _custom_code(trainer, loader)):
        return f"{custom} may give other images in every epoch: set feature_cache to true if that is not so"
    pre_processor = getattr(trainer.lightning_module, "pre_processor", None)
    transforms = (getattr(loader.dataset, "augmentations", None), getattr(pre_processor, "transform", None))
    if random := [type(step).__name__ for step in _flat(transforms) if type(step) not in _DETERMINISTIC]:
        return f"{', '.join(random)} may change the training images in every epoch: leave it out"
    return None


def _custom_code(trainer: Trainer, loader: DataLoader) -> str | None:
    """What between file and model is not anomalib's or Lightning's, and so may do anything."""
    if type(loader) is not DataLoader:
        return type(loader).__name__
    dataset = loader.dataset.__class__  # of the wrapped data set where UnreadableImages wrapped it
    parts = {dataset.__name__: dataset, "the DataLoader's collate_fn": loader.collate_fn}
    for owner in (trainer.lightning_module, trainer.datamodule, *trainer.callbacks):
        hooks = {name: getattr(owner, name) for name in _HOOKS_WITH_A_BATCH if hasattr(owner, name)}
        parts |= {f"{type(owner).__name__}.{name}": hook for name, hook in hooks.items()}
    return next((name for name, part in parts.items() if part.__module__.split(".")[0] not in _KNOWN_PACKAGES), None)


def _flat(transforms: Iterable[Any]) -> Iterator[Any]:
    for transform in filter(None, transforms):  # a subclass of Compose may do anything
        yield from _flat(transform.transforms) if type(transform) is v2.Compose else [transform]
