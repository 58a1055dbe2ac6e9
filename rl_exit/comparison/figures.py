"""The figures of one method on one run: operating points, area and what a threshold chosen on dev brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rl_exit.comparison.evidence import Scores, Split
from rl_exit.comparison.tally import Doubles, Floats, Measured, cuts_of, measure_once, tally

# Operating point -> fraction of score that exits may cost.
WITHIN: dict[str, float] = {"no_loss": 0.0, "within_1": 0.01}
BLOCK = 128  # Replicates at a time: bounds the memory and stays in the cache.
_SLACK = 1e-9  # As in rl_exit.evaluation: no real difference of scores is this small.


@dataclass(frozen=True, eq=False)
class Point:
    """An operating point in every replicate.

    Attributes:
        saved: [1+R], saved layers (fraction); 0 where the score is not reached.
        score: [1+R], score there; that of never leaving early where the bar is not reached.
        threshold: The criterion's own, on the split itself; None where all leave at layer 1 or nobody leaves early.
        reached: Whether some threshold reaches the score on the split itself.
    """

    saved: Doubles
    score: Doubles
    threshold: float | None
    reached: bool


@dataclass(frozen=True, eq=False)
class MethodFigures:
    """One criterion on one run's exits.

    Attributes:
        points: ``no_loss`` and ``within_1``: the most saved layers at a score that is high enough.
        transferred: The same thresholds chosen on dev, measured here; empty where dev is what is measured.
        on_dev: The points on dev at which ``transferred`` was chosen.
        area: [1+R], mean over saved layers 0..1-1/L of the best score at that many saved layers or more.
        curve: [G, 2], saved layers and score at every cut, most saved layers first.
    """

    points: Mapping[str, Point]
    transferred: Mapping[str, Point]
    on_dev: Mapping[str, Point]
    area: Doubles
    curve: Doubles


def full_depth(split: Split, weights: Floats, metric: str) -> Doubles:
    """Score of the last exit for everyone, [R]."""
    return measure_once(split, np.full(split.num_instances, split.num_layers), weights, metric)[0]


def measure_method(
    scores: Scores,
    split: Split,
    weights: Floats,
    reference: Doubles,
    metric: str,
    dev: tuple[Split, Floats, Doubles] | None = None,
) -> MethodFigures:
    """All figures of one criterion.

    Args:
        scores: Its scores, [N, L-1].
        split: What is measured.
        weights: [N, 1+R] from :func:`rl_exit.comparison.bootstrap.resamples`.
        reference: [1+R], the score that "no loss" means, in each replicate.
        metric: ``accuracy``, ``f1`` or ``mcc``.
        dev: The same of dev: (split, weights, reference); None where dev is what is measured.

    Raises:
        ValueError: Shapes that do not fit.
    """
    split = _answered(split, scores.answers)
    found = measure_at(scores.measured, cuts_of(scores.measured), split, weights, reference, metric)
    moved: dict[str, Point] = {}
    on_dev: dict[str, Point] = {}
    if dev is not None and scores.dev is not None:
        cuts = cuts_of(scores.dev)
        chosen = measure_at(scores.dev, cuts, _answered(dev[0], scores.dev_answers), *dev[1:], metric)
        on_dev = _own(chosen.points, scores)
        here = measure_at(scores.measured, cuts, split, weights, reference, metric, chosen.index)
        moved = _own(here.points, scores)
    return MethodFigures(_own(found.points, scores), moved, on_dev, found.area, found.curve)


def _answered(split: Split, answers: npt.NDArray[np.int64] | None) -> Split:
    """The split with a criterion's own answers in place of the exits'."""
    return split if answers is None else replace(split, predictions=answers)


def _own(points: Mapping[str, Point], scores: Scores) -> dict[str, Point]:
    """The points with thresholds on the criterion's own scale."""
    turn = scores.threshold
    return {
        name: point if turn is None or point.threshold is None else replace(point, threshold=turn(point.threshold))
        for name, point in points.items()
    }


@dataclass(frozen=True, eq=False)
class _AtCuts:
    """Figures over given cuts; ``index``: [1+R] the chosen cut of each operating point."""

    points: Mapping[str, Point]
    index: Mapping[str, npt.NDArray[np.int64]]
    area: Doubles
    curve: Doubles


def measure_at(
    scores: Floats,
    cuts: Doubles,
    split: Split,
    weights: Floats,
    reference: Doubles,
    metric: str,
    given: Mapping[str, npt.NDArray[np.int64]] | None = None,
) -> _AtCuts:
    """Operating points among given cuts, the choice made anew in every replicate.

    Args:
        scores: [N, L-1].
        cuts: [G].
        split: N instances.
        weights: [N, 1+R].
        reference: [1+R].
        metric: As :func:`measure_method`.
        given: The cut of each point in each replicate, [1+R], where it was chosen elsewhere.
    """
    counts = tally(split, scores, cuts, metric)
    columns = weights.shape[1]
    index = {name: np.empty(columns, dtype=np.int64) for name in WITHIN}
    saved = {name: np.empty(columns) for name in WITHIN}
    score = {name: np.empty(columns) for name in WITHIN}
    area = np.empty(columns)
    curve: Doubles = np.empty((0, 2))
    for start in range(0, columns, BLOCK):
        part = slice(start, start + BLOCK)
        measured = counts.measure(np.ascontiguousarray(weights[:, part]))
        if start == 0:
            curve = np.stack([measured.saved[:, 0], measured.score[:, 0]], axis=1)
        area[part] = area_under(measured)
        for name, tolerance in WITHIN.items():
            chosen = given[name][part] if given is not None else first_reaching(measured, reference[part] - tolerance)
            index[name][part] = chosen
            at = chosen[None, :]
            saved[name][part] = np.take_along_axis(measured.saved, at, axis=0)[0]
            score[name][part] = np.take_along_axis(measured.score, at, axis=0)[0]
    points = {
        name: Point(
            saved[name],
            score[name],
            float(cuts[index[name][0]]) if np.isfinite(cuts[index[name][0]]) else None,
            bool(score[name][0] >= reference[0] - tolerance - _SLACK),
        )
        for name, tolerance in WITHIN.items()
    }
    return _AtCuts(points, index, area, curve)


def first_reaching(measured: Measured, bar: Doubles) -> npt.NDArray[np.int64]:
    """The cut with the most saved layers at a score of at least the bar; the last (never leave early) where none has.

    Args:
        measured: [G, R], most saved layers first.
        bar: [R].

    Returns:
        [R] in 0..G-1.
    """
    good = measured.score >= bar - _SLACK
    return np.where(good.any(axis=0), good.argmax(axis=0), len(good) - 1)


def area_under(measured: Measured) -> Doubles:
    """Mean over saved layers s in [0, 1 - 1/L] of the best score at s saved layers or more.

    Every curve contains both ends (all leave at layer 1; nobody leaves early), so all are taken over the same range.

    Args:
        measured: [G, R], most saved layers first.

    Returns:
        [R].
    """
    best = np.maximum.accumulate(measured.score, axis=0)
    width = measured.saved[:-1] - measured.saved[1:]
    span = measured.saved[0] - measured.saved[-1]
    return np.einsum("gr,gr->r", best[:-1], width) / span
