"""SimpleNet as a model of anomalib."""

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.data.utils.tiler import Tiler
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.optim import Adam, Optimizer
from torchmetrics import Metric
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from .calibration import calibrated
from .callbacks.feature_cache import FeatureCache
from .callbacks.feature_store import CachedBatch
from .callbacks.final_validation import FinalValidation
from .callbacks.hold_out import HoldOut
from .callbacks.predictions import Predictions
from .callbacks.region import RegionMetrics, RegionPixels
from .callbacks.report import Report
from .callbacks.resume import Resume
from .callbacks.unreadable_images import UnreadableImages
from .callbacks.whitening import WhiteningPass
from .checkpoints import ARCHITECTURE, FORMAT, Requests, differing, portable
from .checks import check_finite, check_number
from .compat import adapt_engine, attach_trainer
from .export.exporter import ExactExport
from .extensions.brightness import MEAN, STD, normalizes_as_imagenet
from .extensions.region import Region
from .extensions.tiling import tiler_arguments
from .loss import TruncatedL1Loss
from .registry import register
from .torch_model import SimpleNetModel
from .visualizer import NonSquareImageVisualizer

logger = logging.getLogger(__name__)

PAPER_EPOCHS = 160  # 40 meta-epochs of 4
PAPER_NOISE = 0.015


@register
class SimpleNet(ExactExport, AnomalibModule):
    """SimpleNet: A Simple Network for Image Anomaly Detection and Localization.

    CVPR 2023, https://arxiv.org/abs/2303.15140. A discriminator learns to tell adapted features of normal images from
    the same features with Gaussian noise. Trains for the paper's 160 epochs unless the trainer is given ``max_epochs``,
    ``max_steps`` or ``max_time``. Validates with the last weights, when anomalib chooses thresholds; before that, only
    each epoch where a callback monitors something, or as ``check_val_every_n_epoch`` or ``val_check_interval`` say.

    Args:
        margin (float): Discriminator scores beyond it cost nothing. Defaults to ``0.5``.
        adapter_lr (float): Learning rate of the adapter. Defaults to ``1e-4``.
        discriminator_lr (float): Learning rate of the discriminator. Defaults to ``2e-4``.
        discriminator_weight_decay (float): Weight decay of the discriminator. Defaults to ``1e-5``.
        feature_cache (bool | str): Whether to keep the backbone's feature maps of the training images in main memory,
            so that later epochs need neither images nor backbone. ``"auto"`` does so unless images may change from
            epoch to epoch or the maps do not fit, and logs why not; ``True`` raises in these cases. Defaults to
            ``"auto"``.
        feature_cache_memory (float | None): GiB that the maps may take; ``None`` for half of what is free.
            Defaults to ``None``.
        false_alarm_rate (float | None): Share of normal images to label defective, at most, between 0 and 1: thresholds
            come from normal validation images alone. Defaults to ``None``: the checkpoint's, or those of best F1 score.
        pre_processor (nn.Module | bool): Applied to images first. Defaults to ``True``: resize to 288 x 288, normalise.
        post_processor (nn.Module | bool): Applied to predictions last. Defaults to ``True``: normalise scores,
            threshold image scores and anomaly maps, each with its own threshold, add p-values.
        evaluator (Evaluator | bool): Metrics. Defaults to ``True``: anomalib's, AUROC and F1 of images and pixels.
        visualizer (Visualizer | bool): Pictures of results. Defaults to ``True``: five panels an image.
        region (Path | str | None): Mask image, white where pixels count, resized and cropped as the images are; for a
            fixed camera. Kept in checkpoints and exports. Defaults to ``None``: all pixels count.
        report (bool): Whether to write ``predictions.csv`` and ``report.html``. Defaults to ``True``.
        **architecture: Arguments of :class:`anomalib_simplenet.torch_model.SimpleNetModel`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from anomalib.data import Folder
        >>> from anomalib.engine import Engine
        >>> engine = Engine(max_epochs=20)
        >>> engine.train(SimpleNet(), datamodule=Folder("cells", root="cells", normal_dir="good"))  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        margin: float = 0.5,
        adapter_lr: float = 1e-4,
        discriminator_lr: float = 2e-4,
        discriminator_weight_decay: float = 1e-5,
        feature_cache: bool | Literal["auto"] = "auto",
        feature_cache_memory: float | None = None,
        false_alarm_rate: float | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        region: Path | str | None = None,
        report: bool = True,
        **architecture: Any,  # noqa: ANN401
    ) -> None:
        adapt_engine()
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.post_processor = calibrated(self.post_processor, false_alarm_rate)
        if evaluator is True and not getattr(self.post_processor, "enable_thresholding", False):
            for metric in self.evaluator.test_metrics:  # there are no labels to judge
                metric.strict = False
        check_number("adapter_lr", adapter_lr, above=0)
        check_number("discriminator_lr", discriminator_lr, above=0)
        check_number("discriminator_weight_decay", discriminator_weight_decay, at_least=0)
        self.feature_cache = FeatureCache(feature_cache, feature_cache_memory)
        self.report, self.requests = report, Requests()
        self.adapter_lr, self.discriminator_lr = float(adapter_lr), float(discriminator_lr)
        self.discriminator_weight_decay = float(discriminator_weight_decay)
        self.loss = TruncatedL1Loss(margin)
        self.model = SimpleNetModel(**architecture)
        self.model.region = None if region is None else Region.read(region, self.pre_processor)

    def setup(self, stage: str) -> None:
        """Check what the trainer brings, before any work.

        Raises:
            ValueError: If the trainer's precision is not one that anomalib's batches go with, or images would be
                smaller than the backbone can take.
        """
        super().setup(stage)
        if self.trainer.precision not in {"32-true", "16-mixed", "bf16-mixed"}:
            msg = f"precision is {self.trainer.precision}, expected 32-true, 16-mixed or bf16-mixed."
            raise ValueError(msg)
        extractor = self.model.feature_extractor
        if isinstance(self.pre_processor, PreProcessor) and self.input_size is not None:
            extractor.check_image_size(self.input_size)
        transform = getattr(self.pre_processor, "transform", None)
        if self.model.normalize_brightness and not normalizes_as_imagenet(transform):
            msg = f"normalize_brightness needs a pre_processor that ends with Normalize(mean={MEAN}, std={STD})."
            raise ValueError(msg)
        unscaled = self.model.whitening is None and self.model.anomaly_generator.noise_std == PAPER_NOISE
        if stage == "fit" and unscaled and "wide_resnet50_2" not in str(extractor.architecture):
            logger.warning("noise_std is 0.015, for WideResNet-50-2's features: set whiten to true and noise_std to 1.")

    def on_fit_start(self) -> None:
        """Forget the checkpoint that the weights came from: they are about to change."""
        self.checkpoint_path = None

    def on_validation_start(self) -> None:
        """Forget what anomalib's metrics counted in a run that an exception ended, as that of an unreadable image."""
        for component in (self.post_processor, self.evaluator):
            for metric in component.modules() if isinstance(component, nn.Module) else ():
                if isinstance(metric, Metric):
                    metric.reset()

    on_test_start = on_validation_start

    def training_step(self, batch: Batch | CachedBatch, *_args, **_kwargs) -> torch.Tensor:
        """Loss, a scalar, of a batch of normal images or of their feature maps.

        Logs it with the shares of real and fake patches scored right (authors' p_true, p_fake).
        """
        features = batch.features if isinstance(batch, CachedBatch) else self.model.extract(batch.image)
        real, fake = self.model.discriminate(features)
        loss = self.loss(real, fake)
        metrics = {
            "train_loss": loss,
            "real_accuracy": (real >= self.loss.margin).float().mean(),
            "fake_accuracy": (fake < -self.loss.margin).float().mean(),
        }
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(features[0]))
        return loss

    def predict_step(self, batch: Batch, *_args, **_kwargs) -> Batch:
        """Predict one batch; so do validation, for anomalib's thresholds, and test.

        Raises:
            ValueError: If pixels or scores of an image are not finite.
        """
        predictions = self.model(batch.image)
        check_finite(batch, batch.image, "pixels are NaN or infinite: expected numbers from 0 to 1")
        check_finite(batch, predictions.pred_score, "scores are NaN or infinite: the model's weights are broken")
        return batch.update(**predictions._asdict())

    validation_step = test_step = predict_step

    def configure_optimizers(self) -> Optimizer:
        """AdamW for the adapter and Adam for the discriminator, as one optimizer."""
        adapter = {"params": self.model.adapter.parameters(), "lr": self.adapter_lr, "decoupled_weight_decay": True}
        adapter["weight_decay"] = 0.01  # AdamW's default, which the authors leave alone
        discriminator = {"params": self.model.discriminator.parameters(), "lr": self.discriminator_lr}
        groups = [adapter, discriminator] if len(self.model.adapter) else [discriminator]
        return Adam(groups, weight_decay=self.discriminator_weight_decay)

    def optimizer_step(self, *args, **kwargs) -> None:
        """Train a step, and average the weights."""
        super().optimizer_step(*args, **kwargs)
        if self.model.averaged is not None:
            self.model.averaged.update(self.model.trained)

    @AnomalibModule.trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        """Attach a trainer; one that has no limit to training gets the paper's."""
        attach_trainer(self, trainer, PAPER_EPOCHS)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint load without network and on other machines: it holds the backbone's weights.

        Raises:
            ValueError: If the trained weights are not finite: such weights are not saved.
        """
        super().on_save_checkpoint(checkpoint)
        trained = {name: value for name, value in self.model.state_dict().items() if "feature_extractor" not in name}
        if broken := [name for name, value in trained.items() if not value.isfinite().all()]:
            msg = (
                f"{broken[0]} is NaN or infinite after epoch {self.current_epoch}, and is not saved: check the images, "
                f"or lower adapter_lr ({self.adapter_lr}), discriminator_lr ({self.discriminator_lr}) or noise_std "
                f"({self.model.anomaly_generator.noise_std})."
            )
            raise ValueError(msg)
        checkpoint["hyper_parameters"] = portable(checkpoint["hyper_parameters"], self.model)
        checkpoint["simplenet_format"] = FORMAT
        checkpoint["simplenet_top_patches"] = self.model.top_patches
        checkpoint["simplenet_tiler"] = self.model.tiler and tiler_arguments(self.model.tiler)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take architecture, pre-processor and settings from the checkpoint, but those that the user asked for.

        Raises:
            ValueError: If it is no checkpoint of SimpleNet, needs a backbone from Python, or has another region.
        """
        from anomalib.callbacks import TilerConfigurationCallback  # it imports anomalib.models: see registry.py

        attached, tiler = super().configure_callbacks(), self.model.tiler
        requested = self.requests.of(self)
        self.checkpoint_path = None
        super().on_load_checkpoint(checkpoint)
        kept = super().configure_callbacks()  # without components that the checkpoint was trained without
        found = differing(checkpoint, self.hparams, self.model)
        if self.hparams.get("region"):
            Region.read(self.hparams["region"], self.pre_processor).check_equal(checkpoint["state_dict"])
        elif "model.region.mask" not in checkpoint["state_dict"]:
            self.model.region = None  # of an earlier checkpoint
        if found:
            logger.warning("Using %s from the checkpoint.", ", ".join(f"{k}={v!r}" for k, v in found.items()))
            self.hparams.update(portable(self.hparams, self.model) | found)
            self.model = SimpleNetModel(**{name: self.hparams[name] for name in ARCHITECTURE})
        top_patches = checkpoint.get("simplenet_top_patches", checkpoint["hyper_parameters"]["top_patches"])
        self.requests.restore(self, requested, top_patches)
        saved = checkpoint.get("simplenet_tiler")
        self.model.tiler = saved and Tiler(**saved)
        try:
            trainer = self.trainer
        except RuntimeError:  # load_from_checkpoint has none
            return
        if any(isinstance(each, TilerConfigurationCallback) and each.enable for each in trainer.callbacks):
            self.model.tiler = tiler  # set up by the callback
        trainer.callbacks = [each for each in trainer.callbacks if each in kept or each not in attached]
        if isinstance(trainer.datamodule, AnomalibDataModule):  # set up before, with another pre-processor's image size
            trainer.datamodule.setup(trainer.state.fn)

    def configure_callbacks(self) -> list[Callback]:
        """What happens around training and testing, in the order in which Lightning calls it.

        anomalib's components choose thresholds of the region's pixels, pre-process a batch before the cache sees it,
        and label predictions before they are written. The cache comes before the whitening pass, which fills it; the
        final validation before checkpoint callbacks, which Lightning calls last, so that thresholds are saved with the
        weights.
        """
        components, inside = [RegionPixels()], RegionMetrics()
        for component in super().configure_callbacks():
            components += [inside, component, inside.restored] if component is self.evaluator else [component]
        training = [HoldOut(), UnreadableImages(), Resume(), self.feature_cache, WhiteningPass(), FinalValidation()]
        return [*components, *training, *([Predictions(), Report()] if self.report else [])]

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Settings that anomalib forces on the trainer, over the user's: no validation of the untrained model."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Learns from normal images alone."""
        return LearningType.ONE_CLASS

    @classmethod
    def configure_pre_processor(
        cls, image_size: tuple[int, int] | None = None, center_crop_size: tuple[int, int] | None = None
    ) -> PreProcessor:
        """Make the default pre-processor: resize, optionally crop, normalise with ImageNet's statistics.

        Sizes are ``(height, width)``; images are resized to 288 x 288 by default. The paper resizes to 329 and crops to
        288.

        Raises:
            ValueError: If the crop is larger than the image.
        """
        height, width = image_size or (288, 288)
        if center_crop_size is not None and (center_crop_size[0] > height or center_crop_size[1] > width):
            msg = f"center_crop_size is {center_crop_size}, expected at most image_size, {(height, width)}."
            raise ValueError(msg)
        crop = [] if center_crop_size is None else [CenterCrop(center_crop_size)]
        resize, normalize = Resize((height, width), antialias=True), Normalize(mean=MEAN, std=STD)
        return PreProcessor(transform=Compose([resize, *crop, normalize]))

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Make the default visualizer: image, ground truth, predicted mask, heat map and outline over the image."""
        return NonSquareImageVisualizer(fields=["image", "gt_mask", "pred_mask"])  # anomalib adds the last two
