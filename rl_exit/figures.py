"""Figures of the report as plotly JSON: plain dicts, no plotly import.

Colours are CSS variables (``var(--blue)``) that the page resolves for its light or dark theme: Okabe-Ito hues for
kinds, cividis for memorized layers, one blue for shares; colour-blind readers can tell all of them apart.
Plotly reads a little HTML inside texts, so names that come from users go through :func:`plain`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Figure = dict[str, Any]
METRIC_NAMES = {"accuracy": "accuracy", "f1": "F1", "mcc": "MCC"}
MAX_CLASSES = 40
MAX_POINTS = 300
_CYCLE = ("var(--blue)", "var(--orange)", "var(--green)", "var(--pink)", "var(--sky)", "var(--red)")
_DASHES = ("solid", "dash", "dot", "dashdot")
# Cividis at five points.
_CIVIDIS = ((0, 34, 78), (65, 77, 107), (124, 123, 120), (188, 174, 108), (254, 232, 56))


def plain(name: object) -> str:
    """A user's text as plotly shall show it: as it stands, no tags."""
    return html.escape(str(name), quote=False)


def metric_name(metric: str) -> str:
    """``"f1"`` -> ``"F1"``; unknown metrics keep their name."""
    return METRIC_NAMES.get(metric, metric)


def trade_off(split: Mapping[str, Any]) -> Figure:
    """Score against mean exit layer: policy curve, operating point, full depth, oracle, fixed-depth exits."""
    layers = split["num_layers"]
    name = metric_name(split["metric"])
    points = _monotone(split["curve"])
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "full depth",
            "x": [1, layers],
            "y": [100 * split["full_depth_score"]] * 2,
            "line": {"color": "var(--ink)", "width": 1.5, "dash": "dash"},
            "hovertemplate": "full depth: %{y:.2f} %<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "fixed depth (everyone leaves at one layer)",
            "x": list(range(1, layers + 1)),
            "y": _percent(split["exit_scores"]),
            "line": {"color": "var(--muted)", "width": 1.5, "dash": "dot"},
            "marker": {"symbol": "square", "size": 7},
            "hovertemplate": "everyone at layer %{x}: %{y:.2f} %<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "learned exits, every threshold",
            "x": [point[2] for point in points],
            "y": [100 * point[1] for point in points],
            "customdata": [[point[0], 100 * (1 - point[2] / layers)] for point in points],
            "line": {"color": "var(--blue)", "width": 3},
            "hovertemplate": "threshold %{customdata[0]:.4f}<br>layer %{x:.2f}, %{y:.2f} %<br>"
            "%{customdata[1]:.1f} % of the layers saved<extra></extra>",
        },
        _marker("oracle (first correct layer)", split, "oracle_", "star", "var(--green)"),
        _marker("chosen operating point", split, "", "diamond", "var(--red)"),
    ]
    layout = {
        "xaxis": {"title": {"text": "mean exit layer"}, "range": [0.8, layers + 0.2], "dtick": _layer_tick(layers)},
        "yaxis": {"title": {"text": f"{name} in %"}, "ticksuffix": ""},
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0},
        "hovermode": "closest",
        "height": 460,
    }
    return {"data": data, "layout": layout}


def exit_scores(split: Mapping[str, Any], before: Mapping[str, Any] | None) -> Figure:
    """Score of every exit for everyone; dashed: the same before the rounds."""
    name = metric_name(split["metric"])
    return _per_exit(split, before, "exit_scores", 100.0, f"{name} in %", "%{y:.2f} %")


def exit_losses(split: Mapping[str, Any], before: Mapping[str, Any] | None) -> Figure:
    """Mean cross-entropy of every exit; dashed: the same before the rounds."""
    return _per_exit(split, before, "exit_losses", 1.0, "cross-entropy in nats", "%{y:.3f} nats")


def histogram(split: Mapping[str, Any]) -> Figure:
    """Exit-layer histogram: bars stacked by memorized layer (dark: easy, bright: hard)."""
    layers, count = split["num_layers"], split["num_instances"]
    data = []
    for index, row in enumerate(split["histogram_by_memorized"]):
        data.append(
            {
                "type": "bar",
                "name": f"m = {index + 1}",
                "x": list(range(1, layers + 1)),
                "y": [100 * value / count for value in row],
                "customdata": list(row),
                "marker": {
                    "color": sequential(index / max(layers - 1, 1)),
                    "line": {"width": 1, "color": "var(--line)"},
                },
                "hovertemplate": f"leaves at %{{x}}, memorized layer {index + 1}<br>"
                "%{customdata} instances, %{y:.1f} % of all<extra></extra>",
            }
        )
    layout = {
        "barmode": "stack",
        "bargap": 0.18,
        "xaxis": {"title": {"text": "exit layer"}, "dtick": _layer_tick(layers)},
        "yaxis": {"title": {"text": "instances in %"}, "rangemode": "tozero"},
        "legend": {"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0, "traceorder": "normal"},
        "height": 400,
    }
    return {"data": data, "layout": layout}


def by_memorized(split: Mapping[str, Any]) -> Figure:
    """Share of each memorized layer's instances that leaves at each layer (rows sum to 100 %)."""
    names = [f"m = {index + 1}" for index in range(split["num_layers"])]
    return _heat(split["histogram_by_memorized"], names, "exit layer", "memorized layer")


def by_class(split: Mapping[str, Any], label_names: Sequence[str]) -> Figure:
    """Share of each class that leaves at each layer, earliest class on top; of many classes the two ends only."""
    rows = split["histogram_by_class"]
    names = [label_names[index] if index < len(label_names) else f"class {index}" for index in range(len(rows))]
    order = sorted(range(len(rows)), key=lambda index: (_mean_layer(rows[index]), index))
    if len(order) > MAX_CLASSES:
        order = order[: MAX_CLASSES // 2] + order[-MAX_CLASSES // 2 :]
    shown = _distinct(_short(names[index]) for index in order)
    return _heat([rows[index] for index in order], shown, "exit layer", "")


def seconds(phases: Mapping[str, float]) -> Figure:
    """Wall time per phase."""
    names = [plain(name.replace("_", " ")) for name in phases]
    values = [float(value) for value in phases.values()]
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": names,
        "text": [duration(value) for value in values],
        "textposition": "auto",
        "marker": {"color": "var(--blue)"},
        "hovertemplate": "%{y}: %{text}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "seconds"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "showlegend": False,
        "height": 110 + 34 * len(names),
    }
    return {"data": [bar], "layout": layout}


def lines(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_title: str, y_title: str) -> Figure:
    """Training curves: name -> (x, y). Long ones are thinned to means of equal stretches."""
    data = []
    for index, (name, (x, y)) in enumerate(series.items()):
        thin_x, thin_y = _thinned(x, y)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(thin_x) <= 12 else "lines",
                "name": plain(name),
                "x": thin_x,
                "y": thin_y,
                "line": {"color": _CYCLE[index % 6], "width": 2, "dash": _DASHES[index // 6 % 4]},
                "hovertemplate": "%{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
            }
        )
    axis: dict[str, Any] = {"title": {"text": x_title}}
    places = [float(value) for x, _ in series.values() for value in x]
    if places and all(value.is_integer() for value in places) and max(places) - min(places) <= 10:
        axis["dtick"] = 1
    layout = {
        "xaxis": axis,
        "yaxis": {"title": {"text": y_title}},
        "showlegend": len(data) > 1,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "height": 290,
    }
    return {"data": data, "layout": layout}


def sequential(position: float) -> str:
    """Cividis at 0..1 as ``rgb(...)``."""
    scaled = min(max(position, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    index = min(int(scaled), len(_CIVIDIS) - 2)
    part = scaled - index
    mix = (round(a + part * (b - a)) for a, b in zip(_CIVIDIS[index], _CIVIDIS[index + 1], strict=True))
    return f"rgb({','.join(str(value) for value in mix)})"


def duration(value: float) -> str:
    """Seconds in words: ``0.4 s``, ``52 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _marker(name: str, split: Mapping[str, Any], prefix: str, symbol: str, color: str) -> Figure:
    x, y = split[f"{prefix}mean_exit_layer"], 100 * split[f"{prefix}score"]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x],
        "y": [y],
        "marker": {"symbol": symbol, "size": 15, "color": color, "line": {"width": 1.5, "color": "var(--card)"}},
        "hovertemplate": f"{name}<br>layer %{{x:.2f}}, %{{y:.2f}} %<extra></extra>",
    }


def _per_exit(
    split: Mapping[str, Any], before: Mapping[str, Any] | None, key: str, scale: float, title: str, shown: str
) -> Figure:
    layers = list(range(1, split["num_layers"] + 1))
    data = []
    if before is not None and before.get(key):
        data.append(("after initialisation", before[key], "var(--orange)", "dash", "circle-open"))
    data.append(("finished model", split[key], "var(--blue)", "solid", "circle"))
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": layers,
            "y": [scale * value for value in values],
            "line": {"color": color, "width": 2.5, "dash": dash},
            "marker": {"symbol": symbol, "size": 8},
            "hovertemplate": f"layer %{{x}}: {shown}<extra>{name}</extra>",
        }
        for name, values, color, dash, symbol in data
    ]
    layout = {
        "xaxis": {"title": {"text": "exit layer"}, "dtick": _layer_tick(split["num_layers"])},
        "yaxis": {"title": {"text": title}},
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "height": 340,
    }
    return {"data": traces, "layout": layout}


def _heat(rows: Sequence[Sequence[int]], names: Sequence[str], x_title: str, y_title: str) -> Figure:
    totals = [sum(row) for row in rows]
    share = [[100 * value / total if total else None for value in row] for row, total in zip(rows, totals, strict=True)]
    layers = len(rows[0]) if rows else 0
    numbers = layers <= 12
    heat = {
        "type": "heatmap",
        "x": list(range(1, layers + 1)),
        "y": [f"{plain(name)}  ({total})" for name, total in zip(names, totals, strict=True)],
        "z": share,
        "zmin": 0,
        "zmax": 100,
        "customdata": [list(row) for row in rows],
        "colorscale": [[0, "var(--heat-low)"], [0.5, "var(--heat-mid)"], [1, "var(--heat-high)"]],
        "colorbar": {"title": {"text": "%"}, "thickness": 12, "outlinewidth": 0},
        "xgap": 1.5,
        "ygap": 1.5,
        "hovertemplate": "%{y}<br>leaves at %{x}: %{customdata} instances, %{z:.1f} %<extra></extra>",
    }
    if numbers:
        heat["texttemplate"] = "%{z:.0f}"
    layout = {
        "xaxis": {"title": {"text": x_title}, "dtick": _layer_tick(layers), "showgrid": False},
        "yaxis": {
            "title": {"text": y_title},
            "autorange": "reversed",
            "automargin": True,
            "type": "category",
            "dtick": 1,
            "showgrid": False,
        },
        "height": 110 + max(200, 26 * len(rows)),
    }
    return {"data": [heat], "layout": layout}


def _monotone(curve: Iterable[Sequence[float]]) -> list[Sequence[float]]:
    return sorted(curve, key=lambda point: (point[2], point[0]))


def _percent(values: Iterable[float]) -> list[float]:
    return [100 * value for value in values]


def _layer_tick(layers: int) -> int:
    return max(1, math.ceil(layers / 16))


def _mean_layer(row: Sequence[int]) -> float:
    total = sum(row)
    return sum((index + 1) * value for index, value in enumerate(row)) / total if total else math.inf


def _short(name: str, longest: int = 28) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _distinct(names: Iterable[str]) -> list[str]:
    # Plotly merges rows of one name; zero-width spaces keep shortened names apart without showing.
    seen: list[str] = []
    for name in names:
        while name in seen:
            name += "\u200b"
        seen.append(name)
    return seen


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    pairs = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) <= MAX_POINTS:
        return [a for a, _ in pairs], [b for _, b in pairs]
    size = math.ceil(len(pairs) / MAX_POINTS)
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return [group[-1][0] for group in groups], [sum(b for _, b in group) / len(group) for group in groups]
