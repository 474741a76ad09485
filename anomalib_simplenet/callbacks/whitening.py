"""The pass over the training images that whitening takes before training."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from anomalib_simplenet.torch_model import SimpleNetModel

from .feature_cache import iterate_features
from .resume import resumes


class WhiteningPass(Callback):
    """Fit the model's whitening on all training images, unless training resumes from a checkpoint that holds it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what copies the model before its matrices have a size.

        Raises:
            ValueError: If Lightning's ``WeightAveraging`` meets local whitening.
        """
        averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
        if stage == "fit" and averages and getattr(pl_module.model.whitening, "local", False):
            msg = 'whiten is "local", which Lightning\'s WeightAveraging cannot average: set averaging to true instead.'
            raise ValueError(msg)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average anew and fit the whitening."""
        model = pl_module.model
        if model.averaged is not None and not resumes(trainer):
            model.averaged.steps.zero_()
        if model.whitening is None or (model.whitening.fitted and resumes(trainer)):
            return
        features = iterate_features(trainer, pl_module, "Whitening")
        moments = model.whitening.moments(_counting(model, model.patch_aggregation(each)) for each in features)
        if trainer.world_size > 1:
            moments = trainer.strategy.reduce(moments.to(pl_module.device), reduce_op="sum").cpu()
        if model.region is not None and model.whitening.local:  # positions outside get the mean of those inside
            inside = model.region.inside(moments.shape[-2:]).cpu()
            moments[:, ~inside] = moments[:, inside].mean(dim=1, keepdim=True)
        model.whitening.fit(moments)


def _counting(model: SimpleNetModel, embedding: torch.Tensor) -> torch.Tensor:
    if model.region is None or getattr(model.whitening, "local", False):
        return embedding
    return embedding[:, :, model.region.inside(embedding.shape[-2:]), None]
