"""``report.html``: what a test or prediction found, on one page."""

import base64
import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from anomalib.data import ImageBatch, InferenceBatch
from jinja2 import Template
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from PIL import Image

from anomalib_simplenet.visualizer import picture_path

from . import charts, drift
from .predictions import Predictions, report_of, threshold

logger = logging.getLogger(__name__)

FALSE_ALARMS = (1, 10, 50, 100)  # of a thousand normal images
PICTURES = 12  # in each gallery
PACKAGES = ("anomalib-simplenet", "anomalib", "torch")
TEMPLATE = Template(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"), autoescape=True)


class Scored(NamedTuple):
    """What the page needs of a row of ``predictions.csv``."""

    path: Path
    score: float
    p_value: str  # empty without a calibration
    defective: bool


class Report(Callback):
    """Writes ``report.html`` from the table of :class:`Predictions`, which must be called before it.

    The page stands beside the table, under the same number. After a test it shows metrics, thresholds, scores, curves
    and the images decided worst and closest; after a prediction, scores beside the calibration's and the most anomalous
    images. Several processes write no page.
    """

    def on_test_start(self, *_args: object) -> None:
        """Forget the last test's masks."""
        self._defective_pixels = False

    def on_test_batch_end(self, _trainer: Trainer, _pl_module: LightningModule, outputs: ImageBatch, *_args) -> None:
        """Look for defective pixels in a batch's masks: without any, metrics of pixels mean nothing."""
        self._defective_pixels |= outputs.gt_mask is not None and bool(outputs.gt_mask.any())

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        _write(trainer, pl_module, partial(_tested, defective_pixels=self._defective_pixels))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        _write(trainer, pl_module, _predicted)


def _write(trainer: Trainer, model: LightningModule, results: Callable[..., dict[str, Any]]) -> None:
    if trainer.world_size > 1:
        if trainer.is_global_zero:
            logger.info("No report is written by %d processes: use one device for one.", trainer.world_size)
        return
    (table,) = (each.table for each in trainer.callbacks if isinstance(each, Predictions))
    with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        images = [
            Scored(Path(row["image_path"]), float(row["pred_score"]), row["p_value"], row["gt_label"] == "1")
            for row in csv.DictReader(file)
        ]
    data, region = getattr(trainer, "datamodule", None), getattr(model.model, "region", None)
    date = datetime.now().astimezone().isoformat(" ", "seconds")
    provenance = {
        "Model": model.name,
        "Data set": getattr(data, "name", None),
        "Category": getattr(data, "category", None),
        "Region": region and f"{region.mask.mean().item():.1%} of the pixels count; the others are dimmed",
        "Date": date,
        "Checkpoint": trainer.ckpt_path or "none: the weights in memory",
        "Versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
    }
    page = report_of(table)
    text = TEMPLATE.render(
        title=", ".join(str(part) for part in (model.name, provenance["Data set"], date, trainer.ckpt_path) if part),
        limit=threshold(model, "image"),
        provenance=provenance,
        settings=dict(model.hparams),
        **results(trainer, model, table.parent, images),
    )
    page.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of images need not be UTF-8
    logger.info("Report: %s", page)


def _tested(
    trainer: Trainer, model: LightningModule, folder: Path, images: list[Scored], defective_pixels: bool
) -> dict[str, Any]:
    normal = np.array([image.score for image in images if not image.defective])
    defective = np.array([image.score for image in images if image.defective])
    two_classes = len(normal) > 0 and len(defective) > 0
    limit = threshold(model, "image")
    figures = [charts.histogram({"normal": normal, "defective": defective}, limit)]
    if two_classes:
        figures += charts.curves(normal, defective, limit)
    galleries = {}
    if limit is not None:  # validation chooses the score of an image as threshold, and anomalib labels what lies above
        misses = [image for image in images if image.defective and image.score < limit]
        alarms = [image for image in images if not image.defective and image.score > limit]
        galleries = {
            "Worst misses": sorted(misses, key=lambda image: image.score),
            "Worst false alarms": sorted(alarms, key=lambda image: -image.score),
            "Closest to the threshold": sorted(images, key=lambda image: abs(image.score - limit)),
        }
    return {
        "normal": normal.tolist(),
        "defective": defective.tolist(),
        "pixel_limit": threshold(model, "pixel") if defective_pixels else None,
        "metrics": {
            name: float(value) if two_classes or name.startswith("pixel_") else None
            for name, value in trainer.callback_metrics.items()
            if name.startswith("image_") or (name.startswith("pixel_") and defective_pixels)
        },
        "choices": _choices(normal, defective) if two_classes else [],
        "charts": figures,
        "galleries": _with_pictures(trainer, model, folder, images, galleries),
    }


def _predicted(trainer: Trainer, model: LightningModule, folder: Path, images: list[Scored]) -> dict[str, Any]:
    scores = np.array([image.score for image in images])
    oddest = {"Most anomalous": sorted(images, key=lambda image: -image.score)}
    found = {"scores": scores.tolist(), "galleries": _with_pictures(trainer, model, folder, images, oddest)}
    processor, p_values = model.post_processor, [image.p_value for image in images]
    if all(p_values):
        calibration = processor.calibration_scores.to(model.device)
        reference = processor(InferenceBatch(pred_score=calibration)).pred_score.cpu().numpy()
        predicted = np.array(p_values, dtype=np.float32)
        groups = {"calibration": reference, "predicted": scores}
        histogram = charts.histogram(groups, threshold(model, "image"), percent=True)
        found["charts"] = [histogram, charts.sequence(predicted)]
        found["verdict"] = drift.compare(predicted, processor.p_value(calibration).cpu().numpy())
    return found


def _choices(normal: NDArray, defective: NDArray) -> list[dict[str, Any]]:
    """The lowest threshold for each share of false alarms, and the false alarms and defects found that it leaves."""
    limits = charts.candidates(np.concatenate([normal, defective]))
    alarms, found = charts.above(normal, limits), charts.above(defective, limits)
    places = [(share, int(np.argmax(1000 * alarms <= share * len(normal)))) for share in FALSE_ALARMS]
    return [
        {"percent": share / 10, "threshold": limits[place], "alarms": alarms[place], "found": found[place]}
        for share, place in places
    ]


def _with_pictures(
    trainer: Trainer, model: LightningModule, folder: Path, images: list[Scored], galleries: dict[str, list[Scored]]
) -> dict[str, list[dict[str, Any]]]:
    """The first images of each gallery that have a path; a data set of one's own may have none.

    With the picture that the visualizer saved, or, where another overwrote it, the image itself.
    """
    paths = [image.path for image in images if image.path.name and model.visualizer]
    saved = {path: picture_path(trainer, model.visualizer, path, mkdir=False) for path in paths}
    times = Counter(saved.values())
    pictures = {path: picture for path, picture in saved.items() if times[picture] == 1 and picture.is_file()}
    return {
        title: [
            {"image": image, **_link(pictures.get(image.path, image.path), folder)}
            for image in [image for image in chosen if image.path.name][:PICTURES]
        ]
        for title, chosen in galleries.items()
    }


def _link(shown: Path, folder: Path) -> dict[str, str]:
    """A small copy of a picture, empty if it cannot be read, and a link to it from a page in a folder."""
    buffer = io.BytesIO()
    with suppress(OSError), Image.open(shown) as image:
        image.thumbnail((1120, 224))
        image.convert("RGB").save(buffer, "JPEG", quality=85)
    thumbnail = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    link = quote(os.fsencode(Path(os.path.relpath(shown, folder)).as_posix()))
    return {"link": link, "thumbnail": thumbnail}
