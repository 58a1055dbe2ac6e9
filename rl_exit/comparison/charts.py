"""Charts of a comparison as plotly JSON (see :mod:`rl_exit.figures`): trade-offs and operating points.

Every criterion keeps its colour and dash pattern in all charts: Okabe-Ito hues, and patterns so that no two share both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl_exit.comparison.tables import NAMES, POINTS, counted, criterion_name, method_name, ranked
from rl_exit.figures import Figure, metric_name, plain

_HUES = ("var(--orange)", "var(--green)", "var(--pink)", "var(--sky)", "var(--red)", "var(--ink)")
_DASHES = ("solid", "dash", "dot", "dashdot")
# Shown at first beside ours and the best baselines; the others at a click on the legend.
_SHOWN = ("fixed", "entropy", "max_probability", "pabee", "lte", "calm_softmax")
_BELOW, _ABOVE = 0.06, 0.012  # Of score, around the reference, that the trade-off shows at first.


def style_of(word: str) -> dict[str, Any]:
    """Line style of a criterion."""
    if word == "consistentee":
        return {"color": "var(--blue)", "width": 4, "dash": "solid"}
    place = [name for name in NAMES if name != "consistentee"].index(word) if word in NAMES else len(NAMES)
    return {"color": _HUES[place % len(_HUES)], "width": 2, "dash": _DASHES[(place // len(_HUES)) % len(_DASHES)]}


def trade_off(tree: Mapping[str, Any], group: str, exits: str) -> Figure:
    """Score against saved layers of every criterion on one set of exits; ours of the first group always beside them."""
    keys = ranked(tree, group, exits)
    ours = tree["ours"]
    if ours is not None and ours not in keys:
        keys.append(ours)
    best = set((tree["best_baseline"] or {}).values())
    top = (len(keys) and keys[0]) or None
    data = _bars(tree)
    for key in sorted(keys, key=lambda key: key == ours):  # ours last: drawn on top
        method = tree["methods"][key]
        local = method["group"] == group and method["exits"] == exits
        name = criterion_name(method["criterion"]) if local else method_name(tree, key)
        shown = method["criterion"] in _SHOWN or method["ours"] or key in best or key in (ours, top)
        data.append(_curve(plain(name), method, tree["num_layers"], style_of(method["criterion"]), shown))
    layout, oracle = _trade_off_layout(tree, keys), _group(tree, group)["oracle"]
    if 100 * oracle["score"] < layout["yaxis"]["range"][1]:
        data.append(_oracle(oracle))
    else:
        layout["annotations"] = [_beyond(oracle)]
    return {"data": data, "layout": layout}


def groups_trade_off(tree: Mapping[str, Any]) -> Figure:
    """Trade-off of each group's ConsistentEE."""
    keys = [group["consistentee"] for group in tree["groups"] if group["consistentee"]]
    data = _bars(tree)
    for place, key in enumerate(keys):
        method = tree["methods"][key]
        if place:
            hue, dash = _HUES[(place - 1) % len(_HUES)], _DASHES[(place - 1) // len(_HUES) % len(_DASHES)]
            line = {"color": hue, "width": 2.5, "dash": dash}
        else:
            line = style_of("consistentee")
        data.append(_curve(plain(method["group"]), method, tree["num_layers"], line, True))
    return {"data": data, "layout": _trade_off_layout(tree, keys)}


def points(tree: Mapping[str, Any], group: str, exits: str) -> Figure:
    """Saved layers at both operating points with intervals, one line per criterion, the best on top."""
    keys = ranked(tree, group, exits)
    names = [plain(criterion_name(tree["methods"][key]["criterion"])) for key in keys]
    kinds = {"no_loss": ("diamond", "var(--orange)"), "within_1": ("circle", "var(--blue)")}
    data = []
    for point, (symbol, color) in kinds.items():
        found = [tree["methods"][key][point] for key in keys]
        x = [100 * one["saved_layers"] for one in found]
        spans = [one["interval"] or [one["saved_layers"]] * 2 for one in found]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": POINTS[point],
                "x": x,
                "y": names,
                "customdata": [
                    [100 * one["score"], 100 * low, 100 * high] for one, (low, high) in zip(found, spans, strict=True)
                ],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [max(100 * high - value, 0.0) for value, (_, high) in zip(x, spans, strict=True)],
                    "arrayminus": [max(value - 100 * low, 0.0) for value, (low, _) in zip(x, spans, strict=True)],
                    "color": color,
                    "thickness": 1.5,
                    "width": 4,
                },
                "marker": {"symbol": symbol, "size": 11, "color": color},
                "hovertemplate": "%{y}: %{x:.1f} % of the layers saved<br>%{customdata[1]:.1f} to "
                f"%{{customdata[2]:.1f}}, score %{{customdata[0]:.2f}} %<extra>{POINTS[point]}</extra>",
            }
        )
    oracle = _group(tree, group)["oracle"]
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "oracle",
            "x": [100 * oracle["saved_layers"]] * 2,
            "y": [names[0], names[-1]] if names else [],
            "line": {"color": "var(--green)", "width": 1.5, "dash": "dash"},
            "hovertemplate": "oracle: %{x:.1f} % saved<extra></extra>",
        }
    )
    layout = {
        "xaxis": {"title": {"text": f"saved {counted(tree)} in %"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category", "dtick": 1},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "height": 130 + 27 * max(len(names), 4),
    }
    return {"data": data, "layout": layout}


def _curve(name: str, method: Mapping[str, Any], layers: int, line: Mapping[str, Any], shown: bool) -> dict[str, Any]:
    few = len(method["curve"]) <= 2 * layers
    trace = {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "name": name,
        "x": [100 * saved for saved, _ in method["curve"]],
        "y": [100 * score for _, score in method["curve"]],
        "customdata": [[layers * (1 - saved)] for saved, _ in method["curve"]],
        "line": dict(line),
        "hovertemplate": "%{x:.1f} % saved (layer %{customdata[0]:.2f}), %{y:.2f} %" + f"<extra>{name}</extra>",
        "visible": True if shown else "legendonly",
    }
    if few:
        trace["marker"] = {"size": 7, "symbol": "square"}
    return trace


def _bars(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scores that the operating points ask for, as lines."""
    reference, reach = tree["full_depth_score"]["pooled"], 100 * (1 - least_cost(tree) / tree["num_layers"])
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": [0, reach],
            "y": [100 * score] * 2,
            "line": {"color": "var(--muted)", "width": 1.5, "dash": dash},
            "hovertemplate": f"{name}: %{{y:.2f}} %<extra></extra>",
        }
        for name, score, dash in (
            ("full depth after initialisation", reference, "dash"),
            ("1 point less", reference - 0.01, "dot"),
        )
    ]


def _oracle(oracle: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "oracle (first correct exit)",
        "x": [100 * oracle["saved_layers"]],
        "y": [100 * oracle["score"]],
        "marker": {"symbol": "star", "size": 15, "color": "var(--green)", "line": {"width": 1, "color": "var(--card)"}},
        "hovertemplate": "oracle: %{x:.1f} % saved, %{y:.2f} %<extra></extra>",
    }


def _beyond(oracle: Mapping[str, Any]) -> dict[str, Any]:
    """A note at the upper edge: the oracle lies above what is shown."""
    return {
        "x": 100 * oracle["saved_layers"],
        "y": 1,
        "yref": "paper",
        "yanchor": "bottom",
        "showarrow": False,
        "text": f"★ oracle: {100 * oracle['score']:.2f} %, above",
        "font": {"color": "var(--green)", "size": 12.5},
    }


def least_cost(tree: Mapping[str, Any]) -> float:
    """What leaving at layer 1 costs, in layers."""
    return float(min(costs[0] for costs in tree.get("layer_costs") or [[1.0]]))


def _trade_off_layout(tree: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    reference = tree["full_depth_score"]["pooled"]
    highest = max((score for key in keys for _, score in tree["methods"][key]["curve"]), default=reference)
    reach = 100 * (1 - least_cost(tree) / tree["num_layers"])
    return {
        "xaxis": {"title": {"text": f"saved {counted(tree)} in %"}, "range": [-1, reach + 1]},
        "yaxis": {
            "title": {"text": f"{metric_name(tree['metric'])} in %"},
            "range": [100 * (reference - _BELOW), 100 * (max(highest, reference) + _ABOVE)],
        },
        "legend": {"orientation": "v", "x": 1.01, "xanchor": "left", "y": 1, "yanchor": "top"},
        "hovermode": "closest",
        "height": 560,
    }


def _group(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(group for group in tree["groups"] if group["name"] == name)
    return found
