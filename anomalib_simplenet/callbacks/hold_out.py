"""Normal images for the thresholds, held out of training where validation has none."""

import torch
from anomalib.data import AnomalibDataModule
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from anomalib_simplenet.calibration import needed_images

from .resume import resumes

SHARE = 5  # one image in so many


class HoldOut(Callback):
    """Move training images to validation where a rate of false alarms is set and no validation image is normal.

    A fifth of them, or as many as the rate needs, drawn the same way in every run and process. They stay in the data
    module's ``val_data``.
    """

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def state_dict(self) -> dict[str, int]:
        """Number of images held out, and of those they were drawn from."""
        return self._held

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Keep the numbers of a checkpoint, from which training resumes."""
        self._held = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold images out, before anything reads the training images.

        Raises:
            ValueError: If there are too few normal images for the rate, or the checkpoint was trained on some of them.
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
        if normal := 0 if validation is None else int((validation.samples.label_index == 0).sum()):
            processor.check_rate(normal)
            return
        count, needed = len(data.train_data), needed_images(rate)
        held = max(count // SHARE, needed)
        if held > count // 2:
            msg = (
                f"false_alarm_rate is {rate}, which needs {needed} normal validation images; there are none, and half "
                f"of the {count} training images are too few to hold out: add normal images, or raise the rate."
            )
            raise ValueError(msg)
        processor.check_rate(held)
        drawn = {"held_out": held, "of": count}
        if resumes(trainer) and self._held != drawn:
            msg = (
                f"The checkpoint held out {self._held.get('held_out', 0)} training images for false_alarm_rate, and "
                f"{rate} needs {held} of {count}: resume with the same rate and images, or train anew."
            )
            raise ValueError(msg)
        if pl_module.checkpoint_path and not resumes(trainer):
            rank_zero_warn(
                f"{pl_module.checkpoint_path} may have been trained on images that are held out now: there may be more "
                f"false alarms than {rate:g} allows. Add normal validation images, or train anew."
            )
        self._held = drawn
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        held_out = data.train_data.subsample(sorted(order[:held]))
        data.train_data = data.train_data.subsample(sorted(order[held:]))
        data.val_data = held_out if validation is None else validation + held_out
        data.setup(trainer.state.fn)  # gives them the augmentations of validation
        rank_zero_info(f"No validation image is normal: {held} of {count} training images validate and do not train.")
