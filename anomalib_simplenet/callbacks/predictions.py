"""``predictions.csv``: a row for each image that a model scored."""

import csv
import logging
from contextlib import suppress
from itertools import count
from pathlib import Path

from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer

logger = logging.getLogger(__name__)

COLUMNS = (
    "image_path",
    "pred_score",
    "p_value",
    "pred_label",
    "gt_label",
    "image_threshold",
    "pixel_threshold",
    "model",
    "checkpoint",
)


class Predictions(Callback):
    """Writes ``predictions.csv`` while a model is tested or predicts.

    The table goes to the trainer's ``default_root_dir``; if one is there, to ``predictions-1.csv`` and so on. Each
    image has a row with the columns :data:`COLUMNS`: ``p_value`` is empty where validation had no normal images,
    ``gt_label`` when predicting, and ``checkpoint`` where the weights were in memory; the thresholds are on the scale
    of the scores. Rows are written batch by batch.

    With several processes each writes the images that Lightning assigns to it, some of them twice in a test, to a table
    of its own: ``predictions-rank0.csv``, ``predictions-rank1.csv``, ... Test and predict on one device for one table.

    Attributes:
        table (Path): The table of the current or last run.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create a table that no other run has."""
        if threshold(pl_module, "image") is not None and pl_module.post_processor.image_threshold.isnan():
            logger.warning("Labels mean nothing: these weights have no thresholds, since they were never validated.")
        folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))  # ranks may have numbered theirs otherwise
        folder.mkdir(parents=True, exist_ok=True)
        name = "predictions" if trainer.world_size == 1 else f"predictions-rank{trainer.global_rank}"
        for number in count():
            self.table = folder / (f"{name}-{number}.csv" if number else f"{name}.csv")
            if report_of(self.table).exists():
                continue  # its table was moved
            with suppress(FileExistsError):
                # Names of images need not be UTF-8: their bytes are written as they are.
                self._file = self.table.open("x", newline="", encoding="utf-8", errors="surrogateescape")
                break
        self._writer = csv.writer(self._file)
        self._writer.writerow(COLUMNS)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: ImageBatch, *_args) -> None:
        """Write a batch's rows."""
        scores = outputs.pred_score.flatten().tolist()
        unknown = [None] * len(scores)
        labels = unknown if outputs.pred_label is None else outputs.pred_label.int().flatten().tolist()
        p_value = getattr(outputs, "p_value", None)
        p_values = unknown if p_value is None else p_value.tolist()
        truth = unknown if outputs.gt_label is None else outputs.gt_label.int().flatten().tolist()
        same = [threshold(pl_module, "image"), threshold(pl_module, "pixel"), pl_module.name, trainer.ckpt_path]
        rows = zip(outputs.image_path or unknown, scores, p_values, labels, truth, strict=True)
        self._writer.writerows([*row, *same] for row in rows)
        self._file.flush()

    def on_test_end(self, *_args: object) -> None:
        """Close the table."""
        self._file.close()
        logger.info("Predictions: %s", self.table)

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, _pl_module: LightningModule, exception: BaseException) -> None:
        """Explain the bare assertion of Lightning's sampler for prediction: each process needs an image."""
        if trainer.predicting and trainer.world_size > 1 and type(exception) is AssertionError and not exception.args:
            exception.args = (f"Fewer images than the {trainer.world_size} processes? Then predict with one device.",)


def report_of(table: Path) -> Path:
    """Where the report of a table stands."""
    return table.with_name(table.name.replace("predictions", "report")).with_suffix(".html")


def threshold(model: LightningModule, kind: str) -> float | None:
    """Threshold of a model's normalised scores, ``1 - sensitivity``: what lies above is labelled defective.

    Args:
        model (AnomalibModule): The model.
        kind (str): ``"image"`` or ``"pixel"``.

    Returns:
        float | None: The threshold, ``None`` where the model has no labels.
    """
    if not getattr(model.post_processor, "enable_thresholding", False):
        return None
    return getattr(model.post_processor, f"normalized_{kind}_threshold").item()
