"""Every use of a private or undocumented name of another library.

Each function says what it is for and where upstream discusses it; ``tests/unit/test_upstream.py`` says in a sentence
what changed should one stop working.
"""

from lightning.pytorch import Trainer


def run_validation(trainer: Trainer) -> None:
    """Validate in the middle of a fit, as Lightning does at an epoch's end.

    Purpose: thresholds for the last weights, whatever ended training. ``Trainer.validate`` would end the fit. The loop
    is reached by documented attributes, but running it by hand is not documented
    (https://github.com/Lightning-AI/pytorch-lightning/issues/8650 asks for a public way).
    """
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
