"""Training curves of the report, from the long-form metrics table (phase, round, step, epoch, metric, value)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rl_exit import figures

Series = dict[tuple[str, str], dict[int, list[tuple[float, float, float]]]]

_TITLES = {
    "init": "Initialisation: backbone and all exits",
    "policy": "Policy phase: when to leave",
    "task": "Task phase: exits and backbone under the frozen policy",
    "dev": "Dev split after each round",
}
# What a reader looks for first in each phase, by part of the metric's name, in this order.
_FIRST = {
    "init": ("loss",),
    "policy": ("return", "exit_layer", "entropy"),
    "task": ("loss",),
    "dev": ("score", "exit_layer", "saved_layers"),
}
_FRACTIONS = ("score", "full_depth_score", "oracle_score", "saved_layers", "accuracy")
_NAMES = {
    "loss": ("Loss", "cross-entropy in nats"),
    "last_exit_loss": ("Loss of the last exit", "cross-entropy in nats"),
    "return": ("Mean return", "return in nats"),
    "mean_return": ("Mean return", "return in nats"),
    "expected_return": ("Expected return", "return in nats"),
    "mean_exit_layer": ("Mean exit layer", "layer"),
    "entropy": ("Entropy of the exits", "nats"),
    "score": ("Score with exits", "%"),
    "full_depth_score": ("Score at full depth", "%"),
    "saved_layers": ("Saved layers", "%"),
    "lr": ("Learning rate", ""),
}
_MOST = 40


def training_charts(columns: Mapping[str, list[Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Charts grouped by phase.

    Args:
        columns: phase, round, step, epoch, metric, value; lists of one length.

    Returns:
        (groups for the template: title, charts, more; figures by chart id).
    """
    series = _collect(columns)
    groups: list[dict[str, Any]] = []
    drawn: dict[str, Any] = {}
    phases = [*_TITLES, *sorted({phase for phase, _ in series} - set(_TITLES))]
    for phase in phases:
        names = sorted(name for owner, name in series if owner == phase)
        if not names:
            continue
        group: dict[str, Any] = {"title": _TITLES.get(phase, f"Phase {phase}"), "charts": [], "more": []}
        if phase == "dev" and {"score", "full_depth_score"} <= set(names):
            names.remove("full_depth_score")
            names.remove("score")
            item = {"id": "dev-scores", "title": "Score", "caption": ""}
            group["charts"].append(item)
            both = {"with exits": _by_round(series[phase, "score"], 100.0)}
            both["full depth"] = _by_round(series[phase, "full_depth_score"], 100.0)
            drawn["dev-scores"] = figures.lines(both, "round", "%")
        for place, _, name in sorted((_place(phase, name), len(name), name) for name in names)[:_MOST]:
            key = f"curve-{len(drawn)}"
            title, unit = _NAMES.get(name, (name.replace("_", " ").capitalize(), ""))
            group["charts" if place < len(_FIRST.get(phase, ())) else "more"].append(
                {"id": key, "title": title, "caption": ""}
            )
            scale = 100.0 if name in _FRACTIONS else 1.0
            drawn[key] = _figure(phase, series[phase, name], scale, "%" if scale > 1 else unit)
        groups.append(group)
    return groups, drawn


def _collect(columns: Mapping[str, list[Any]]) -> Series:
    series: Series = {}
    keys = ("phase", "round", "step", "epoch", "metric", "value")
    for phase, turn, step, epoch, metric, value in zip(*(columns[key] for key in keys), strict=True):
        if phase is None or metric is None or value is None or not math.isfinite(value):
            continue
        points = series.setdefault((str(phase), str(metric)), {}).setdefault(int(turn or 0), [])
        points.append((float(step or 0), float(epoch or 0.0), float(value)))
    return series


def _figure(
    phase: str, rounds: Mapping[int, Sequence[tuple[float, float, float]]], scale: float, unit: str
) -> dict[str, Any]:
    if phase == "dev":
        return figures.lines({"dev": _by_round(rounds, scale)}, "round", unit)
    shown = {}
    for turn, points in sorted(rounds.items()):
        use_step = len({step for step, _, _ in points}) > 1 or len(points) == 1
        x = [step if use_step else epoch for step, epoch, _ in points]
        shown[f"round {turn}"] = (x, [scale * value for _, _, value in points])
    return figures.lines(shown, "update", unit)


def _by_round(
    rounds: Mapping[int, Sequence[tuple[float, float, float]]], scale: float
) -> tuple[list[float], list[float]]:
    """The last value of each round."""
    return [float(turn) for turn in sorted(rounds)], [scale * rounds[turn][-1][2] for turn in sorted(rounds)]


def _place(phase: str, name: str) -> int:
    words = _FIRST.get(phase, ())
    return next((index for index, word in enumerate(words) if word in name), len(words))
