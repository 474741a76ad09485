"""Plotly charts of the report; the template sets the colours of text and lines, for a light and a dark page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from numpy.typing import ArrayLike, NDArray

POINTS = 500  # of a curve, at most
COLOURS = {"normal": "#4c8bd6", "defective": "#e4633f"}
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


def histogram(normal: NDArray, defective: NDArray, limit: float | None) -> go.Figure:
    """How many normal and defective images, ``(N,)`` and ``(M,)``, have which score, and the threshold, if any."""
    scores = np.concatenate([normal, defective])
    edges = np.linspace(min(0.0, scores.min()), max(1.0, scores.max()), 51)
    chart = _chart("Scores", "score", "images", barmode="overlay")
    for (name, colour), values in zip(COLOURS.items(), (normal, defective), strict=True):
        counts, _ = np.histogram(values, edges)
        middle = (edges[1:] + edges[:-1]) / 2
        chart.add_bar(x=middle.tolist(), y=counts.tolist(), name=name, marker_color=colour, opacity=0.6)
    chart.update_layout(bargap=0)
    if limit is not None:
        chart.add_vline(limit, line_dash="dash", line_color="#808080", annotation_text="threshold")
    return chart


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
