"""Plotly charts of the report, with colours for a light and a dark page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import plotly.graph_objects as go

POINTS = 500  # of a curve, at most
COLOURS = {"normal": "#4c8bd6", "defective": "#e4633f"}
LAYOUT = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "template": "none",
    "font": {"color": "#808080"},  # the page's style replaces it by its text colour
    "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
    "margin": {"l": 55, "r": 15, "t": 75, "b": 50},
}


def histogram(scores: torch.Tensor, defective: torch.Tensor, limit: float | None) -> go.Figure:
    """How many normal and defective images have which score, and the threshold.

    Args:
        scores (torch.Tensor): Scores of images, ``(N,)``.
        defective (torch.Tensor): Which are defective, boolean, ``(N,)``.
        limit (float | None): The threshold, if there is one.

    Returns:
        go.Figure: The chart.
    """
    low, high = min(0.0, scores.min().item()), max(1.0, scores.max().item())
    edges = torch.linspace(low, high, 51, dtype=scores.dtype)
    chart = _chart("Scores", "score", "images", barmode="overlay")
    for label, (name, colour) in enumerate(COLOURS.items()):
        counts = torch.histogram(scores[defective == label], edges).hist
        middle = (edges[1:] + edges[:-1]) / 2
        chart.add_bar(
            x=middle.tolist(),
            y=counts.tolist(),
            name=name,
            marker_color=colour,
            opacity=0.6,
            width=(high - low) / 50,
        )
    if limit is not None:
        chart.add_vline(limit, line_dash="dash", line_color="#808080", annotation_text="threshold")
    return chart


def curves(
    kind: str, above: torch.Tensor, thresholds: torch.Tensor, present: tuple[float, int] | None
) -> list[go.Figure]:
    """ROC and precision-recall curve.

    Args:
        kind (str): What was counted, ``"images"`` or ``"pixels"``.
        above (torch.Tensor): Normal and defective ones above each threshold, ``(2, K)``, not 0 at the first.
        thresholds (torch.Tensor): Ascending, ``(K,)``.
        present (tuple[float, int] | None): The present threshold and its column in ``above``, to mark it.

    Returns:
        list[go.Figure]: The two charts.
    """
    false_alarms, recall = above.double() / above[:, :1]
    precision = above[1].double() / above.sum(0)  # NaN where nothing lies above
    return [
        _curve(f"ROC, {kind}", ("false alarms", false_alarms), ("recall", recall), thresholds, present),
        _curve(f"Precision and recall, {kind}", ("recall", recall), ("precision", precision), thresholds, present),
    ]


def to_html(figures: Sequence[go.Figure]) -> list[str]:
    """The charts for a page without network: the first brings plotly's script, 5 MB.

    Args:
        figures (Sequence[go.Figure]): The charts.

    Returns:
        list[str]: An HTML element for each.
    """
    config = {"displayModeBar": False, "responsive": True}
    return [
        figure.to_html(full_html=False, include_plotlyjs=place == 0, config=config, default_height="100%")
        for place, figure in enumerate(figures)
    ]


def _curve(
    title: str,
    horizontal: tuple[str, torch.Tensor],
    vertical: tuple[str, torch.Tensor],
    thresholds: torch.Tensor,
    present: tuple[float, int] | None,
) -> go.Figure:
    (x_name, x), (y_name, y) = horizontal, vertical
    chart = _chart(title, x_name, y_name, xaxis_range=[-0.02, 1.02], yaxis_range=[0, 1.03])
    defined = y.isfinite().nonzero().flatten()
    shown = defined[torch.linspace(0, len(defined) - 1, min(len(defined), POINTS)).round().long()]
    hover = f"{x_name} %{{x:.3f}}, {y_name} %{{y:.3f}}, threshold %{{customdata:.6f}}<extra></extra>"
    chart.add_scatter(
        x=x[shown].tolist(),
        y=y[shown].tolist(),
        customdata=thresholds[shown].tolist(),
        hovertemplate=hover,
        mode="lines",
        line_color=COLOURS["normal"],
        showlegend=False,
    )
    if present is not None and y[present[1]].isfinite():
        limit, place = present
        chart.add_scatter(
            x=[x[place].item()],
            y=[y[place].item()],
            customdata=[limit],
            hovertemplate=hover,
            mode="markers",
            marker={"color": COLOURS["defective"], "size": 10},
            name="present threshold",
            showlegend=True,
        )
    return chart


def _chart(title: str, x_name: str, y_name: str, **layout: object) -> go.Figure:
    import plotly.graph_objects as go

    return go.Figure(layout={**LAYOUT, "title": title, "xaxis_title": x_name, "yaxis_title": y_name, **layout})
