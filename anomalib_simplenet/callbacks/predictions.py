"""``predictions.csv``: a row for each image that a model scored."""

from __future__ import annotations

import csv
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DistributedSampler

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO

    from anomalib.data import ImageBatch
    from anomalib.models.components import AnomalibModule
    from lightning.pytorch import LightningModule, Trainer

logger = logging.getLogger(__name__)

COLUMNS = (
    "image_path",
    "pred_score",
    "pred_label",
    "gt_label",
    "image_threshold",
    "pixel_threshold",
    "model",
    "checkpoint",
)


class Predictions(BasePredictionWriter):
    """Writes ``predictions.csv`` while a model is tested or predicts.

    The table goes to the trainer's ``default_root_dir``; if one is there, to ``predictions-1.csv`` and so on. Each
    image has a row with the columns :data:`COLUMNS`: ``gt_label`` is empty when predicting, the thresholds are on the
    scale of the scores, and ``checkpoint`` is empty where the weights were in memory. Rows are written batch by batch.

    With several processes each writes a part, in the folder of the first, which all must reach; at the end the first
    merges the parts in the order of the data set. Images that Lightning repeats in a test, so that each process gets
    as many, stand in the table once.

    Attributes:
        table (Path): The table of the current or last run.
    """

    table: Path

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._started = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run."""
        super().setup(trainer, pl_module, stage)
        self._started = False

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the table."""
        del pl_module
        self._start(trainer, trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the table."""
        del pl_module
        self._start(trainer, trainer.predict_dataloaders)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: AnomalibModule,
        outputs: ImageBatch,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch's rows."""
        del batch, batch_idx
        self._write(trainer, pl_module, outputs, None, dataloader_idx)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: AnomalibModule,
        prediction: ImageBatch,
        batch_indices: Sequence[int] | None,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch's rows; Lightning calls this when predicting."""
        del batch, batch_idx
        self._write(trainer, pl_module, prediction, batch_indices, dataloader_idx)
        trainer.predict_loop.current_batch_indices = []  # else they stay for a data loader whose indices are unknown

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the table."""
        del pl_module
        self._close(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the table."""
        del pl_module
        self._close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Explain the bare assertion of Lightning's sampler for prediction: each process needs an image."""
        del pl_module
        before_start = trainer.predicting and not self._started
        if before_start and trainer.world_size > 1 and isinstance(exception, AssertionError) and not exception.args:
            exception.args = (
                f"A data loader has fewer images than the {trainer.world_size} processes: predict with one device.",
            )

    def _start(self, trainer: Trainer, loaders: Any) -> None:  # noqa: ANN401
        self._started = True
        claimed = _claim(Path(trainer.default_root_dir)) if trainer.is_global_zero else None
        self.table = trainer.strategy.broadcast(claimed)
        if trainer.world_size > 1:
            self._file = _open(_part(self.table, trainer.global_rank), "w")
        else:
            self._file = _open(self.table, "a")
        self._writer = csv.writer(self._file)
        self._rows_of_loader: Counter[int] = Counter()
        self._sizes = [_size(loader) for loader in CombinedLoader(loaders).flattened]

    def _write(
        self,
        trainer: Trainer,
        model: AnomalibModule,
        batch: ImageBatch,
        indices: Sequence[int] | None,
        dataloader_idx: int,
    ) -> None:
        scores = batch.pred_score.flatten().tolist()
        unknown = [None] * len(scores)
        labels = unknown if batch.pred_label is None else batch.pred_label.int().flatten().tolist()
        truth = unknown if batch.gt_label is None else batch.gt_label.int().flatten().tolist()
        paths = batch.image_path or [""] * len(scores)
        same = [threshold(model, "image"), threshold(model, "pixel"), model.name, trainer.ckpt_path]
        rows = [[*row, *same] for row in zip(paths, scores, labels, truth, strict=True)]
        if trainer.world_size > 1:
            start = self._rows_of_loader[dataloader_idx]
            self._rows_of_loader[dataloader_idx] = stop = start + len(rows)
            if not indices:  # distributed samplers assign images to the ranks in turn, and then the first ones again
                ranks, size = trainer.world_size, self._sizes[dataloader_idx]
                indices = range(start * ranks + trainer.global_rank, min(stop * ranks, size), ranks)
            rows = [[dataloader_idx, index, *row] for index, row in zip(indices, rows, strict=False)]
        self._writer.writerows(rows)
        self._file.flush()

    def _close(self, trainer: Trainer) -> None:
        self._file.close()
        if trainer.world_size > 1:
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                _merge(self.table, [_part(self.table, rank) for rank in range(trainer.world_size)])
        if trainer.is_global_zero:
            logger.info("Predictions: %s", self.table)


def threshold(model: AnomalibModule, kind: str) -> float | None:
    """Threshold of a model's normalised scores, ``1 - sensitivity``: what lies above is labelled defective.

    Args:
        model (AnomalibModule): The model.
        kind (str): ``"image"`` or ``"pixel"``.

    Returns:
        float | None: The threshold, ``None`` where the model has no labels.
    """
    processor = model.post_processor
    if processor is None or not getattr(processor, "enable_thresholding", False):
        return None
    return getattr(processor, f"normalized_{kind}_threshold").item()


def _claim(folder: Path) -> Path:
    """Create a table that no other run has, with its header."""
    folder.mkdir(parents=True, exist_ok=True)
    table, number = folder / "predictions.csv", 0
    while True:
        try:
            with _open(table, "x") as file:
                csv.writer(file).writerow(COLUMNS)
        except FileExistsError:
            number += 1
            table = folder / f"predictions-{number}.csv"
        else:
            return table


def _size(loader: Any) -> int:  # noqa: ANN401
    """Images that the ranks share, as far as known; Lightning's sampler repeats images beyond."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return len(sampler.dataset) if isinstance(sampler, DistributedSampler) else sys.maxsize


def _open(path: Path, mode: str) -> IO[str]:
    # Names of images need not be UTF-8: their bytes are written as they are.
    return path.open(mode, newline="", encoding="utf-8", errors="surrogateescape")


def _part(table: Path, rank: int) -> Path:
    return table.with_name(f"{table.name}.part{rank}")


def _merge(table: Path, parts: Sequence[Path]) -> None:
    rows: dict[tuple[int, int], list[str]] = {}
    for part in parts:
        with _open(part, "r") as file:
            for dataloader_idx, index, *row in csv.reader(file):
                rows.setdefault((int(dataloader_idx), int(index)), row)
    with _open(table, "a") as file:
        csv.writer(file).writerows(rows[key] for key in sorted(rows))
    for part in parts:
        part.unlink()
