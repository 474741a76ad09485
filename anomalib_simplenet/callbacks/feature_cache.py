"""Feature maps of the training images, kept from the first time that each is seen."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from torchvision.transforms import v2

from .trainer_setup import altered

DTYPES = {"float16": torch.float16, "float32": torch.float32}
_SHARE_OF_FREE_MEMORY = 0.5
_CONTAINER = Path("/sys/fs/cgroup")
_LIMITS_OF_CONTAINERS = (  # control groups, versions 2 and 1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
_SAME_EACH_TIME = (v2.Resize, v2.CenterCrop, v2.Pad, v2.Normalize, v2.ToDtype, v2.ToImage, v2.Grayscale, v2.RGB)


@dataclass
class CachedBatch:
    """Training images by their place in the data set; those not in the cache, when this was loaded, come along.

    Attributes:
        index (list[int]): Places in the data set, N.
        unseen (list[int]): Which of the N come along, K.
        image (torch.Tensor | None): These images, of shape ``(K, 3, H, W)``.
        gt_mask (torch.Tensor | None): Their masks, which anomalib's pre-processor asks for.
    """

    index: list[int]
    unseen: list[int]
    image: torch.Tensor | None = None
    gt_mask: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        msg = f"A CachedBatch has no {name}: images are not read again. Set feature_cache to false to have it."
        raise AttributeError(msg)


class FeatureCache:
    """Feature maps of a data set, so that a frozen backbone sees each image once.

    Filled as batches come, in any order, so it needs no pass of its own and is right whichever images a sampler deals
    to this process. Maps are kept as the backbone gives them, each layer on its own grid, in the main memory.

    Args:
        loader (DataLoader): Of the training images.
        dtype (torch.dtype): To keep maps in. One that holds no larger numbers than the maps have gives way to float32.
        memory (int): Bytes that the maps may take.
        required (bool): Whether to raise where they do not fit, rather than to keep none.

    Attributes:
        loader (DataLoader): The same, giving :class:`CachedBatch`.
    """

    def __init__(self, loader: DataLoader, dtype: torch.dtype, memory: int, required: bool) -> None:
        self.dtype, self.memory, self.required = dtype, memory, required
        self.size = len(loader.dataset)
        self.maps: list[torch.Tensor] = []
        self.too_large = False
        # Shared, so that workers, which live for an epoch or longer, know what they need not read.
        self.seen = torch.zeros(self.size, dtype=torch.bool).share_memory_()
        dataset, collate = _Indexed(loader.dataset, self.seen), _Collate(loader.collate_fn)
        self.loader = altered(loader, dataset=dataset, collate_fn=collate)

    @property
    def complete(self) -> bool:
        """Whether every image is in it."""
        return bool(self.seen.all())

    def features(self, batch: CachedBatch, extract: Callable[[torch.Tensor], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Feature maps of a batch, extracted where the cache has none.

        Args:
            batch (CachedBatch): Of :attr:`loader`; its images pre-processed.
            extract (Callable): The backbone; maps of each layer from images ``(K, 3, H, W)``.

        Returns:
            list[torch.Tensor]: For each layer ``(N, C, h, w)``.

        Raises:
            ValueError: If the maps do not fit the memory and are required to.
        """
        index = torch.tensor(batch.index)
        new = [row for row, position in enumerate(batch.unseen) if not self.seen[index[position]]]
        if new and batch.image is not None:
            maps = extract(batch.image if len(new) == len(batch.image) else batch.image[new])
            if not self.maps and not self.too_large:
                self._allocate(maps)
            if not self.maps:
                return maps
            self._keep(index[[batch.unseen[row] for row in new]], maps)
        # To the device before it is widened: half of the traffic.
        rows = (kept[index].to(self.device).to(self.computed_in) for kept in self.maps)
        return [feature.permute(0, 3, 1, 2) for feature in rows]

    def _allocate(self, maps: list[torch.Tensor]) -> None:
        self.device, self.computed_in = maps[0].device, maps[0].dtype
        shapes = [(self.size, *feature.shape[2:], feature.shape[1]) for feature in maps]
        self.numbers = sum(map(math.prod, shapes))
        if self._need() > self.memory:
            if self.required:
                msg = f"feature_cache is True, but {self._too_large()} Or set feature_cache to auto or false."
                raise ValueError(msg)
            rank_zero_info(f"feature_cache is off: {self._too_large()}")
            self.too_large = True
            return
        rank_zero_info(f"feature_cache: {self._size()}; once each was seen, neither images nor backbone are needed.")
        self.maps = [torch.empty(shape, dtype=self.dtype) for shape in shapes]

    def _need(self) -> int:
        return self.numbers * self.dtype.itemsize

    def _size(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"the feature maps of {self.size} training images take {_gib(self._need())} as {name}"

    def _too_large(self) -> str:
        return (
            f"{self._size()}, more than the {_gib(self.memory)} that feature_cache_memory allows (by default half of "
            "the free memory). Raise it, or take smaller images or fewer layers."
        )

    def _keep(self, index: torch.Tensor, maps: list[torch.Tensor]) -> None:
        largest = max(float(feature.abs().max()) for feature in maps)
        if torch.finfo(self.dtype).max < largest < math.inf:
            self.dtype = torch.float32
            if self._need() > self.memory:  # and batches without images may be on their way
                msg = f"Features of {largest:.3g} need float32, but {self._too_large()} Or set feature_cache to false."
                raise ValueError(msg)
            for layer, kept in enumerate(self.maps):
                self.maps[layer] = kept.float()
        for kept, feature in zip(self.maps, maps, strict=True):
            kept[index] = feature.permute(0, 2, 3, 1).to("cpu", self.dtype)
        self.seen[index] = True


def make_feature_cache(
    trainer: Trainer,
    pre_processor: Any,  # noqa: ANN401
    wish: bool | str,
    dtype: torch.dtype,
    memory: float | None,
) -> FeatureCache | None:
    """Put a cache between the trainer's training data and the model, unless there is a reason not to.

    Args:
        trainer (Trainer): About to fit.
        pre_processor (Any): The model's.
        wish (bool | str): ``True``, ``False`` or ``"auto"``.
        dtype (torch.dtype): To keep maps in.
        memory (float | None): GiB that the maps may take; ``None`` for half of what is free, shared by the processes
            of this machine.

    Returns:
        FeatureCache | None: ``None`` where there is a reason, with a line in the log.

    Raises:
        ValueError: If there is a reason, and ``wish`` is ``True``.
    """
    if wish is False:
        return None
    source = trainer.fit_loop._data_source  # noqa: SLF001
    loader = source.dataloader()
    reason = next(_reasons_against(trainer, loader, pre_processor, wish), None)
    if reason is not None:
        if wish is True:
            msg = f"feature_cache is True, but {reason}, or set feature_cache to auto or false."
            raise ValueError(msg)
        rank_zero_info(f"feature_cache is off: {reason}.")
        return None
    if memory is None:
        budget = int(_free_memory() * _SHARE_OF_FREE_MEMORY) // trainer.num_devices
    else:
        budget = int(memory * 2**30)
    cache = FeatureCache(loader, dtype, budget, required=wish is True)
    source.instance = cache.loader
    trainer.fit_loop._combined_loader = None  # noqa: SLF001  # should something have set the data up already
    return cache


def _reasons_against(trainer: Trainer, loader: Any, pre_processor: Any, wish: bool | str) -> Iterator[str]:  # noqa: ANN401
    """Why images need not be the same in every epoch, and what to change."""
    if trainer.reload_dataloaders_every_n_epochs:
        yield "the trainer reloads the training data: set reload_dataloaders_every_n_epochs to 0"
    if not isinstance(loader, DataLoader):
        yield f"the training data are no DataLoader but {type(loader).__name__}: give one"
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        yield "the DataLoader makes no batches of numbered images: give it a data set with places, and a batch size"
    rebuilt = trainer.world_size > 1 or trainer.overfit_batches
    if rebuilt and (type(loader) is not DataLoader or type(loader.batch_sampler) is not BatchSampler):
        yield "Lightning cannot build this DataLoader again: give a plain one, with a sampler and a batch size"
    if wish == "auto" and (custom := _custom_steps(trainer, loader, pre_processor)):
        yield f"{custom} may give other images in every epoch: set feature_cache to true if that is not so"
    augmentations = getattr(loader.dataset, "augmentations", None)
    transforms = [*_flat(augmentations), *_flat(getattr(pre_processor, "transform", None))]
    if random := [type(step).__name__ for step in transforms if type(step) not in _SAME_EACH_TIME]:
        yield f"{', '.join(random)} may change the training images in every epoch: leave it out"
    if not any(isinstance(step, v2.CenterCrop) or _fixes_size(step) for step in transforms):
        yield "images may differ in size: give the pre-processor a Resize to height and width"


def _custom_steps(trainer: Trainer, loader: DataLoader, pre_processor: Any) -> str | None:  # noqa: ANN401
    """What between file and model is not anomalib's, and so may do anything."""
    if loader.dataset.__class__.__module__.partition(".")[0] != "anomalib":
        return loader.dataset.__class__.__name__
    if loader.collate_fn != loader.dataset.collate_fn:
        return "the DataLoader's collate_fn"
    if pre_processor is not None and type(pre_processor) is not PreProcessor:
        return type(pre_processor).__name__
    for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        for owner in (trainer.lightning_module, trainer.datamodule):
            if owner is not None and getattr(type(owner), hook) is not getattr(DataHooks, hook):
                return f"{type(owner).__name__}.{hook}"
    return None


def _free_memory() -> int:
    free = psutil.virtual_memory().available
    for *names, statistics, reclaimable in _LIMITS_OF_CONTAINERS:
        try:
            limit, used = (int((_CONTAINER / name).read_text()) for name in names)
            kept_files = dict(line.split() for line in (_CONTAINER / statistics).read_text().splitlines())[reclaimable]
            free = min(free, limit - used + int(kept_files))
        except (OSError, ValueError, KeyError):  # no container of this kind, or no limit: "max"
            continue
    return max(0, free)


def _flat(transform: Any) -> Iterator[Any]:  # noqa: ANN401
    if isinstance(transform, v2.Compose):
        for step in transform.transforms:
            yield from _flat(step)
    elif transform is not None:
        yield transform


def _fixes_size(step: Any) -> bool:  # noqa: ANN401
    return isinstance(step, v2.Resize) and isinstance(step.size, Sequence) and len(step.size) == 2


def _gib(size: int) -> str:
    return f"{size / 2**30:.2g} GiB"


class _Indexed(Dataset):
    """A data set that gives each item with its place, but none that was seen."""

    def __init__(self, dataset: Dataset, seen: torch.Tensor) -> None:
        self.dataset, self.seen = dataset, seen

    def __len__(self) -> int:
        return len(self.seen)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, None if self.seen[index] else self.dataset[index]


class _Collate:
    """Makes a :class:`CachedBatch` of what :class:`_Indexed` gives."""

    def __init__(self, collate: Callable) -> None:
        self.collate = collate

    def __call__(self, samples: list[tuple[int, Any]]) -> CachedBatch:
        index, items = zip(*samples, strict=True)
        unseen = [position for position, item in enumerate(items) if item is not None]
        if not unseen:
            return CachedBatch(list(index), unseen)
        batch = self.collate([items[position] for position in unseen])
        return CachedBatch(list(index), unseen, batch.image, batch.gt_mask)
