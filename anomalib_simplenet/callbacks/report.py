"""``report.html``: what a test found, on one page."""

from __future__ import annotations

import base64
import csv
import io
import logging
import os
from collections import Counter
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import torch
from anomalib.utils.path import generate_output_filename
from jinja2 import Template
from lightning.pytorch.callbacks import Callback
from PIL import Image

from . import charts
from .predictions import Predictions, threshold

if TYPE_CHECKING:
    from anomalib.data import ImageBatch
    from anomalib.models.components import AnomalibModule
    from lightning.pytorch import Trainer

logger = logging.getLogger(__name__)

BINS = 1000  # of pixel scores
FALSE_ALARMS = (1, 10, 50, 100)  # of a thousand normal images
PICTURES = 12  # in each gallery
PACKAGES = ("anomalib-simplenet", "anomalib", "torch")
TEMPLATE = Template(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"), autoescape=True)


class Images(NamedTuple):
    """The columns of ``predictions.csv`` that the page needs; tensors of shape ``(N,)``."""

    paths: list[str]
    scores: torch.Tensor
    defective: torch.Tensor
    labelled_defective: torch.Tensor


class Report(Callback):
    """Writes ``report.html`` after a test, from the table of :class:`Predictions`, which must be called before it.

    The page stands beside the table, under the same number. It shows metrics and thresholds, thresholds for given
    shares of false alarms, the distribution of scores, ROC and precision-recall curves (of pixels only where scores
    are normalised), the images decided worst and closest, and what was tested: checkpoint, settings, data, versions.
    """

    def on_test_start(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Begin to count pixels."""
        del trainer
        self._pixels = torch.zeros(2, BINS, dtype=torch.int64, device=pl_module.device)  # normal, defective; by score

    def on_test_batch_end(self, trainer: Trainer, pl_module: AnomalibModule, outputs: ImageBatch, *_args) -> None:
        """Count a batch's pixels."""
        del trainer, pl_module
        if outputs.gt_mask is not None and outputs.anomaly_map is not None:
            bins = (outputs.anomaly_map.flatten() * BINS).long().clamp(0, BINS - 1)
            bins += outputs.gt_mask.flatten().bool() * BINS
            self._pixels += bins.bincount(minlength=2 * BINS).view(2, BINS)

    def on_test_end(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Write the page."""
        metrics = trainer.callback_metrics  # every process must read them: those without an update synchronise here
        pixels = trainer.strategy.reduce(self._pixels, reduce_op="sum").cpu()
        if trainer.is_global_zero:
            (table,) = (each.table for each in trainer.callbacks if isinstance(each, Predictions))
            page = table.with_name(table.name.replace("predictions", "report")).with_suffix(".html")
            values = {name: float(value) for name, value in metrics.items() if name.startswith(("image_", "pixel_"))}
            text = _page(trainer, pl_module, table, values, pixels)
            page.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of images need not be UTF-8
            logger.info("Report: %s", page)


def _page(trainer: Trainer, model: AnomalibModule, table: Path, metrics: dict[str, float], pixels: torch.Tensor) -> str:
    images = _read(table)
    limit = threshold(model, "image")
    two_classes = {"image": images.defective.unique().numel() == 2, "pixel": bool(pixels.any(dim=1).all())}

    results = [("Images", f"{len(images.paths)}, {int(images.defective.sum())} of them defective")]
    if limit is not None:
        results += _decisions(images, limit)
        results += _thresholds(model)
    results += [
        (name, f"{value:.4f}" if two_classes[name[:5]] else "none (one class only)")
        for name, value in metrics.items()
        if name.startswith("image_") or pixels.any()
    ]

    figures = [charts.histogram(images.scores, images.defective, limit)]
    choices = []
    if two_classes["image"]:
        counts, candidates = _image_counts(images)
        present = None if limit is None else (limit, int((images.scores.unique() <= limit).sum()))
        figures += charts.curves("images", counts, candidates, present)
        choices = _choices(counts, candidates)
    if two_classes["pixel"] and getattr(model.post_processor, "enable_normalization", False):
        limit_of_pixels = threshold(model, "pixel")
        present = None if limit_of_pixels is None else (limit_of_pixels, round(limit_of_pixels * BINS))
        figures += charts.curves("pixels", _above(pixels), torch.linspace(0, 1, BINS + 1), present)

    data = getattr(trainer, "datamodule", None)
    provenance = {
        "Checkpoint": trainer.ckpt_path or "none: the weights in memory",
        "Model": model.name,
        "Data set": getattr(data, "name", None),
        "Category": getattr(data, "category", None),
        "Date": datetime.now().astimezone().isoformat(" ", "seconds"),
        "Versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
    }
    return TEMPLATE.render(
        title=f"{model.name}: {getattr(data, 'name', None) or 'test'}",
        results=results,
        choices=choices,
        charts=charts.to_html(figures),
        galleries=_galleries(trainer, model, table.parent, images, limit),
        provenance={name: value for name, value in provenance.items() if value},
        settings=dict(model.hparams),
    )


def _read(table: Path) -> Images:
    paths, scores, truth, labels = [], [], [], []
    with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        for row in csv.DictReader(file):
            paths.append(row["image_path"])
            scores.append(float(row["pred_score"]))
            truth.append(row["gt_label"] == "1")
            labels.append(row["pred_label"] == "1")
    return Images(paths, torch.tensor(scores, dtype=torch.double), torch.tensor(truth), torch.tensor(labels))


def _decisions(images: Images, limit: float) -> list[tuple[str, str]]:
    defective, labelled = images.defective, images.labelled_defective
    misses, alarms = defective & ~labelled, ~defective & labelled
    at_limit = int((misses & (images.scores == limit)).sum())
    # Validation chooses the score of an image as threshold, and anomalib labels only what lies above.
    note = f", {at_limit} of them exactly at the threshold" if at_limit else ""
    return [
        ("Misses", f"{int(misses.sum())} of {int(defective.sum())} defective{note}"),
        ("False alarms", f"{int(alarms.sum())} of {int((~defective).sum())} normal"),
    ]


def _thresholds(model: AnomalibModule) -> list[tuple[str, str]]:
    """The thresholds, also on the scale of raw scores; of pixels only if masks chose one, else it is that of images."""
    processor = model.post_processor
    texts = []
    for kind, chosen in (("image", processor.image_threshold), ("pixel", processor.pixel_threshold)):
        limit = getattr(processor, f"normalized_{kind}_threshold")
        text = f"{limit.item():.3f}"
        if processor.enable_normalization:
            spread = getattr(processor, f"{kind}_max") - getattr(processor, f"{kind}_min")
            text += f" (raw score {(chosen + (limit - 0.5) * spread).item():.4f})"
        if kind == "image" or not torch.equal(chosen, processor.image_threshold):
            texts.append((f"{kind.capitalize()} threshold", text))
    return texts


def _image_counts(images: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal and defective images above each possible threshold, ``(2, K)``, and these thresholds, ``(K,)``.

    Thresholds are halfway between neighbouring scores, one below all, and the highest score.
    """
    scores, rank = images.scores.unique(return_inverse=True)
    lower = torch.cat([scores[:1] - 1, scores[:-1]])
    counts = torch.stack([rank[images.defective == label].bincount(minlength=len(scores)) for label in (False, True)])
    return _above(counts), torch.cat([(lower + scores) / 2, scores[-1:]])


def _above(counts: torch.Tensor) -> torch.Tensor:
    """Counts of each place and all after it, and a last 0: ``(2, K)`` to ``(2, K + 1)``."""
    return torch.nn.functional.pad(counts.flip(1).cumsum(1).flip(1), (0, 1))


def _choices(above: torch.Tensor, candidates: torch.Tensor) -> list[dict[str, str]]:
    """The lowest threshold for each share of false alarms, and the recall that it leaves."""
    normal, defective = above[:, 0].tolist()
    choices = []
    for allowed in FALSE_ALARMS:
        place = int((1000 * above[0] > allowed * normal).sum())
        alarms, found = above[:, place].tolist()
        choices.append(
            {
                "allowed": f"{allowed / 10:g} %",
                "threshold": f"{candidates[place].item():.6g}",
                "alarms": f"{alarms} of {normal}",
                "recall": f"{found / defective:.3f} ({found} of {defective})",
            }
        )
    return choices


def _galleries(
    trainer: Trainer, model: AnomalibModule, folder: Path, images: Images, limit: float | None
) -> list[tuple[str, list[dict[str, str]]]]:
    if limit is None:
        return []
    saved = [_saved_picture(trainer, model, Path(path), folder) if path else None for path in images.paths]
    times = Counter(saved)
    scores, defective, labelled = images.scores, images.defective, images.labelled_defective
    has_path = torch.tensor([bool(path) for path in images.paths])
    galleries = []
    for title, chosen, order in (
        ("Worst misses", defective & ~labelled & (scores < limit), scores),
        ("Worst false alarms", ~defective & labelled, -scores),
        ("Closest to the threshold", torch.ones_like(labelled), (scores - limit).abs()),
    ):
        places = (chosen & has_path).nonzero().flatten()
        pictures = []
        for place in places[order[places].argsort(stable=True)][:PICTURES].tolist():
            path, picture = Path(images.paths[place]), saved[place]
            if picture is None or times[picture] > 1:  # images of one name in folders of one name: one was overwritten
                shown, name = path, str(path)
            else:
                shown, name = picture if picture.is_file() else path, f"{path.parent.name}/{path.name}"
            label, truth = ("defective" if each[place] else "normal" for each in (labelled, defective))
            caption = f"score {scores[place]:.3f}, labelled {label}, is {truth}"
            pictures.append({"name": name, "caption": caption, **_link(shown, folder)})
        galleries.append((title, pictures))
    return galleries


def _saved_picture(trainer: Trainer, model: AnomalibModule, path: Path, folder: Path) -> Path:
    """Where the visualizer saves an image's picture; the image itself where there is none."""
    if model.visualizer is None:
        return path
    data = getattr(trainer, "datamodule", None)
    names = {"dataset_name": getattr(data, "name", None), "category": getattr(data, "category", None)}
    return generate_output_filename(path, model.visualizer.output_dir or folder / "images", **names, mkdir=False)


def _link(shown: Path, folder: Path) -> dict[str, str]:
    """A small copy of a picture, empty if it cannot be read, and a link to it from a page in a folder."""
    buffer = io.BytesIO()
    with suppress(OSError), Image.open(shown) as image:
        image.thumbnail((1120, 224))
        image.convert("RGB").save(buffer, "JPEG", quality=85)
    thumbnail = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    link = quote(os.fsencode(Path(os.path.relpath(shown, folder)).as_posix()))
    return {"link": link, "thumbnail": thumbnail}
