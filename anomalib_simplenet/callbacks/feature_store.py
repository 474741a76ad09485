"""Storage of the feature cache: the maps in main memory, and data loading that leaves out images whose maps it has."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

LARGEST_ERROR = 5e-3  # root mean square of what rounding changes, in standard deviations of the channel
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_CONTROL_GROUPS = Path("/proc/self/cgroup")
_CONTROL_GROUP_FILES = {  # by version: limit, usage, statistics and the part of the usage that the kernel can reclaim
    2: ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
}


class MissingImages:
    """Stands where a batch's images would be; any use raises an error that says how to get them."""

    @staticmethod
    def _refuse(*_args: object, **_kwargs: object) -> NoReturn:
        msg = "Cached batches have no images: they are not read again. Set feature_cache to false to get them."
        raise AttributeError(msg)

    __getattr__ = __getitem__ = __setitem__ = __len__ = __iter__ = __array__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __torch_function__ = _refuse  # torch's own functions, given this

    def __deepcopy__(self, _memo: dict) -> "MissingImages":
        return self  # to be moved to another device with the rest of the batch

    def __reduce__(self) -> tuple[type, tuple]:
        return MissingImages, ()


@dataclass
class CachedBatch:
    """Training images by their position in the data set; only those not in the cache come as images.

    Attributes:
        index (list[int]): Positions in the data set, N.
        unseen (list[int]): Which of the N come as images, K.
        shapes (list[tuple[int, ...]]): Shapes of the K images before they were made a batch.
        image (torch.Tensor | MissingImages): The K images, of shape ``(K, 3, H, W)``; removed once features are there.
        gt_mask (torch.Tensor | None): Their masks, which anomalib's pre-processor reads.
        features (list[torch.Tensor]): For each layer the maps ``(N, C, h, w)`` of all N images, which
            :class:`~anomalib_simplenet.callbacks.feature_cache.FeatureCache` fills in.
    """

    index: list[int]
    unseen: list[int] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    image: torch.Tensor | MissingImages = field(default_factory=MissingImages)
    gt_mask: torch.Tensor | None = None
    features: list[torch.Tensor] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        msg = f"Cached batches have no {name}: images are not read again. Set feature_cache to false to get it."
        raise AttributeError(msg)


class FeatureStore:
    """Feature maps of the images of a data set, kept as they come, in any order.

    Right whichever images a sampler assigns to this process. Each layer is kept on its own grid. An image whose maps
    ``dtype`` cannot represent (:data:`LARGEST_ERROR`) is not kept, and so read in every epoch.

    Args:
        size (int): Number of images.
        dtype (torch.dtype): To keep maps in; ``torch.float16`` becomes ``torch.float32`` where it cannot represent the
            first batch.
        memory (int): Bytes that the maps may take.
        required (bool): Whether to raise where the maps cannot be kept, rather than to keep none.
    """

    def __init__(self, size: int, dtype: torch.dtype, memory: int, required: bool) -> None:
        self.size, self.dtype, self.memory, self.required = size, dtype, memory, required
        self.off = self.warned = False
        self.maps: list[torch.Tensor] = []
        self.shapes: set[tuple[int, ...]] = set()
        # Shared, so that workers, which live for an epoch or longer, know what they need not read.
        self.seen = torch.zeros(size, dtype=torch.bool).share_memory_()

    @property
    def complete(self) -> bool:
        """Whether every image is in it."""
        return bool(self.seen.all())

    def features(self, batch: CachedBatch, extract: Callable[[torch.Tensor], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Feature maps of a batch, extracted where there are none.

        Args:
            batch (CachedBatch): Its images pre-processed.
            extract (Callable): The backbone; maps of each layer from images ``(K, 3, H, W)``.

        Returns:
            list[torch.Tensor]: For each layer ``(N, C, h, w)``.

        Raises:
            ValueError: If the maps cannot be kept and are required to.
        """
        index = torch.tensor(batch.index)
        # By now others of the images may have been kept: workers load batches ahead.
        new = [row for row, position in enumerate(batch.unseen) if not self.seen[index[position]]]
        fresh = extract(batch.image if len(new) == len(batch.image) else batch.image[new]) if new else []
        rows = torch.tensor([batch.unseen[row] for row in new], dtype=torch.long)
        if new and not self.off:
            self._keep(index[rows], fresh, batch.shapes)
        if len(new) == len(index) and not self.seen[index].any():
            return fresh
        # To the device before it is widened: half of the traffic.
        stored = (kept[index].to(self.device).to(self.computed_in).permute(0, 3, 1, 2) for kept in self.maps)
        missing = (~self.seen[index[rows]]).nonzero().flatten()
        if not len(missing):
            return list(stored)
        at = rows[missing].to(self.device)
        return [maps.index_copy(0, at, new[missing.to(self.device)]) for maps, new in zip(stored, fresh, strict=True)]

    def _keep(self, index: torch.Tensor, maps: list[torch.Tensor], shapes: list[tuple[int, ...]]) -> None:
        self.shapes.update(shapes)
        if len(self.shapes) > 1:
            sizes = " and ".join(" x ".join(map(str, shape)) for shape in sorted(self.shapes)[:2])
            self._refuse(
                f"training images differ in size ({sizes}), and anomalib stretches each to its batch's largest, in "
                "every epoch another: give the pre-processor a Resize to height and width"
            )
        elif not self.maps:
            self._allocate(maps)
        if self.off:
            self.seen.zero_()
            return
        good = _survives(maps, self.dtype).cpu()
        if not good.all() and not self.warned:
            self.warned = True
            rank_zero_info(
                f"feature_cache: {self.dtype} cannot represent the features of some images, which are read in every "
                'epoch. Set feature_cache_dtype to "float32", unless they are NaN or infinite.'
            )
        for kept, feature in zip(self.maps, maps, strict=True):
            kept[index[good]] = feature.permute(0, 2, 3, 1).to("cpu", self.dtype)[good]
        self.seen[index[good]] = True

    def _allocate(self, maps: list[torch.Tensor]) -> None:
        self.device, self.computed_in = maps[0].device, maps[0].dtype
        if not _survives(maps, self.dtype).all():
            self.dtype = torch.float32
        shapes = [(self.size, *feature.shape[2:], feature.shape[1]) for feature in maps]
        needed = sum(map(math.prod, shapes)) * self.dtype.itemsize
        name = str(self.dtype).removeprefix("torch.")
        size = f"the feature maps of {self.size} training images take {needed / 2**30:.2g} GiB as {name}"
        if needed > self.memory:
            self._refuse(
                f"{size}, more than the {self.memory / 2**30:.2g} GiB that feature_cache_memory allows (by default "
                "half of the free memory): raise it, or take smaller images or fewer layers"
            )
            return
        rank_zero_info(f"feature_cache: {size}; once all are kept, neither images nor backbone are needed.")
        self.maps = [torch.empty(shape, dtype=self.dtype) for shape in shapes]

    def _refuse(self, reason: str) -> None:
        refuse(reason, required=self.required)
        self.off = True


def refuse(reason: str, *, required: bool) -> None:
    """Log why features are not cached.

    Raises:
        ValueError: If they are required to be.
    """
    if required:
        msg = f"feature_cache is True, but {reason}, or set feature_cache to auto or false."
        raise ValueError(msg)
    rank_zero_info(f"feature_cache is off: {reason}.")


def _survives(maps: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Which images' maps a data type can represent, ``(N,)``; those that are not finite, none can.

    The error of each channel is compared with its standard deviation over the batch, or with a hundredth of the
    layer's where that is larger: channels that hardly vary do not count.
    """
    good = torch.ones(len(maps[0]), dtype=torch.bool, device=maps[0].device)
    for feature in maps:
        exact = feature.detach().float()
        unit = exact.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)  # squares shall not underflow
        error = ((exact.to(dtype).float() - exact) / unit).square().mean(dim=(2, 3))  # N, C
        variance = (exact / unit).var(dim=(0, 2, 3), correction=0)
        allowed = LARGEST_ERROR**2 * variance.clamp(min=1e-4 * variance.mean())
        good &= ((error < allowed) | (error == 0)).all(dim=1)
    return good


class IndexedDataset(Dataset):
    """A data set that gives each item with its position, without reading those that were seen."""

    def __init__(self, dataset: Dataset, seen: torch.Tensor) -> None:
        self.dataset, self.seen = dataset, seen

    def __len__(self) -> int:
        return len(self.seen)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, None if self.seen[index] else self.dataset[index]


class CachedCollate:
    """Makes a :class:`CachedBatch` of what :class:`IndexedDataset` gives."""

    def __init__(self, collate: Callable) -> None:
        self.collate = collate

    def __call__(self, samples: list[tuple[int, Any]]) -> CachedBatch:
        """Collate the items that were read."""
        index, items = zip(*samples, strict=True)
        unseen = [position for position, item in enumerate(items) if item is not None]
        if not unseen:
            return CachedBatch(list(index))
        images = [getattr(items[position], "image", None) for position in unseen]
        shapes = [tuple(image.shape) for image in images if image is not None]  # anomalib's collate resizes in place
        batch = self.collate([items[position] for position in unseen])
        return CachedBatch(list(index), unseen, shapes, batch.image, batch.gt_mask)


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of each control group that it is in."""
    free = psutil.virtual_memory().available
    for folder, version in _control_groups():
        limit_name, used_name, statistics, reclaimable = _CONTROL_GROUP_FILES[version]
        try:
            limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
            kept_files = dict(line.split() for line in (folder / statistics).read_text().splitlines())[reclaimable]
            free = min(free, limit - used + int(kept_files))
        except (OSError, ValueError, KeyError):  # not mounted here, or no limit: "max"
            continue
    return max(0, free)


def _control_groups() -> Iterator[tuple[Path, int]]:
    """Folders of the control groups of this process, from its own up to the root, with their version."""
    try:
        lines = _OWN_CONTROL_GROUPS.read_text().splitlines()
    except OSError:  # not on Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, version = (_CONTROL_GROUPS / "memory", 1) if controllers else (_CONTROL_GROUPS, 2)
        own = root / path.lstrip("/")
        yield from ((folder, version) for folder in (own, *own.parents) if folder.is_relative_to(root))
