"""Normal images for the thresholds, held out of training where validation has none."""

import logging

import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, Trainer

from anomalib_simplenet.calibration import needed_images

logger = logging.getLogger(__name__)

SHARE = 5  # one image in so many


class HoldOut(Callback):
    """Move training images to validation where a rate of false alarms is set and no validation image is normal.

    A fifth of them, or as many as the rate needs, drawn the same way in every run, process and resumed training. They
    stay in the data module's ``val_data``.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Hold images out, before anything reads the training images.

        Raises:
            ValueError: If there are too few normal images for the rate.
        """
        processor, data = pl_module.post_processor, trainer.datamodule
        rate = getattr(processor, "false_alarm_rate", None)
        if rate is None:
            return
        if not trainer.enable_validation:
            processor.check_rate(0)
        if not isinstance(data, AnomalibDataModule):  # the number of normal images is not known before validation
            return
        validation = getattr(data, "val_data", None)
        normal = 0 if validation is None else int((validation.samples.label_index == 0).sum())
        if normal:
            processor.check_rate(normal)
            return
        count, needed = len(data.train_data), needed_images(rate)
        held = max(count // SHARE, needed)
        if held > count // 2:
            msg = (
                f"false_alarm_rate is {rate}, which needs {needed} normal validation images, and there are none; "
                f"half of the {count} training images would not do: add normal images, or raise the rate."
            )
            raise ValueError(msg)
        processor.check_rate(held)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        held_out = data.train_data.subsample(sorted(order[:held]))
        data.train_data = data.train_data.subsample(sorted(order[held:]))
        data.val_data = held_out if validation is None else validation + held_out
        data.setup(trainer.state.fn)  # gives them the augmentations of validation
        logger.info("No validation image is normal: %d of %d training images validate and do not train.", held, count)
