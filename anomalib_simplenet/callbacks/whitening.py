"""The pass over the training images that whitening takes before training."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

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
        """Average anew and fit the whitening."""
        model = pl_module.model
        if model.averaged is not None and not resumes(trainer):
            model.averaged.steps.zero_()
        if model.whitening is None or (model.whitening.fitted and resumes(trainer)):
            return
        features = iterate_features(trainer, pl_module, "Whitening")
        embeddings = (model.patch_aggregation(maps) for maps in features)
        if model.region is not None and not model.whitening.local:
            embeddings = (maps[:, :, model.region.inside(maps.shape[-2:]), None] for maps in embeddings)
        moments = model.whitening.moments(embeddings)
        if trainer.world_size > 1:
            moments = trainer.strategy.reduce(moments.to(pl_module.device), reduce_op="sum").cpu()
        if model.region is not None and model.whitening.local:  # positions outside get the mean of those inside
            inside = model.region.inside(moments.shape[-2:]).cpu()
            moments[:, ~inside] = moments[:, inside].mean(dim=1, keepdim=True)
        model.whitening.fit(moments)
