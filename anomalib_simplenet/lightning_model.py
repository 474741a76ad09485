"""SimpleNet as a model of anomalib."""

import logging
import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import walk_stack
from typing import Any, Literal

import torch
from anomalib import LearningType, TaskType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.deploy import CompressionType
from anomalib.metrics import AUPRO, Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.trainer.states import TrainerFn
from psutil import virtual_memory
from torch import nn
from torch.optim import Adam, Optimizer
from torchmetrics import Metric
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from .arguments import check_types
from .callbacks.feature_cache import FeatureCache, iterate_features
from .callbacks.feature_store import CachedBatch
from .callbacks.report import Report
from .callbacks.unreadable_images import UnreadableImages
from .export.openvino import (
    check_exportable,
    exportable_transform,
    head_operations,
    keep_float32,
    lay_out_for_model_server,
    prepend_resize,
    quantize,
    split_resize,
)
from .loss import TruncatedL1Loss
from .registry import register
from .torch_model import SimpleNetModel
from .visualizer import OblongImageVisualizer

logger = logging.getLogger(__name__)

PAPER_EPOCHS = 160  # 40 meta-epochs of 4 passes
_NEVER = sys.maxsize
_DEFAULT_SENSITIVITY = 0.5
_COMPONENTS = ("backbone", "pre_processor", "post_processor", "evaluator", "visualizer")  # check themselves
_NOT_IN_WEIGHTS = {"pre_trained", "noise_std", "mix_noise", "patch_fraction"}


@register
class SimpleNet(AnomalibModule):
    """SimpleNet: A Simple Network for Image Anomaly Detection and Localization.

    CVPR 2023, https://arxiv.org/abs/2303.15140. A discriminator learns to tell adapted features of normal images from
    the same features with Gaussian noise. Trains for the paper's 160 passes unless the trainer is given ``max_epochs``,
    ``max_steps`` or ``max_time``. Validates after the last step, when anomalib chooses thresholds; before that, only
    each epoch where a callback monitors something, or as ``check_val_every_n_epoch`` or ``val_check_interval`` say.

    Args:
        backbone (str | nn.Module): Name of a CNN or a ``vit_*`` of timm, or ``local-dir:FOLDER`` for a folder with
            timm's ``config.json`` and weights. In Python also a module. Defaults to ``"wide_resnet50_2.tv_in1k"``; the
            default noise belongs to its weights.
        layers (Sequence[str]): Layers of the backbone that make the embedding; the first gives the grid. Defaults to
            ``("layer2", "layer3")``.
        pre_trained (bool): Whether to load the backbone's ImageNet weights. Defaults to ``True``.
        patch_size (int): Side of the neighbourhood pooled into a patch, odd. Defaults to ``3``.
        pretrain_embed_dimension (int | None): What each layer's patches are pooled to; ``None`` for its own number of
            channels. Defaults to ``1536``.
        target_embed_dimension (int | None): Size of a patch embedding; ``None`` for the sum of the layers' channels.
            Defaults to ``1536``.
        adapter_layers (int): Linear layers of the adapter; ``0`` for none. Defaults to ``1``.
        discriminator_layers (int): Linear layers of the discriminator. Defaults to ``2``.
        discriminator_hidden (int | None): Size of its hidden layers; ``None`` shrinks by 1.5 a layer.
            Defaults to ``1024``.
        noise_std (float): Standard deviation of the noise that makes anomalies. Must suit the scale of the backbone's
            features. Defaults to ``0.015``.
        mix_noise (int): Number of noise scales, ``noise_std * 1.1**k``. Defaults to ``1``.
        whiten (bool | str): Whether to whiten embeddings with the covariance of the training set's, taken in one more
            pass over it before training. Makes ``noise_std`` a share of their deviation, whatever the backbone.
            ``"local"`` does so at each position of the image for itself, for images that are all taken alike; those to
            predict must then have the size of training's. Not in the paper. Defaults to ``False``.
        patch_fraction (float): Share of a batch's patches, drawn at random in each step, to train on.
            Defaults to ``1.0``, all.
        distance_weight (float): How much the distance of a whitened embedding from the training set's mean, divided by
            the square root of its size, adds to a patch's score. Not in the paper. Defaults to ``0.0``.
        top_patches (int): How many of an image's highest patches make its score, by their mean; the paper's is the
            highest alone. Defaults to ``1``.
        averaging (bool): Whether to predict with the average of the weights over about the last quarter of training
            instead of those of the last step, as in the paper. Defaults to ``True``.
        feature_cache (bool | str): Whether to keep the backbone's feature maps of the training images in the main
            memory, so that once each was seen training needs neither images nor backbone. ``"auto"`` does so unless
            images may change from epoch to epoch or the maps do not fit, and logs why not; ``True`` raises in these
            cases. Defaults to ``"auto"``.
        feature_cache_memory (float | None): GiB that the maps may take; ``None`` for half of what is free.
            Defaults to ``None``.
        feature_cache_dtype (str): ``"float16"``, or ``"float32"`` to train exactly as without the cache.
            Defaults to ``"float16"``.
        margin (float): Discriminator scores beyond it cost nothing. Defaults to ``0.5``.
        adapter_lr (float): Learning rate of the adapter. Defaults to ``1e-4``.
        discriminator_lr (float): Learning rate of the discriminator. Defaults to ``2e-4``.
        discriminator_weight_decay (float): Weight decay of the discriminator. Defaults to ``1e-5``.
        pre_processor (nn.Module | bool): Applied to images first. Defaults to ``True``: resize to 288 x 288, normalise.
        post_processor (nn.Module | bool): Applied to predictions last. Defaults to ``True``: normalise scores,
            threshold image scores and anomaly maps, each with its own threshold.
        evaluator (Evaluator | bool): Metrics. Defaults to ``True``: AUROC and F1 of images and, where there are masks,
            AUROC, F1 and AUPRO of pixels.
        visualizer (Visualizer | bool): Pictures of results. Defaults to ``True``: five panels an image.
        report (bool): Whether to write ``predictions.csv`` and, after a test, ``report.html``
            (:class:`anomalib_simplenet.callbacks.report.Report`). Defaults to ``True``.

    Raises:
        ValueError: If an argument is out of its range, or images would be smaller than the backbone can take.

    Example:
        >>> from anomalib.data import Folder
        >>> from anomalib.engine import Engine
        >>> engine = Engine(max_epochs=20)
        >>> engine.train(SimpleNet(), datamodule=Folder("cells", root="cells", normal_dir="good"))  # doctest: +SKIP
    """

    model: SimpleNetModel

    def __init__(
        self,
        backbone: str | nn.Module = "wide_resnet50_2.tv_in1k",
        layers: Sequence[str] = ("layer2", "layer3"),
        pre_trained: bool = True,
        patch_size: int = 3,
        pretrain_embed_dimension: int | None = 1536,
        target_embed_dimension: int | None = 1536,
        adapter_layers: int = 1,
        discriminator_layers: int = 2,
        discriminator_hidden: int | None = 1024,
        noise_std: float = 0.015,
        mix_noise: int = 1,
        whiten: bool | Literal["local"] = False,
        patch_fraction: float = 1.0,
        distance_weight: float = 0.0,
        top_patches: int = 1,
        averaging: bool = True,
        feature_cache: bool | Literal["auto"] = "auto",
        feature_cache_memory: float | None = None,
        feature_cache_dtype: Literal["float16", "float32"] = "float16",
        margin: float = 0.5,
        adapter_lr: float = 1e-4,
        discriminator_lr: float = 2e-4,
        discriminator_weight_decay: float = 1e-5,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        report: bool = True,
    ) -> None:
        check_types(SimpleNet.__init__, locals(), leave_out=_COMPONENTS)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        if post_processor is False and evaluator is True:  # there are no labels to judge
            for metric in self.evaluator.test_metrics:
                metric.strict = False
        for name, value in (("adapter_lr", adapter_lr), ("discriminator_lr", discriminator_lr)):
            if not value > 0:
                msg = f"{name} is {value}, expected a number above 0."
                raise ValueError(msg)
        if not discriminator_weight_decay >= 0:
            msg = f"discriminator_weight_decay is {discriminator_weight_decay}, expected 0 or more."
            raise ValueError(msg)
        if feature_cache_memory is not None and not feature_cache_memory > 0:
            msg = f"feature_cache_memory is {feature_cache_memory}, expected GiB above 0, or None for half of the free."
            raise ValueError(msg)
        self.feature_cache = feature_cache
        self.feature_cache_memory = feature_cache_memory
        self.feature_cache_dtype = feature_cache_dtype
        self._validate_only_last = False
        self._check_val_every_n_epoch: int | None = 1
        self._validated_step: int | None = None
        self._random_state: dict[str, torch.Tensor] | None = None
        self.report = report
        self.adapter_lr = adapter_lr
        self.discriminator_lr = discriminator_lr
        self.discriminator_weight_decay = discriminator_weight_decay
        self.loss = TruncatedL1Loss(margin)
        self.model = SimpleNetModel(
            backbone=backbone,
            layers=layers,
            pre_trained=pre_trained,
            patch_size=patch_size,
            pretrain_embed_dimension=pretrain_embed_dimension,
            target_embed_dimension=target_embed_dimension,
            adapter_layers=adapter_layers,
            discriminator_layers=discriminator_layers,
            discriminator_hidden=discriminator_hidden,
            noise_std=noise_std,
            mix_noise=mix_noise,
            whiten=whiten,
            patch_fraction=patch_fraction,
            distance_weight=distance_weight,
            top_patches=top_patches,
            averaging=averaging,
        )
        self._match_export_to_training()
        self._check_image_size()

    def setup(self, stage: str) -> None:
        """Check the trainer.

        Raises:
            ValueError: If the trainer's precision is not one that anomalib's batches go with.
        """
        super().setup(stage)
        if self.trainer.precision not in {"32-true", "16-mixed", "bf16-mixed"}:
            msg = f"precision is {self.trainer.precision}, expected 32-true, 16-mixed or bf16-mixed."
            raise ValueError(msg)

    def training_step(self, batch: Batch | CachedBatch, *_args, **_kwargs) -> torch.Tensor:
        """Loss of one batch; logs it with the shares of real and fake scores beyond the margin (authors' p_true/fake).

        Args:
            batch (Batch | CachedBatch): Normal images.

        Returns:
            torch.Tensor: Truncated L1 loss, scalar.
        """
        features = batch.features if isinstance(batch, CachedBatch) else self.model.extract(batch.image)
        real, fake = self.model.discriminate(features)
        loss = self.loss(real, fake)
        figures = {
            "train_loss": loss,
            "p_true": (real >= self.loss.margin).float().mean(),
            "p_fake": (fake < -self.loss.margin).float().mean(),
        }
        self.log_dict(figures, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(features[0]))
        return loss

    def validation_step(self, batch: Batch, *_args, **_kwargs) -> Batch:
        """Predict one batch, for anomalib's thresholds and metrics; as :meth:`predict_step`."""
        return self.predict_step(batch)

    def predict_step(self, batch: Batch, *_args, **_kwargs) -> Batch:
        """Predict one batch.

        Raises:
            ValueError: If an image has pixels that are not finite.
        """
        finite = batch.image.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            paths = batch.image_path or range(len(finite))
            names = ", ".join(str(path) for path, good in zip(paths, finite.tolist(), strict=True) if not good)
            msg = f"Pixels of {names} are NaN or infinite: images are to be finite, from 0 to 1."
            raise ValueError(msg)
        return batch.update(**self.model(batch.image)._asdict())

    def configure_optimizers(self) -> Optimizer:
        """AdamW for the adapter and Adam for the discriminator, as one optimizer."""
        discriminator = {
            "params": self.model.discriminator.parameters(),
            "lr": self.discriminator_lr,
            "weight_decay": self.discriminator_weight_decay,
        }
        adapter = {
            "params": self.model.adapter.parameters(),
            "lr": self.adapter_lr,
            "weight_decay": 0.01,  # AdamW's default, which the authors leave alone
            "decoupled_weight_decay": True,
        }
        return Adam([adapter, discriminator] if len(self.model.adapter) else [discriminator])

    def optimizer_step(self, *args, **kwargs) -> None:
        """Train a step, and average the weights."""
        super().optimizer_step(*args, **kwargs)
        self.model.average()

    @property
    def trainer(self) -> Trainer:
        """The trainer; attaching one that has no limit to training gives it the paper's."""
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        AnomalibModule.trainer.fset(self, trainer)
        # The only moment to tell the user's 1000 epochs from the 1000 that Lightning puts in place of nothing.
        if (
            trainer is not None
            and trainer.state.fn == TrainerFn.FITTING
            and trainer.max_epochs is None
            and trainer.max_steps == -1
            and not any(isinstance(callback, Timer) for callback in trainer.callbacks)
        ):
            trainer.fit_loop.max_epochs = PAPER_EPOCHS

    def on_fit_start(self) -> None:
        """Decide when to validate, by default after the last batch of training only, and whether to keep features."""
        self.train()
        trainer = self.trainer
        if trainer.ckpt_path is not None and self._random_state is not None:  # go on as if never interrupted
            _set_random_state(self._random_state)
        if trainer.check_val_every_n_epoch == _NEVER:  # an earlier fit was interrupted
            trainer.check_val_every_n_epoch = 1
        self._check_val_every_n_epoch = trainer.check_val_every_n_epoch
        interval = getattr(trainer, "val_check_interval", None)  # Lightning sets none where it is a time
        self._validate_only_last = (
            trainer.check_val_every_n_epoch == 1
            and isinstance(interval, float)
            and interval == 1.0
            and not any(getattr(callback, "monitor", None) for callback in trainer.callbacks)
        )
        self._validated_step = None

    def on_train_start(self) -> None:
        """Average anew and fit the whitening, in a pass over the images, unless training goes on from a checkpoint."""
        goes_on = self.trainer.ckpt_path is not None
        if not goes_on:
            self.model.forget_averages()
        whitening = self.model.whitening
        if whitening is None or (whitening.fitted and goes_on):
            return
        maps = iterate_features(self.trainer, self, "Whitening")
        moments = whitening.moments(self.model.patch_aggregation(features) for features in maps)
        if self.trainer.world_size > 1:
            moments = self.trainer.strategy.reduce(moments.to(self.device), reduce_op="sum").cpu()
        whitening.fit(moments)

    def on_train_epoch_start(self) -> None:
        """Hold validation back."""
        if self._validate_only_last:
            self.trainer.check_val_every_n_epoch = _NEVER

    def on_train_batch_end(self, *_args, **_kwargs) -> None:
        """Let Lightning validate if this was the last batch of training, whichever limit ended it."""
        trainer = self.trainer
        is_last_step = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        is_last_epoch = trainer.max_epochs != -1 and trainer.current_epoch + 1 >= trainer.max_epochs
        is_last = is_last_step or (trainer.is_last_batch and is_last_epoch)
        if is_last:
            trainer.should_stop = True  # on which Lightning validates also in mid-epoch
        if is_last or self._is_stopped():
            # With None, as with the user's 2, checkpoint callbacks save after each validation.
            trainer.check_val_every_n_epoch = 1 if self._check_val_every_n_epoch == 1 else None

    def on_validation_end(self) -> None:
        """Note that thresholds belong to the weights of now."""
        self._validated_step = self.trainer.global_step

    def on_train_epoch_end(self) -> None:
        """Give the setting back, which checkpoint callbacks, called next, read to save after each epoch.

        Validates if a callback has just ended training.

        Raises:
            ValueError: If the weights are no longer finite: such weights are not saved.
        """
        if not torch.stack([weight.isfinite().all() for weight in self.model.discriminator.parameters()]).all():
            msg = (
                f"Weights are NaN or infinite after epoch {self.current_epoch}: images with such pixels, or too high "
                f"adapter_lr ({self.adapter_lr}), discriminator_lr ({self.discriminator_lr}) or noise_std "
                f"({self.hparams.get('noise_std')})."
            )
            raise ValueError(msg)
        self.trainer.check_val_every_n_epoch = self._check_val_every_n_epoch
        if self._is_stopped():
            self._validate_last_weights()

    def on_train_end(self) -> None:
        """Validate if a callback that is called after :meth:`on_train_epoch_end` ended training."""
        self._validate_last_weights()

    def _is_stopped(self) -> bool:
        return self.trainer.should_stop and self.trainer.fit_loop._can_stop_early  # noqa: SLF001

    def _validate_last_weights(self) -> None:
        trainer = self.trainer
        if trainer.enable_validation and self._validated_step != trainer.global_step:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_validation_epoch_start(self) -> None:
        """Score with the weights of now: callbacks that average weights swap them after eval mode was entered."""
        self.model.fuse()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint load without network and on other machines: it holds the backbone's weights."""
        super().on_save_checkpoint(checkpoint)
        backbone = self.hparams.get("backbone")  # not there if it cannot be pickled
        if not isinstance(backbone, str) or backbone.startswith("local-dir:"):
            backbone = self.model.feature_extractor.architecture
        checkpoint["hyper_parameters"] |= {"backbone": backbone, "pre_trained": False}
        checkpoint["random_state"] = _random_state()

    def on_predict_batch_end(self, outputs: Batch, _batch: Batch, batch_idx: int, *_args, **_kwargs) -> None:
        """Say so before the predictions that Lightning keeps to return them fill the memory."""
        loop = self.trainer.predict_loop
        if batch_idx or not loop.return_predictions or outputs.image is None:
            return
        tensors = [value for value in vars(outputs).values() if isinstance(value, torch.Tensor)]
        needed = sum(tensor.nbytes for tensor in tensors) * sum(loop.max_batches)
        if needed > virtual_memory().available / 2:
            logger.warning(
                "Keeping all predictions to return them will take about %.1f GiB. If they are not needed, pass "
                "--return_predictions false.",
                needed / 2**30,
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's architecture where the model was built with another one, and the user's sensitivity.

        anomalib would put the sensitivity of training in place of the one that a post-processor is given for testing,
        predicting or exporting.
        """
        wished = {name: getattr(self.post_processor, name, None) for name in ("image_sensitivity", "pixel_sensitivity")}
        super().on_load_checkpoint(checkpoint)
        for name, value in wished.items() if self.post_processor is not None else ():
            saved_value = getattr(self.post_processor, name, None)
            if value not in {None, _DEFAULT_SENSITIVITY}:
                setattr(self.post_processor, name, value)
            elif value != saved_value:
                logger.warning(
                    "Taking %s=%s from the checkpoint. To have %s, ask for %s: the default is taken for no wish.",
                    *(name, saved_value, value, _DEFAULT_SENSITIVITY + 1e-3),
                )
        self._match_export_to_training()
        self._random_state = checkpoint.get("random_state")
        older = {
            "distance_weight": 0.0,
            "top_patches": 1,
            "averaging": False,
        }  # what checkpoints of 0.1 were trained with
        saved = {**older, **checkpoint.get("hyper_parameters", {})}
        if "model.discriminator.tail.weight" not in checkpoint["state_dict"] or "adapter_layers" not in saved:
            msg = (
                "This is no checkpoint of SimpleNet: it has no discriminator or no hyper-parameters. "
                "Pass the model it was trained with, --model NAME."
            )
            raise ValueError(msg)
        own = {**self.hparams, "backbone": self.model.feature_extractor.architecture}
        architecture = [name for name in signature(SimpleNetModel).parameters if name in saved.keys() - _NOT_IN_WEIGHTS]
        differing = {name: saved[name] for name in architecture if _plain(saved, name) != _plain(own, name)}
        if saved["backbone"] is None:  # a module, which the checkpoint does not hold
            differing.pop("backbone", None)
        if differing:
            logger.warning("Taking %s from the checkpoint.", ", ".join(f"{k}={v!r}" for k, v in differing.items()))
            if "backbone" not in self.hparams:  # Lightning drops what cannot be pickled
                msg = f"The checkpoint was trained with {differing}: build the model with these and its backbone."
                raise ValueError(msg)
            self.hparams.update(differing)
            arguments = {name: self.hparams[name] for name in signature(SimpleNetModel).parameters}
            self.model = SimpleNetModel(**{**arguments, "pre_trained": False})

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export to ONNX as anomalib does, but with the resize of training, and also without any resize.

        The arguments are those of :meth:`anomalib.models.AnomalibModule.to_onnx`. Opset 18 is the default, below which
        torch's exporter fails to convert its graph.

        Returns:
            Path: The ``.onnx`` file, in ``weights/onnx`` under ``export_root``.

        Raises:
            ValueError: If the pre-processor cannot be exported for images of any size, and ``input_size`` is ``None``.
        """
        check_exportable(getattr(self.pre_processor, "export_transform", None), input_size)
        if input_size is None and "dynamic_axes" not in kwargs:
            # anomalib would trace an image of 2 x 2 pixels, too small to tell its size from that of its feature maps.
            least = 2 * self.model.feature_extractor.stride
            sides = {2: torch.export.Dim("height", min=least), 3: torch.export.Dim("width", min=least)}
            kwargs.setdefault("dynamic_shapes", ({0: torch.export.Dim("batch_size"), **sides},))
        return super().to_onnx(export_root, model_file_name, input_size, **{"opset_version": 18, **kwargs})

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,  # noqa: ARG002
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Export to OpenVINO as anomalib does, but with the resize of training, and computing in float32.

        The arguments are those of :meth:`anomalib.models.AnomalibModule.to_openvino`; ``task`` is not used. Of the
        types of compression, those to eight bits touch the backbone alone (:func:`quantize`).

        Returns:
            Path: The ``.xml`` file, in ``weights/openvino`` under ``export_root``; with a second name in the folder
            ``1`` there, where OpenVINO Model Server looks for it.
        """
        import openvino as ov

        transform = getattr(self.pre_processor, "export_transform", None)
        resized, rest = split_resize(transform)
        with TemporaryDirectory() as folder:
            if resized:
                self.pre_processor.export_transform = rest
            try:
                onnx = self.to_onnx(folder, model_file_name, resized or input_size, **(onnx_kwargs or {}))
            finally:
                if resized:
                    self.pre_processor.export_transform = transform
            model = ov.convert_model(onnx, **(ov_kwargs or {}))
            head = head_operations(onnx)
        if resized:
            model = prepend_resize(model, input_size)
        if compression_type not in {None, CompressionType.FP16}:
            model = quantize(model, compression_type, head, datamodule, metric, max_drop)
        keep_float32(model)
        path = Path(export_root) / "weights" / "openvino" / f"{model_file_name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        ov.save_model(model, path, compress_to_fp16=compression_type == CompressionType.FP16)
        lay_out_for_model_server(path)
        return path

    def _match_export_to_training(self) -> None:
        """Exported models shall see what the model was trained on; anomalib drops the resize's antialiasing."""
        if isinstance(self.pre_processor, PreProcessor):
            self.pre_processor.export_transform = exportable_transform(self.pre_processor.transform)

    def _check_image_size(self) -> None:
        size = self.input_size if isinstance(self.pre_processor, PreProcessor) else None
        extractor = self.model.feature_extractor
        if size is None:
            return
        if min(size) < extractor.stride:
            problem = f"smaller than the {extractor.stride} pixels that the backbone's coarsest layer sums up"
        elif any(side % extractor.patch_size for side in size):
            problem = f"no multiple of the backbone's patches of {extractor.patch_size} pixels"
        else:
            return
        msg = f"pre_processor makes images of {size}, {problem}. Give one with another size of Resize or CenterCrop."
        raise ValueError(msg)

    def configure_callbacks(self) -> list[Callback]:
        """Name anomalib's components and, last, the report on what they made of the scores."""
        cache = FeatureCache(self.feature_cache, self.feature_cache_memory, self.feature_cache_dtype)
        report = [Report()] if self.report else []
        return [*super().configure_callbacks(), UnreadableImages(), cache, *report]

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
        cls,
        image_size: tuple[int, int] | None = None,
        center_crop_size: tuple[int, int] | None = None,
    ) -> PreProcessor:
        """Make the default pre-processor: resize, crop if asked to, normalise with ImageNet's statistics.

        Args:
            image_size (tuple[int, int] | None): ``(height, width)`` to resize to. Defaults to ``(288, 288)``.
            center_crop_size (tuple[int, int] | None): ``(height, width)`` to crop to after that. The paper resizes to
                329 and crops to 288. Defaults to ``None``.

        Returns:
            PreProcessor: anomalib's pre-processor.

        Raises:
            ValueError: If the crop is larger than the image.
        """
        height, width = image_size or (288, 288)
        transforms = [Resize((height, width), antialias=True)]
        if center_crop_size is not None:
            if center_crop_size[0] > height or center_crop_size[1] > width:
                msg = f"center_crop_size {center_crop_size} is larger than image_size {(height, width)}."
                raise ValueError(msg)
            transforms.append(CenterCrop(center_crop_size))
        transforms.append(Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]))
        return PreProcessor(transform=Compose(transforms))

    def configure_post_processor(self) -> PostProcessor:
        """Make the default post-processor: separate thresholds of image scores and anomaly maps."""
        return PostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Make the default evaluator: anomalib's, and AUPRO. Pixel metrics are left out where there are no masks."""
        evaluator = AnomalibModule.configure_evaluator()
        # `anomalib benchmark` makes one table of all models' metrics, and fails where one has a metric more.
        if not _called_from("anomalib.pipelines.benchmark"):
            evaluator.test_metrics.append(AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False))
        return evaluator

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Make the default visualizer: image, ground truth, predicted mask, heat map and outline over the image."""
        return OblongImageVisualizer(
            fields=["image", "gt_mask", "pred_mask"],
            overlay_fields=[("image", ["anomaly_map"]), ("image", ["pred_mask"])],
        )


def _called_from(package: str) -> bool:
    return any(frame.f_globals.get("__name__", "").startswith(package) for frame, _ in walk_stack(None))


def _random_state() -> dict[str, torch.Tensor]:
    """State of torch's generators, which draw patches, noise and the order of images."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _plain(arguments: dict[str, Any], name: str) -> Any:  # noqa: ANN401
    """An argument in a form that compares: sequences as lists, a backbone without the name of its weights."""
    value = arguments.get(name)
    if name == "backbone" and isinstance(value, str):
        return value.partition(".")[0]
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
