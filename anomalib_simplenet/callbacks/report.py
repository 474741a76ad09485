"""What a run found, to look at: every score in a table, and a page about the test."""

from __future__ import annotations

import base64
import csv
import io
import logging
import os
from collections import Counter
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from anomalib.utils.path import generate_output_filename
from jinja2 import Template
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torchmetrics.functional.classification import binary_precision_recall_curve, binary_roc

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from anomalib.data import ImageBatch
    from lightning.pytorch import Trainer

    from anomalib_simplenet.lightning_model import SimpleNet

logger = logging.getLogger(__name__)

COLUMNS = ("image_path", "pred_score", "pred_label", "gt_label", "image_threshold", "pixel_threshold")
BINS = 1000  # of pixel scores
POINTS = 500  # of a curve
GALLERY = 12  # pictures each
TEMPLATE = Template(
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>SimpleNet: {{ name }}</title>
<style>
body { font: 15px sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em 1em .2em 0; text-align: left }
.plots { display: flex; flex-wrap: wrap } .plots > div { width: 590px; height: 420px }
figure { display: inline-block; margin: 0 1em 1em 0 } figcaption { font-size: 13px } img { max-width: 560px }
</style></head><body>
<h1>SimpleNet: {{ name }}</h1>
<table>{% for label, value in figures %}<tr><th>{{ label }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
<div class="plots">{% for plot in plots %}<div>{{ plot|safe }}</div>{% endfor %}</div>
{% for title, pictures in galleries %}<h2>{{ title }}</h2>
{% if not pictures %}<p>None.</p>{% endif %}
{% for picture in pictures %}<figure><a href="{{ picture.link }}"><img src="{{ picture.thumbnail }}" alt="{{
picture.name }}"></a><figcaption>{{ picture.name }}: {{ "%.3f"|format(picture.score) }}</figcaption></figure>
{% endfor %}{% endfor %}</body></html>
""",
    autoescape=True,
)


class Report(Callback):
    """Writes ``predictions.csv`` while testing and predicting, and ``report.html`` after a test.

    Both go to the trainer's ``default_root_dir``, under a name with a number where one is there already. The table has
    a line for each image: its path, score, label, true label (of a test), and the thresholds that made the label and
    the mask, on the scale of the scores. It grows as images are scored; several processes each write a part, which
    become one file in the order of the images. The page shows the figures with thresholds, how scores are spread, ROC
    and precision-recall curves (those of pixels where scores are normalised), and the pictures of the worst and the
    closest decisions.
    """

    def on_test_start(self, trainer: Trainer, pl_module: SimpleNet) -> None:
        """Open the table."""
        self._open(trainer)
        self._pixels = torch.zeros(2, BINS, device=pl_module.device)  # scores of normal and of defective pixels

    def on_predict_start(self, trainer: Trainer, pl_module: SimpleNet) -> None:
        """Open the table."""
        del pl_module
        self._open(trainer)

    def on_test_batch_end(self, trainer: Trainer, pl_module: SimpleNet, outputs: ImageBatch, *_args, **_kwargs) -> None:
        """Write a batch's scores, and count those of its pixels."""
        self._write(pl_module, outputs)
        normalised = getattr(pl_module.post_processor, "enable_normalization", False)
        if normalised and outputs.gt_mask is not None and outputs.anomaly_map is not None:
            maps, masks = outputs.anomaly_map.flatten(), outputs.gt_mask.flatten().bool()
            for label, scores in enumerate((maps[~masks], maps[masks])):
                self._pixels[label] += torch.histc(scores.float(), BINS, 0, 1)
        del trainer

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: SimpleNet, outputs: ImageBatch, *_args, **_kwargs
    ) -> None:
        """Write a batch's scores."""
        del trainer
        self._write(pl_module, outputs)

    def on_test_end(self, trainer: Trainer, pl_module: SimpleNet) -> None:
        """Finish the table, and write the page."""
        self._close(trainer, trainer.test_dataloaders)
        pixels = trainer.strategy.reduce(self._pixels, reduce_op="sum").cpu()
        if trainer.is_global_zero:
            page = self._table.with_name(self._table.name.replace("predictions", "report")).with_suffix(".html")
            text = _page(trainer, pl_module, self._table, pixels)
            page.write_text(text, encoding="utf-8", errors="backslashreplace")
            logger.info("Report: %s", page)

    def on_predict_end(self, trainer: Trainer, pl_module: SimpleNet) -> None:
        """Finish the table."""
        del pl_module
        self._close(trainer, trainer.predict_dataloaders)

    def _open(self, trainer: Trainer) -> None:
        folder = Path(trainer.default_root_dir)
        taken = trainer.strategy.broadcast([path.name for path in folder.glob("predictions*")])
        number = 0
        while any(name.startswith(f"{_stem(number)}.") for name in taken):
            number += 1
        self._table = folder / f"{_stem(number)}.csv"
        folder.mkdir(parents=True, exist_ok=True)
        part = self._table if trainer.world_size == 1 else _part(self._table, trainer.global_rank)
        self._file = part.open("w", newline="", encoding="utf-8", errors="surrogateescape")
        self._writer = csv.writer(self._file)
        if trainer.is_global_zero:
            self._writer.writerow(COLUMNS)

    def _write(self, model: SimpleNet, batch: ImageBatch) -> None:
        thresholds = [_threshold(model, kind) for kind in ("image", "pixel")]
        labels = [None] * len(batch.pred_score) if batch.pred_label is None else batch.pred_label.int().tolist()
        truth = [None] * len(labels) if batch.gt_label is None else batch.gt_label.int().tolist()
        paths = batch.image_path or [""] * len(labels)
        for line in zip(paths, batch.pred_score.flatten().tolist(), labels, truth, strict=True):
            self._writer.writerow([*line, *thresholds])
        self._file.flush()

    def _close(self, trainer: Trainer, loaders: Any) -> None:  # noqa: ANN401
        self._file.close()
        if trainer.world_size > 1:
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                size = sum(len(loader.dataset) for loader in (loaders if isinstance(loaders, list) else [loaders]))
                _merge(self._table, trainer.world_size, size)
        logger.info("Predictions: %s", self._table)


def _stem(number: int) -> str:
    return f"predictions-{number}" if number else "predictions"


def _part(table: Path, rank: int) -> Path:
    return table.with_suffix(f".csv.part{rank}")


def _merge(table: Path, ranks: int, size: int) -> None:
    """Put the parts together in the order of the images, which samplers deal out to the ranks in turns."""
    parts = [_part(table, rank) for rank in range(ranks)]
    files = [part.open(newline="", encoding="utf-8", errors="surrogateescape") for part in parts]
    with table.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        file.write(next(files[0]))
        turns = chain.from_iterable(zip_longest(*files, fillvalue=""))
        # Where images do not divide evenly, samplers of tests give some to two ranks: those at the end.
        for _, line in zip(range(size), filter(None, turns), strict=False):
            file.write(line)
    for part, opened in zip(parts, files, strict=True):
        opened.close()
        part.unlink()


def _threshold(model: SimpleNet, kind: str) -> float | None:
    """The threshold on the scale of the scores, as the sensitivity moves it."""
    processor = model.post_processor
    if processor is None or not getattr(processor, "enable_thresholding", False):
        return None
    return getattr(processor, f"normalized_{kind}_threshold").item()


def _page(trainer: Trainer, model: SimpleNet, table: Path, pixels: torch.Tensor) -> str:
    with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    paths = [row["image_path"] for row in rows]
    scores = torch.tensor([float(row["pred_score"]) for row in rows])
    truth = torch.tensor([int(row["gt_label"] or 0) for row in rows])
    called = torch.tensor([int(row["pred_label"] or 0) for row in rows])
    threshold = _threshold(model, "image")
    misses, alarms = (truth == 1) & (called == 0), (truth == 0) & (called == 1)

    figures = [("Images", f"{len(rows)}, {int(truth.sum())} of them defective")]
    figures += [
        (name, f"{float(value):.4f}")
        for name, value in trainer.callback_metrics.items()
        if name.startswith(("image_", "pixel_"))
    ]
    if threshold is not None:
        figures += [
            (f"{kind.capitalize()} threshold", f"{_threshold(model, kind):.3f} (unnormalised: {raw.item():.4f})")
            for kind, raw in (
                ("image", model.post_processor.image_threshold),
                ("pixel", model.post_processor.pixel_threshold),
            )
        ]
        figures += [
            ("Misses", f"{int(misses.sum())} of {int(truth.sum())} defective"),
            ("False alarms", f"{int(alarms.sum())} of {int((truth == 0).sum())} normal"),
        ]

    galleries = []
    made = {path: _picture_file(trainer, model, Path(path), table.parent) for path in paths if path}
    times = Counter(made.values())
    if threshold is not None:
        with_path = torch.tensor([bool(path) for path in paths])
        for title, among, order in (
            ("Worst misses", misses & with_path, scores),
            ("Worst false alarms", alarms & with_path, -scores),
            ("Nearest calls", with_path, (scores - threshold).abs()),
        ):
            chosen = sorted(among.nonzero().flatten().tolist(), key=order.tolist().__getitem__)[:GALLERY]
            pictures = []
            for index in chosen:
                path, picture = Path(paths[index]), made[paths[index]]
                if times[picture] > 1:  # images of one name in folders of one name: the last one's picture was kept
                    shown, name = path, str(path)
                else:
                    shown, name = picture if picture.is_file() else path, f"{path.parent.name}/{path.name}"
                pictures.append({"name": name, "score": scores[index].item(), **_linked(shown, table.parent)})
            galleries.append((title, pictures))

    charts = [_histogram(scores, truth, threshold)]
    if truth.unique().numel() == 2:
        steps, rank = scores.double().unique(return_inverse=True)
        # An image is defective if its score is above the threshold: halfway to the next lower score.
        lower = torch.cat([steps[:1] - 1, steps])[:-1]
        thresholds = torch.cat([(lower + steps) / 2, steps[-1:]])
        share = rank.double() / len(steps)  # torchmetrics would squash scores that are not from 0 to 1
        false, true, at = binary_roc(share, truth)
        precision, recall, cut = binary_precision_recall_curve(share, truth)
        at, cut = (thresholds[(each * len(steps)).round().long()] for each in (at, cut))
        charts += [_curve("ROC, images", "false alarms", false, "found", true, at)]
        charts += [_curve("Precision and recall, images", "recall", recall[:-1], "precision", precision[:-1], cut)]
    if pixels[1].sum():
        below = torch.linspace(0, 1, BINS + 1)[:-1]
        false, true = pixels.flip(1).cumsum(1).flip(1)
        shares = [counted / counted[0] for counted in (false, true)]
        charts += [_curve("ROC, pixels", "false alarms", shares[0], "found", shares[1], below)]
        precision = true / (true + false)
        charts += [_curve("Precision and recall, pixels", "recall", shares[1], "precision", precision, below)]
    plots = [
        chart.to_html(full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False})
        for number, chart in enumerate(charts)
    ]
    name = getattr(getattr(trainer, "datamodule", None), "name", None) or "test"
    return TEMPLATE.render(name=name, figures=figures, plots=plots, galleries=galleries)


def _histogram(scores: torch.Tensor, truth: torch.Tensor, threshold: float | None) -> go.Figure:
    import plotly.graph_objects as go

    low, high = min(0.0, scores.min().item()), max(1.0, scores.max().item())
    edges = torch.linspace(low, high, 51)
    chart = go.Figure(layout={"title": "Scores", "barmode": "overlay", "xaxis_title": "score", "yaxis_title": "images"})
    for label, name in enumerate(("normal", "defective")):
        counts = torch.histogram(scores[truth == label], edges).hist
        middle = (edges[1:] + edges[:-1]) / 2
        chart.add_bar(x=middle.tolist(), y=counts.tolist(), name=name, opacity=0.6, width=((high - low) / 50))
    if threshold is not None:
        chart.add_vline(threshold, line_dash="dash", annotation_text="threshold")
    return chart


def _curve(
    title: str, x_name: str, x: torch.Tensor, y_name: str, y: torch.Tensor, thresholds: torch.Tensor
) -> go.Figure:
    import plotly.graph_objects as go

    kept = torch.linspace(0, len(x) - 1, min(len(x), POINTS)).round().long()
    chart = go.Figure(layout={"title": title, "xaxis_title": x_name, "yaxis_title": y_name, "yaxis_range": [0, 1.02]})
    chart.add_scatter(
        x=x[kept].tolist(),
        y=y[kept].tolist(),
        customdata=thresholds[kept].tolist(),
        hovertemplate=f"{x_name} %{{x:.3f}}, {y_name} %{{y:.3f}}, threshold %{{customdata:.6f}}<extra></extra>",
    )
    return chart


def _picture_file(trainer: Trainer, model: SimpleNet, path: Path, folder: Path) -> Path:
    """Where the visualizer saves an image's picture; the image itself where there is none."""
    if model.visualizer is None:
        return path
    data = getattr(trainer, "datamodule", None)
    names = {"dataset_name": getattr(data, "name", None), "category": getattr(data, "category", None)}
    return generate_output_filename(path, model.visualizer.output_dir or folder / "images", **names, mkdir=False)


def _linked(shown: Path, folder: Path) -> dict[str, str]:
    """A small version of a picture, nothing if it has gone, and a link to it from a page in a folder."""
    buffer = io.BytesIO()
    with suppress(OSError), Image.open(shown) as image:
        image.thumbnail((1120, 224))
        image.convert("RGB").save(buffer, "JPEG", quality=85)
    thumbnail = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"link": quote(Path(os.path.relpath(shown, folder)).as_posix()), "thumbnail": thumbnail}
