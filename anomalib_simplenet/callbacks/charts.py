"""Plotly charts of the report; the template sets the colours of text and lines, for a light and a dark page."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from numpy.typing import ArrayLike, NDArray

POINTS = 500  # of a curve, at most
COLOURS = {"normal": "#4c8bd6", "defective": "#e4633f", "calibration": "#4c8bd6", "predicted": "#e4a03f"}
LAYOUT = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "template": "none",
    "font": {"color": "#808080"},
    "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
    "margin": {"l": 55, "r": 15, "t": 75, "b": 50},
}


def above(scores: NDArray, thresholds: ArrayLike) -> NDArray:
    """How many scores, ``(N,)``, lie above each threshold, ``(K,)``: integers, ``(K,)``."""
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="right")


def candidates(scores: NDArray) -> NDArray:
    """Thresholds that differ in what lies above, ascending: below all scores, between neighbours, and the highest."""
    distinct = np.unique(scores)
    return np.concatenate([distinct[:1] - 1, (distinct[:-1] + distinct[1:]) / 2, distinct[-1:]])


def histogram(groups: dict[str, NDArray], limit: float | None, *, percent: bool = False) -> go.Figure:
    """How many images of each group have which score, ``(N,)``, and the threshold, if any.

    In per cent of a group, the axis is twice as high as the first group needs, or higher if another needs more: charts
    that share the first group look alike.
    """
    scores = np.concatenate(list(groups.values()))
    edges = np.linspace(min(0.0, scores.min()), max(1.0, scores.max()), 51)
    chart = _chart("Scores", "score", "% of images" if percent else "images", barmode="overlay", bargap=0)
    heights = [np.histogram(values, edges)[0] * (100 / len(values) if percent else 1) for values in groups.values()]
    for name, height in zip(groups, heights, strict=True):
        middle = (edges[1:] + edges[:-1]) / 2
        chart.add_bar(x=middle.tolist(), y=height.tolist(), name=name, marker_color=COLOURS[name], opacity=0.6)
    if percent:
        chart.update_layout(yaxis_range=[0, max(2 * heights[0].max(), *(height.max() for height in heights))])
    if limit is not None:
        chart.add_vline(limit, line_dash="dash", line_color="#808080", annotation_text="threshold")
    return chart


def sequence(p_values: NDArray) -> go.Figure:
    """P-values, ``(N,)``, in the order of the images; of many images, means of as many in a row as make 500 points."""
    size = ceil(len(p_values) / POINTS)
    first = np.arange(0, len(p_values), size)
    means = np.add.reduceat(p_values, first) / np.diff([*first, len(p_values)])
    chart = _chart("P-values in order", "image", "p-value" if size == 1 else f"mean p-value of {size} images")
    chart.add_scatter(x=(first + 1).tolist(), y=means.tolist(), mode="markers", marker_color=COLOURS["predicted"])
    chart.add_hline(0.5, line_dash="dash", line_color="#808080", annotation_text="mean without change")
    return chart.update_layout(yaxis_range=[0, 1.03])


def curves(normal: NDArray, defective: NDArray, limit: float | None) -> list[go.Figure]:
    """ROC and precision-recall curve of scores, ``(N,)`` and ``(M,)``, with the present threshold, if any, marked."""
    roc = _chart("ROC", "false alarms", "recall")
    precision_recall = _chart("Precision and recall", "recall", "precision")
    thresholds = candidates(np.concatenate([normal, defective]))
    shown = thresholds[np.linspace(0, len(thresholds) - 1, min(len(thresholds), POINTS)).round().astype(int)]
    line = {"mode": "lines", "line_color": COLOURS["normal"], "showlegend": False}
    mark = {"mode": "markers", "marker": {"color": COLOURS["defective"], "size": 10}, "name": "present threshold"}
    for limits, style in ((shown, line), (np.array([] if limit is None else [limit]), mark)):
        alarms, found = above(normal, limits), above(defective, limits)
        _add(roc, alarms / len(normal), found / len(defective), limits, style)
        some = alarms + found > 0  # else precision is undefined
        _add(precision_recall, found[some] / len(defective), found[some] / (alarms + found)[some], limits[some], style)
    return [roc, precision_recall]


def _add(chart: go.Figure, x: NDArray, y: NDArray, limits: NDArray, style: dict) -> None:
    x_name, y_name = chart.layout.xaxis.title.text, chart.layout.yaxis.title.text
    hover = f"{x_name} %{{x:.3f}}, {y_name} %{{y:.3f}}, threshold %{{customdata:.6f}}<extra></extra>"
    chart.add_scatter(x=x.tolist(), y=y.tolist(), customdata=limits.tolist(), hovertemplate=hover, **style)
    chart.update_layout(xaxis_range=[-0.02, 1.02], yaxis_range=[0, 1.03])


def _chart(title: str, x_name: str, y_name: str, **layout: object) -> go.Figure:
    import plotly.graph_objects as go

    return go.Figure(layout={**LAYOUT, "title": title, "xaxis_title": x_name, "yaxis_title": y_name, **layout})
