"""Figures pooled over seeds: the mean of the seeds' figures, in every replicate, and their JSON form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rl_exit.comparison.bootstrap import interval
from rl_exit.comparison.figures import MethodFigures, Point
from rl_exit.comparison.tally import Doubles

CURVE_POINTS = 241
FEW_CUTS = 64  # A criterion with so few thresholds (patience, fixed depth) is shown as its points.

BySeed = Mapping[int, MethodFigures]


def pooled(values: Sequence[Doubles]) -> Doubles:
    """Mean over seeds in every replicate: S arrays [1+R] -> [1+R]."""
    return np.mean(np.stack(values), axis=0)


def saved_at(figures: BySeed, point: str, seeds: Sequence[int]) -> Doubles:
    """Pooled saved layers at an operating point, [1+R]."""
    return pooled([figures[seed].points[point].saved for seed in seeds])


def point_tree(points: Mapping[int, Point], num_layers: int) -> dict[str, Any]:
    """JSON of one operating point.

    Args:
        points: By seed.
        num_layers: L.

    Returns:
        ``score``, ``saved_layers``, ``mean_exit_layer`` (pooled), ``interval`` (of saved layers), ``score_interval``,
        ``by_seed`` and ``threshold`` (by seed; None: at an end of the range).
    """
    saved = pooled([point.saved for point in points.values()])
    score = pooled([point.score for point in points.values()])
    return {
        "score": float(score[0]),
        "saved_layers": float(saved[0]),
        "mean_exit_layer": float(num_layers * (1.0 - saved[0])),
        "interval": interval(saved),
        "score_interval": interval(score),
        "reached": all(point.reached for point in points.values()),
        "by_seed": [
            {
                "seed": seed,
                "score": float(point.score[0]),
                "saved_layers": float(point.saved[0]),
                "reached": point.reached,
            }
            for seed, point in points.items()
        ],
        "threshold": [point.threshold for point in points.values()],
    }


def value_tree(values: Doubles) -> dict[str, Any]:
    """JSON of a single pooled figure: ``value`` and ``interval``."""
    return {"value": float(values[0]), "interval": interval(values)}


def gain_tree(ours: Doubles, other: Doubles) -> dict[str, Any]:
    """JSON of a paired difference of saved layers, [1+R] each: ``saved_layers`` and ``interval``."""
    difference = ours - other
    return {"saved_layers": float(difference[0]), "interval": interval(difference)}


def pooled_curve(curves: Sequence[Doubles]) -> list[list[float]]:
    """One curve out of the seeds' own.

    Criteria with a few thresholds are averaged threshold by threshold; the others over seeds at equal saved layers,
    linearly between neighbouring points.

    Args:
        curves: Per seed [G, 2]: saved layers (falling) and score.

    Returns:
        Points [saved layers, score], saved layers rising.
    """
    same = {len(curve) for curve in curves}
    if len(same) == 1 and same.pop() <= FEW_CUTS:
        return _rounded(np.mean(np.stack(curves), axis=0)[::-1])
    reach = max(float(curve[0, 0]) for curve in curves)
    grid = np.linspace(0.0, reach, CURVE_POINTS)
    scores = [np.interp(grid, curve[::-1, 0], curve[::-1, 1]) for curve in curves]
    return _rounded(np.stack([grid, np.mean(np.stack(scores), axis=0)], axis=1))


def best_of(
    methods: Mapping[str, BySeed], point: str, seeds: Sequence[int], allowed: Callable[[str], bool]
) -> str | None:
    """The method that saves most layers at an operating point (ties: the greater area); None where none is allowed.

    Args:
        methods: Method -> figures by seed.
        point: ``no_loss`` or ``within_1``.
        seeds: Seeds to pool over; methods that lack one are passed over.
        allowed: Which methods may win.
    """
    ranked = {
        name: (float(saved_at(figures, point, seeds)[0]), float(pooled([figures[seed].area for seed in seeds])[0]))
        for name, figures in methods.items()
        if allowed(name) and all(seed in figures for seed in seeds)
    }
    return max(ranked, key=lambda name: ranked[name]) if ranked else None


def _rounded(points: Doubles) -> list[list[float]]:
    return [[round(float(saved), 6) + 0.0, round(float(score), 6) + 0.0] for saved, score in points]
