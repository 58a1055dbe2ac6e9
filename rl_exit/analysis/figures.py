"""Figures of the analysis as plotly JSON, in the manner of :mod:`rl_exit.figures`: plain dicts, theme colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl_exit.figures import Figure, metric_name

REWARD_STYLES = {
    "vanilla": ("var(--orange)", "dash", "square"),
    "hardness": ("var(--blue)", "solid", "circle"),
    "correctness": ("var(--green)", "dot", "diamond"),
}
_LEGEND = {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0}


def exit_chart(exits: Mapping[str, Any], key: str, scale: float, title: str, shown: str) -> Figure:
    """Fig. 2: one quantity of each exit, after initialisation and of the finished model, all and those that leave.

    Args:
        exits: ``initial`` and ``final``, each the dict of :class:`rl_exit.analysis.exits.ExitFigures`.
        key: ``"loss"`` or ``"accuracy"``.
        scale: Factor to the unit shown.
        title: Of the y axis.
        shown: Format of a value, e.g. ``".3f"``.
    """
    styles = (
        ("initial", "", "after initialisation, all", "var(--orange)", "dot", "circle-open"),
        ("final", "", "finished model, all", "var(--blue)", "dot", "circle-open"),
        ("initial", "_leaving", "after initialisation, those that leave there", "var(--orange)", "solid", "square"),
        ("final", "_leaving", "finished model, those that leave there", "var(--blue)", "solid", "diamond"),
    )
    count = exits["final"]["leaving"]
    layers = list(range(1, len(count) + 1))
    data = []
    for owner, group, name, color, dash, symbol in styles:
        values = exits[owner][f"{key}{group}"]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": layers,
                "y": [None if value is None else scale * value for value in values],
                "customdata": count if group else [sum(count)] * len(layers),
                "line": {"color": color, "width": 2.5 if group else 1.8, "dash": dash},
                "marker": {"symbol": symbol, "size": 9 if group else 7},
                "hovertemplate": f"layer %{{x}}: %{{y:{shown}}}<br>%{{customdata}} instances<extra>{name}</extra>",
            }
        )
    return {"data": data, "layout": _layout("exit layer", title, 400, dtick=1)}


def by_memorized(values: Sequence[float | None], count: Sequence[int], scale: float, title: str, shown: str) -> Figure:
    """Mean of a measure of hardness for each memorized layer."""
    bar = {
        "type": "bar",
        "x": list(range(1, len(values) + 1)),
        "y": [None if value is None else scale * value for value in values],
        "customdata": list(count),
        "marker": {"color": "var(--blue)"},
        "hovertemplate": f"memorized layer %{{x}}: %{{y:{shown}}}<br>%{{customdata}} instances<extra></extra>",
    }
    return {"data": [bar], "layout": {**_layout("memorized layer", title, 320, dtick=1), "showlegend": False}}


def rewards_chart(tree: Mapping[str, Any]) -> Figure:
    """Fig. 4: what each reward reaches over all alphas and thresholds, and its alphas at the threshold 0.5."""
    layers, full = tree["num_layers"], 100 * tree["full_depth_score"]
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "full depth after initialisation",
            "x": [1, layers],
            "y": [full, full],
            "line": {"color": "var(--ink)", "width": 1.5, "dash": "dot"},
            "hovertemplate": "full depth: %{y:.2f} %<extra></extra>",
        }
    ]
    for reward, found in tree["rewards"].items():
        color, dash, symbol = REWARD_STYLES[reward]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{reward}: best of all alphas and thresholds",
                "x": [point[1] for point in found["frontier"]],
                "y": [100 * point[0] for point in found["frontier"]],
                "customdata": [[point[2], point[3], 100 * (1 - point[1] / layers)] for point in found["frontier"]],
                "line": {"color": color, "width": 2.5, "dash": dash, "shape": "hv"},
                "hovertemplate": "layer %{x:.2f}, %{y:.2f} %, %{customdata[2]:.1f} % saved<br>"
                f"alpha %{{customdata[0]:g}}, threshold %{{customdata[1]:.4g}}<extra>{reward}</extra>",
            }
        )
        own = [row for row in tree["policies"] if row["reward"] == reward]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{reward}: each alpha at threshold 0.5",
                "x": [row["mean_exit_layer"] for row in own],
                "y": [100 * row["score"] for row in own],
                "customdata": [row["alpha"] for row in own],
                "marker": {"symbol": symbol, "size": 10, "color": color, "line": {"width": 1, "color": "var(--card)"}},
                "hovertemplate": f"alpha %{{customdata:g}}: layer %{{x:.2f}}, %{{y:.2f}} %<extra>{reward}</extra>",
            }
        )
    layout = _layout("mean exit layer", f"{metric_name(tree['metric'])} in %", 460)
    return {"data": data, "layout": layout}


def alpha_chart(tree: Mapping[str, Any], key: str, title: str) -> Figure:
    """Fig. 5: score or saved layers by alpha, at the threshold 0.5, for every reward."""
    data = []
    for reward in tree["rewards"]:
        own = [row for row in tree["policies"] if row["reward"] == reward]
        color, dash, symbol = REWARD_STYLES[reward]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": reward,
                "x": [row["alpha"] for row in own],
                "y": [100 * row[key] for row in own],
                "line": {"color": color, "width": 2.5, "dash": dash},
                "marker": {"symbol": symbol, "size": 8},
                "hovertemplate": f"alpha %{{x:g}}: %{{y:.2f}} %<extra>{reward}</extra>",
            }
        )
    layout = _layout("alpha, price of a layer in the unit of the reward", title, 340)
    if all(row["alpha"] > 0 for row in tree["policies"]):
        layout["xaxis"]["type"] = "log"
    return {"data": data, "layout": layout}


def _layout(x_title: str, y_title: str, height: int, dtick: int | None = None) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": x_title}}
    if dtick is not None:
        axis["dtick"] = dtick
    return {
        "xaxis": axis,
        "yaxis": {"title": {"text": y_title}},
        "showlegend": True,
        "legend": dict(_LEGEND),
        "hovermode": "closest",
        "height": height,
    }
