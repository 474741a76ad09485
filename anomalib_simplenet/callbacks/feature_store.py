"""Storage of the feature cache: the maps in main memory, and data loading that leaves out images whose maps it has."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

_CONTROL_GROUPS, _OWN_CONTROL_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _no_images(*_args: object, **_kwargs: object) -> NoReturn:
    msg = "Cached batches hold features alone: images are not read again. Set feature_cache to false to get them."
    raise AttributeError(msg)


class MissingImages:
    """In place of images that were not read: any use raises an error that says how to get them."""

    __getattr__ = __getitem__ = __len__ = __iter__ = __array__ = _no_images
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _no_images
    __torch_function__ = staticmethod(_no_images)


@dataclass
class CachedBatch:
    """N training images by their positions in the data set; only the K that are not in the cache come as images."""

    index: list[int]  # positions of all N
    unseen: list[int] = field(default_factory=list)  # which of the N come as images
    shapes: set[tuple[int, ...]] = field(default_factory=set)  # of the images before they were made a batch
    image: torch.Tensor | MissingImages = field(default_factory=MissingImages)  # K, 3, H, W; until there are features
    gt_mask: torch.Tensor | None = None  # anomalib's pre-processor reads it
    features: list[torch.Tensor] = field(default_factory=list)  # of each layer N, C, h, w; FeatureCache fills them in
    __getattr__ = _no_images


class FeatureStore:
    """Feature maps of ``size`` images as computed, kept in any order, whichever images a sampler assigns.

    Where they take more than ``memory`` GiB, or images differ in size, it raises if ``required``, else keeps none.
    """

    def __init__(self, size: int, memory: float, required: bool) -> None:
        self.memory, self.required, self.off = memory, required, False
        self.maps: list[torch.Tensor] = []  # of each layer size, h, w, C
        self.shapes: set[tuple[int, ...]] = set()
        # Shared, so that workers, which live for an epoch or longer, know what they need not read.
        self.seen = torch.zeros(size, dtype=torch.bool).share_memory_()

    def features(self, batch: CachedBatch, extract: Callable[[torch.Tensor], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Feature maps of a batch, for each layer ``(N, C, h, w)``: extracted where there are none, and then kept."""
        index, all_unseen = torch.tensor(batch.index), len(batch.unseen) == len(batch.index)
        fresh = extract(batch.image) if batch.unseen and not self.seen[index].all() else []  # workers load ahead
        if fresh and not self.off:
            self._prepare(fresh, batch.shapes)
        if fresh and not (self.off and all_unseen):
            new = index[batch.unseen]
            for kept, maps in zip(self.maps, fresh, strict=True):
                kept[new] = maps.permute(0, 2, 3, 1).cpu()
            self.seen[new] = not self.off
        return fresh if fresh and all_unseen else [kept[index].permute(0, 3, 1, 2) for kept in self.maps]

    def _prepare(self, fresh: list[torch.Tensor], shapes: set[tuple[int, ...]]) -> None:
        self.shapes |= shapes
        gib = sum(len(self.seen) * maps[0].nbytes for maps in fresh) / 2**30
        size = f"the feature maps of {len(self.seen)} training images take {gib:.2g} GiB"
        if len(self.shapes) > 1:
            sizes = sorted(self.shapes)[:2]  # anomalib stretches images to their batch's largest, each epoch another
            reason = f"training images differ in size ({sizes}): give the pre-processor a Resize to (height, width)"
        elif gib > self.memory:
            limit = f"more than the {self.memory:.2g} of feature_cache_memory (by default half of the free memory)"
            reason = f"{size}, {limit}: raise it, or take smaller images or fewer layers"
        else:
            if not self.maps:
                rank_zero_info(f"feature_cache: {size}; once all are kept, neither images nor backbone are needed.")
                self.maps = [torch.empty(len(self.seen), *m.shape[2:], m.shape[1], dtype=m.dtype) for m in fresh]
            return
        refuse(reason, required=self.required)
        self.off = True  # the maps stay for batches that workers have loaded without their images
        self.seen.zero_()


def refuse(reason: str, *, required: bool) -> None:
    """Log why features are not cached, or raise a ``ValueError`` if they are required to be."""
    if required:
        msg = f"feature_cache is True, but {reason}, or set feature_cache to auto or false."
        raise ValueError(msg)
    rank_zero_info(f"feature_cache is off: {reason}.")


class IndexedDataset(Dataset):
    """A data set that gives each item with its position, without reading those that were seen."""

    def __init__(self, dataset: Dataset, seen: torch.Tensor) -> None:
        self.dataset, self.seen = dataset, seen

    def __len__(self) -> int:
        return len(self.seen)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, None if self.seen[index] else self.dataset[index]


def collate_unseen(collate: Callable, samples: list[tuple[int, Any]]) -> CachedBatch:
    """Make a batch of what :class:`IndexedDataset` gives, with the collate function of its data set."""
    index = [position for position, _ in samples]
    unseen = [row for row, (_, item) in enumerate(samples) if item is not None]
    if not unseen:
        return CachedBatch(index)
    items = [samples[row][1] for row in unseen]
    shapes = {tuple(item.image.shape) for item in items}  # before anomalib's collate resizes in place
    batch = collate(items)
    return CachedBatch(index, unseen, shapes, batch.image, batch.gt_mask)


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of each control group that it is in."""
    free = psutil.virtual_memory().available
    groups = _OWN_CONTROL_GROUPS.read_text().splitlines() if _OWN_CONTROL_GROUPS.is_file() else []  # Linux alone
    for group in groups:
        _, controllers, path = group.split(":", 2)
        root, names = _CONTROL_GROUPS, ("memory.max", "memory.current", "inactive_file")
        if "memory" in controllers.split(","):  # version 1
            root = _CONTROL_GROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError, KeyError):  # not mounted here, above the root, or no limit: "max"
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free = min(free, limit - used + int(statistics[names[2]]))  # the kernel can reclaim inactive files
    return max(0, free)
