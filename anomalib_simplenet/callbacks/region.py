"""What the model's region means for images, ground truth and metrics."""

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.metrics import AUPRO
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_simplenet.compat import data_loops, wrap_dataloaders
from anomalib_simplenet.extensions.region import Region

from .unreadable_images import UNREADABLE, image_paths

TOLERANCE = 0.01  # of aspect ratios: sizes are rounded


class RegionPixels(Callback):
    """Keep pixels outside the model's region from choosing thresholds and being defective; without one do nothing.

    Must stand before anomalib's post-processor and evaluator in the trainer's callbacks.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, *_args: object, **_kwargs: object) -> None:
        """Have data loaders checked when the trainer asks for them, after a checkpoint brought its region."""
        check = partial(apply_to_collection, dtype=DataLoader, function=partial(_check_images, pl_module))
        for loop in data_loops(trainer):
            wrap_dataloaders(loop, "region", check)

    def on_validation_batch_end(self, _trainer: Trainer, pl_module: LightningModule, outputs: Batch, *_args) -> None:
        """Leave a predicted batch the pixels inside, as one row."""
        if (region := pl_module.model.region) is not None:
            _drop_defects_outside(outputs, region)
            _as_rows(outputs, region)

    def on_test_batch_end(self, _trainer: Trainer, pl_module: LightningModule, outputs: Batch, *_args) -> None:
        """Take pixels outside for normal, whatever the ground truth."""
        if (region := pl_module.model.region) is not None:
            _drop_defects_outside(outputs, region)


class RegionMetrics(Callback):
    """Have metrics of a test count the region's pixels alone. Must stand just before anomalib's evaluator.

    Pixels outside would count as true negatives: the smaller the region, the better the metrics. Callbacks after
    ``restored``, which must stand just after the evaluator, see whole maps again.
    """

    def __init__(self) -> None:
        self._whole: dict[str, torch.Tensor | None] = {}
        self.restored = _Restored(self._whole)

    def on_fit_start(self, _trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse AUPRO, which needs connected pixels and would count those outside."""
        evaluator = pl_module.evaluator
        metrics = [] if evaluator is None else [*evaluator.val_metrics, *evaluator.test_metrics]
        if pl_module.model.region is not None and any(isinstance(metric, AUPRO) for metric in metrics):
            msg = "AUPRO, which the evaluator has, cannot leave out pixels outside region: remove AUPRO or region."
            raise ValueError(msg)

    on_validation_start = on_test_start = on_fit_start

    def on_test_batch_end(self, _trainer: Trainer, pl_module: LightningModule, outputs: Batch, *_args) -> None:
        """Leave a predicted batch the pixels inside, as one row."""
        if (region := pl_module.model.region) is not None:
            self._whole.update(_as_rows(outputs, region))


class _Restored(Callback):
    def __init__(self, whole: dict[str, torch.Tensor | None]) -> None:
        self._whole = whole

    def on_test_batch_end(self, _trainer: Trainer, _pl_module: LightningModule, outputs: Batch, *_args) -> None:
        for name, maps in self._whole.items():
            setattr(outputs, name, maps)
        self._whole.clear()


def _drop_defects_outside(batch: Batch, region: Region) -> None:
    """Keep what is defective inside; images whose defects are all outside are normal."""
    if batch.gt_mask is not None:
        inside = batch.gt_mask & (region.mask[0] > 0)
        outside_alone = batch.gt_mask.flatten(1).any(dim=1) & ~inside.flatten(1).any(dim=1)
        batch.gt_mask = inside
        batch.gt_label = None if batch.gt_label is None else batch.gt_label & ~outside_alone


def _as_rows(batch: Batch, region: Region) -> dict[str, torch.Tensor | None]:
    """Leave a batch's maps ``(N, ..., H, W)`` the K pixels inside, ``(N, 1, K)``; returns the whole maps."""
    whole = {name: getattr(batch, name) for name in ("anomaly_map", "pred_mask", "gt_mask")}
    for name, maps in whole.items():
        if maps is not None:
            setattr(batch, name, maps.view(len(maps), 1, *region.mask.shape[-2:])[..., region.mask[0, 0] > 0])
    return whole


def _check_images(pl_module: LightningModule, loader: Any) -> Any:  # noqa: ANN401
    """Refuse tiles, and images of another aspect ratio than the region's, by their headers: they show other parts."""
    region = pl_module.model.region
    if region is not None and type(loader.collate_fn).__name__ == "TileCollater":
        msg = "tiled_ensemble trains on tiles, but region is of whole images: leave region out."
        raise ValueError(msg)
    for path in [] if region is None else image_paths(loader.dataset):
        with suppress(*UNREADABLE), Image.open(path) as image:  # one that cannot be read is named when its turn comes
            if abs(image.width / image.height / region.aspect_ratio.item() - 1) > TOLERANCE:
                msg = (
                    f"{path} is {image.width} x {image.height}, but region "
                    f"{pl_module.hparams.get('region') or '(of the checkpoint)'} {region.aspect_ratio.item():.3g} "
                    "times as wide as high: draw the region on an image of the camera, or leave such images out."
                )
                raise ValueError(msg)
    return loader
