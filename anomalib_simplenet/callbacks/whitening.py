"""The pass over the training images that whitening takes before training."""

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from anomalib_simplenet.extensions.whitening import Whitening

from .feature_cache import iterate_features
from .resume import resumes


class WhiteningPass(Callback):
    """Fit the model's whitening on all training images, unless training resumes from a checkpoint that holds it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse Lightning's ``WeightAveraging``: it copies the model before local whitening's matrices have a size."""
        averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
        if stage == "fit" and averages and getattr(pl_module.model.whitening, "local", False):
            msg = 'whiten is "local", which Lightning\'s WeightAveraging cannot average: set averaging to true instead.'
            raise ValueError(msg)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average anew, and fit the whitening of embeddings and that of the fine map."""
        model = pl_module.model
        if model.averaged is not None and not resumes(trainer):
            model.averaged.steps.zero_()
        if model.whitening is None or (model.whitening.fitted and resumes(trainer)):
            return
        if model.fine_map is not None:  # first, since it may refuse the images' size
            fit_whitening(trainer, pl_module, model.fine_map.whitening, model.fine_map.cells)
        fit_whitening(trainer, pl_module, model.whitening, model.patch_aggregation)


def fit_whitening(
    trainer: Trainer,
    pl_module: LightningModule,
    whitening: Whitening,
    embed: Callable[[Sequence[torch.Tensor]], torch.Tensor],
) -> None:
    """Fit one whitening on what ``embed`` makes of the feature maps of all training images."""
    region = pl_module.model.region
    embeddings = (embed(maps) for maps in iterate_features(trainer, pl_module, "Whitening"))
    if region is not None and not whitening.local:
        embeddings = (maps[:, :, region.inside(maps.shape[-2:]), None] for maps in embeddings)
    moments = whitening.moments(embeddings)
    if trainer.world_size > 1:
        moments = trainer.strategy.reduce(moments.to(pl_module.device), reduce_op="sum").cpu()
    if region is not None and whitening.local:  # positions outside get the mean of those inside
        inside = region.inside(moments.shape[-2:]).cpu()
        moments[:, ~inside] = moments[:, inside].mean(dim=1, keepdim=True)
    whitening.fit(moments)
