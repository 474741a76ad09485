"""A false-alarm rate that holds: thresholds and p-values from the scores of normal images that were not trained on."""

import logging
from fractions import Fraction
from math import ceil, floor
from typing import Any, NamedTuple

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from scipy.special import betaincinv
from torch import nn

from .checks import check_number
from .compat import add_batch_field, set_pixel_threshold

logger = logging.getLogger(__name__)

LARGEST_TABLE = 10_000

add_batch_field("p_value")


class CalibratedBatch(NamedTuple):
    """anomalib's :class:`InferenceBatch` with p-values ``(N,)``."""

    pred_score: torch.Tensor
    pred_label: torch.Tensor | None
    anomaly_map: torch.Tensor
    pred_mask: torch.Tensor | None
    p_value: torch.Tensor


class CalibratedPostProcessor(PostProcessor):
    """anomalib's post-processor, with thresholds for a rate of false alarms (split conformal prediction) and p-values.

    Every validation keeps the scores of its normal images. Where ``false_alarm_rate`` is set, the threshold is the
    ``ceil((n + 1) * (1 - rate))``-th smallest of these n scores, so that another normal image of the same kind is
    labelled defective with at most that probability, whatever the distribution of scores; equal scores lower it. The
    pixel threshold keeps the same rate of normal images with any pixel marked. Otherwise thresholds are anomalib's, but
    without masks, since scores and maps differ in scale, at most as many normal images get any pixel marked as are
    labelled defective. Sensitivities act on top: 0.5 leaves the rate alone, others move the threshold away from it.

    Tables and rate are saved in checkpoints, not in the state dict: a checkpoint loads with any post-processor.
    Arguments are those of anomalib's ``PostProcessor``.

    Attributes:
        false_alarm_rate (float | None): ``false_alarm_rate`` of ``SimpleNet``.
        calibration_scores (torch.Tensor): Raw image scores of normal validation images, ascending; empty if none.
        calibration_peaks (torch.Tensor): Maxima of their raw anomaly maps, ascending.
    """

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(**settings)
        self.false_alarm_rate: float | None = None
        self.calibration_scores = self.calibration_peaks = torch.empty(0)
        self._masks = False
        self._normal: dict[Any, tuple[float, float]] = {}  # score and peak by path: samplers may repeat images

    def checkpoint_config(self) -> dict[str, Any]:
        """Settings of anomalib's post-processor, the rate and the tables."""
        tables = {"calibration_scores": self.calibration_scores, "calibration_peaks": self.calibration_peaks}
        return {**super().checkpoint_config(), "false_alarm_rate": self.false_alarm_rate, **tables}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take settings, rate and tables from a checkpoint."""
        super().load_checkpoint_config(config)
        self.calibration_scores = config.get("calibration_scores", torch.empty(0))
        self.calibration_peaks = config.get("calibration_peaks", torch.empty(0))
        self.false_alarm_rate = config.get("false_alarm_rate")

    def on_validation_start(self, *_args: object) -> None:
        """Forget a validation that was interrupted."""
        self._normal.clear()
        self._masks = False

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Batch, *args, **kwargs
    ) -> None:
        """Note the scores of normal images."""
        super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        self._masks |= outputs.gt_mask is not None
        if outputs.gt_label is None:
            return
        scores, peaks = outputs.pred_score.flatten().tolist(), outputs.anomaly_map.flatten(1).amax(dim=1).tolist()
        for index, defective in enumerate(outputs.gt_label.flatten().tolist()):
            if not defective:
                key = outputs.image_path[index] if outputs.image_path else (trainer.global_rank, len(self._normal))
                self._normal[key] = scores[index], peaks[index]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the tables, of the images of all processes, and say what they are good for."""
        super().on_validation_epoch_end(trainer, pl_module)
        if trainer.world_size > 1:
            parts: list[tuple[dict, bool]] = [({}, False)] * trainer.world_size
            torch.distributed.all_gather_object(parts, (self._normal, self._masks))
            self._normal = {key: value for part, _ in parts for key, value in part.items()}
            self._masks = any(masks for _, masks in parts)
        values = torch.tensor(list(self._normal.values())).reshape(-1, 2)
        self.calibration_scores, self.calibration_peaks = (_table(column) for column in values.T)
        self._normal = {}
        if self.enable_thresholding and self.enable_threshold_matching and not self._masks:
            alarms = int((self.calibration_scores > super().image_threshold.cpu()).sum())
            peaks = self.calibration_peaks
            set_pixel_threshold(self, peaks[-1 - min(alarms, len(peaks) - 1)] if len(peaks) else float("nan"))
        if self.false_alarm_rate is None or not trainer.is_global_zero:
            return
        table = self.calibration_scores
        if len(table) > 1 and table[0] == table[-1]:
            logger.warning("All %d normal validation images score %g: check them, or train anew.", len(table), table[0])
        try:
            rank_zero_info(guarantee(self.false_alarm_rate, len(table)))
        except ValueError as error:  # the checkpoint is not saved yet: testing and predicting will refuse
            logger.error(error)  # noqa: TRY400

    def forward(self, predictions: InferenceBatch) -> InferenceBatch | CalibratedBatch:
        """Normalise and label predictions, and add p-values where there is a table."""
        self.check_rate()
        processed, p_value = super().forward(predictions), self.p_value(predictions.pred_score)
        return processed if p_value is None else CalibratedBatch(**processed._asdict(), p_value=p_value)

    def post_process_batch(self, batch: Batch) -> None:
        """Do to a batch what :meth:`forward` does to predictions."""
        predictions = InferenceBatch(pred_score=batch.pred_score, anomaly_map=batch.anomaly_map)
        batch.update(**self(predictions)._asdict())

    def check_rate(self, count: int | None = None) -> None:
        """Refuse a rate that cannot be kept.

        Args:
            count (int | None): Number of normal validation images; ``None`` for that of the tables.

        Raises:
            ValueError: If there are too few, or scores are not normalised: thresholds then are not used.
        """
        if self.false_alarm_rate is None:
            return
        if not self.enable_normalization:
            msg = f"false_alarm_rate is {self.false_alarm_rate}, but enable_normalization is false: set it to true."
            raise ValueError(msg)
        allowed_alarms(self.false_alarm_rate, len(self.calibration_scores) if count is None else count)

    def p_value(self, raw_scores: torch.Tensor) -> torch.Tensor | None:
        """Share of normal images that look at least as anomalous, counting the image itself.

        Args:
            raw_scores (torch.Tensor): Scores before normalisation, ``(N,)``.

        Returns:
            torch.Tensor | None: ``(1 + number of calibration scores >= score) / (n + 1)``, ``(N,)``; the least for NaN.
            ``None`` without calibration scores.
        """
        table = self.calibration_scores.to(raw_scores.device)
        if not len(table):
            return None
        return (1 + (table >= raw_scores[:, None]).float().sum(dim=1)) / (len(table) + 1)

    @property
    def image_threshold(self) -> torch.Tensor:
        """Raw threshold of image scores; refuses a rate that the table is too small for."""
        rate = self.false_alarm_rate
        return super().image_threshold if rate is None else self._conformal(self.calibration_scores, rate)

    @property
    def pixel_threshold(self) -> torch.Tensor:
        """Raw threshold of anomaly maps; refuses a rate that the table is too small for."""
        rate = self.false_alarm_rate
        return super().pixel_threshold if rate is None else self._conformal(self.calibration_peaks, rate)

    def _conformal(self, table: torch.Tensor, rate: float) -> torch.Tensor:
        return table[-allowed_alarms(rate, len(table))].to(self.image_min.device)


def calibrated(processor: nn.Module | None, rate: float | None) -> nn.Module | None:
    """Give a model's post-processor a rate of false alarms; anomalib's own is replaced by one that can keep it.

    Raises:
        ValueError: If the rate is not between 0 and 1, or the post-processor is another one.
    """
    if processor is not None and type(processor) is PostProcessor:
        processor = CalibratedPostProcessor(**processor.checkpoint_config())
    if rate is None:
        return processor
    check_number("false_alarm_rate", rate, above=0, below=1)
    if not isinstance(processor, CalibratedPostProcessor):
        name = type(processor).__name__ if processor else None
        msg = f"false_alarm_rate is {rate}, but post_processor is {name}, expected anomalib's PostProcessor."
        raise ValueError(msg)  # noqa: TRY004
    processor.false_alarm_rate = float(rate)
    return processor


def needed_images(rate: float) -> int:
    """Number of normal images that a rate of false alarms needs: ``1 / rate - 1``."""
    return ceil(1 / Fraction(str(rate)) - 1)


def allowed_alarms(rate: float, count: int) -> int:
    """Number among calibration images and one more that may lie above the threshold.

    Args:
        rate (float): Rate of false alarms.
        count (int): Number of calibration images.

    Returns:
        int: ``floor((count + 1) * rate)``, exact for decimal rates.

    Raises:
        ValueError: If it is 0.
    """
    if count < needed_images(rate):
        msg = (
            f"false_alarm_rate is {rate}, which needs {needed_images(rate)} normal validation images, and there are "
            f"{count or 'none'}: train with more of them, or with a higher rate."
        )
        raise ValueError(msg)
    return floor((count + 1) * Fraction(str(rate)))


def guarantee(rate: float, count: int) -> str:
    """Say what a rate means that was calibrated on a number of normal images.

    Given the calibration images, the rate in the long run has a beta distribution.

    Raises:
        ValueError: If there are too few.

    Example:
        >>> guarantee(0.01, 100)
        '100 normal images: at most 1 % false alarms expected; 95 % sure of at most 3 %.'
    """
    alarms = allowed_alarms(rate, count)
    bound = betaincinv(alarms, count + 1 - alarms, 0.95)
    expected = f"{count} normal images: at most {100 * rate:.3g} % false alarms expected"
    return f"{expected}; 95 % sure of at most {100 * bound:.2g} %."


def _table(scores: torch.Tensor) -> torch.Tensor:
    """Sort scores, and thin out more than 10,000 from the highest down: p-values and thresholds grow, if anything."""
    step = ceil(len(scores) / LARGEST_TABLE)
    if step < 2:
        return scores.sort().values
    logger.info("Of the %d calibration scores, one in %d is kept.", len(scores), step)
    highest = scores.sort(descending=True).values
    return highest[: len(scores) // step * step : step].flip(0)
