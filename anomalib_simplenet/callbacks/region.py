"""What the model's region means for images and for ground truth."""

from contextlib import suppress
from functools import partial
from typing import Any

from anomalib.data import Batch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_simplenet.compat import data_loops, wrap_dataloaders

from .unreadable_images import image_paths

TOLERANCE = 0.01  # of aspect ratios: sizes are rounded


class RegionPixels(Callback):
    """Keep pixels outside the model's region from choosing thresholds and being defective; without one do nothing.

    Must stand before anomalib's post-processor and evaluator in the trainer's callbacks.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, *_args: object, **_kwargs: object) -> None:
        """Have data loaders checked when the trainer asks for them, after a checkpoint brought its region."""
        check = partial(apply_to_collection, dtype=DataLoader, function=partial(_check_aspect_ratios, pl_module))
        for loop in data_loops(trainer):
            wrap_dataloaders(loop, "region", check)

    def on_validation_batch_end(self, _trainer: Trainer, pl_module: LightningModule, outputs: Batch, *_args) -> None:
        """Leave a predicted batch the pixels inside, as one row."""
        if (region := pl_module.model.region) is not None:
            for name in ("anomaly_map", "gt_mask"):
                if (maps := getattr(outputs, name)) is not None:
                    setattr(outputs, name, maps[:, None, region.mask[0, 0] > 0])

    def on_test_batch_end(self, _trainer: Trainer, pl_module: LightningModule, outputs: Batch, *_args) -> None:
        """Take pixels outside for normal, whatever the ground truth."""
        if (region := pl_module.model.region) is not None and outputs.gt_mask is not None:
            outputs.gt_mask = outputs.gt_mask & (region.mask[0] > 0)


def _check_aspect_ratios(pl_module: LightningModule, loader: Any) -> Any:  # noqa: ANN401
    """Refuse images of another aspect ratio than the region's, by their headers: it would be other parts of them."""
    region = pl_module.model.region
    for path in [] if region is None else image_paths(loader.dataset):
        with suppress(OSError), Image.open(path) as image:  # one that cannot be read is named when its turn comes
            if abs(image.width / image.height / region.aspect_ratio.item() - 1) > TOLERANCE:
                msg = (
                    f"{path} is {image.width} x {image.height}, but region "
                    f"{pl_module.hparams.get('region') or '(of the checkpoint)'} {region.aspect_ratio.item():.3g} "
                    "times as wide as high: draw the region on an image of the camera, or leave such images out."
                )
                raise ValueError(msg)
    return loader
