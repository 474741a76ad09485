"""Validation of the last weights, whatever ended training."""

import sys

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_simplenet.compat import run_validation

_NEVER = sys.maxsize


class FinalValidation(Callback):
    """Validate once, with the last weights, from which anomalib takes its thresholds.

    Where the user asks for more (``check_val_every_n_epoch``, ``val_check_interval``, or a callback that monitors a
    metric), Lightning validates as usual, and this callback adds only the validation of the last weights if they were
    not validated. ``check_val_every_n_epoch=1`` cannot be told from Lightning's default.
    """

    def __init__(self) -> None:
        self._only_last = False
        self._validated_step: int | None = None

    def setup(self, trainer: Trainer, _pl_module: LightningModule, stage: str) -> None:
        """Decide whether the last weights alone are validated."""
        if stage == "fit":
            interval = getattr(trainer, "val_check_interval", None)  # not there where it is a time
            monitored = any(getattr(callback, "monitor", None) for callback in trainer.callbacks)
            every_epoch = trainer.check_val_every_n_epoch == 1 and isinstance(interval, float) and interval == 1.0
            self._only_last = every_epoch and not monitored
            self._validated_step = None

    def on_train_epoch_start(self, trainer: Trainer, *_args: object) -> None:
        """Hold Lightning's validation back."""
        if self._only_last:
            trainer.check_val_every_n_epoch = _NEVER

    def on_validation_end(self, trainer: Trainer, *_args: object) -> None:
        """Note that thresholds belong to the present weights."""
        self._validated_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, *_args: object) -> None:
        """Validate if training ends now; checkpoint callbacks are called next, and save thresholds with weights."""
        self._release(trainer)
        epochs, steps = trainer.current_epoch + 1, trainer.global_step
        may_stop = epochs >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)
        last_epoch = trainer.max_epochs not in {None, -1} and epochs >= trainer.max_epochs
        last_step = trainer.max_steps != -1 and steps >= trainer.max_steps
        if (trainer.should_stop and may_stop) or last_epoch or last_step:
            self._validate(trainer)

    def _release(self, trainer: Trainer, *_args: object) -> None:
        if trainer.check_val_every_n_epoch == _NEVER:
            trainer.check_val_every_n_epoch = 1

    def _validate(self, trainer: Trainer, *_args: object) -> None:
        if trainer.enable_validation and self._validated_step != trainer.global_step:
            with torch.random.fork_rng(devices=[]):  # resumed for more epochs, training draws what it would have drawn
                run_validation(trainer)

    on_exception = _release  # the next fit reads the setting
    on_train_end = _validate  # if what is called after on_train_epoch_end ended training
