"""What early exit costs: scores, the trade-off curve over thresholds, oracle bounds, histograms, from stored arrays.

Notation: ``N`` instances, ``L`` layers numbered 1..L (stored at l-1), ``C`` classes, ``G`` thresholds. ``pi`` and exit
logits have L-1 columns; at layer L exit is forced. Scores and saved layers are fractions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rl_exit.errors import ConfigError, RunError

METRICS = ("accuracy", "f1", "mcc")
CURVE_POINTS = 200
_SURE = 36.0
_SLACK = 1e-9  # Two routes to the same score differ in the last bits; no real difference of scores is this small.

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class CurvePoint(NamedTuple):
    """One threshold of the trade-off: its score (fraction) and mean exit layer (1..L)."""

    threshold: float
    score: float
    mean_exit_layer: float


@dataclass(frozen=True)
class SplitResult:
    """Everything measured on one split; ``to_dict`` is its JSON form.

    Attributes:
        metric: ``"accuracy"``, ``"f1"`` (positive class 1) or ``"mcc"``.
        num_instances: N.
        num_layers: L.
        threshold: Operating point; leave at the first ``pi > threshold``.
        full_depth_score: Score of the last exit for everyone.
        score: Score with exits at the operating point.
        mean_exit_layer: 1..L at the operating point.
        saved_layers: ``1 - mean_exit_layer / L``.
        oracle_score: Score when each instance leaves at its first correct layer, else at L.
        oracle_mean_exit_layer: Mean exit layer of that oracle.
        oracle_saved_layers: Saved layers of that oracle.
        exit_histogram: [L], instances that leave at each layer.
        exit_scores: [L], score of each exit for everyone.
        exit_losses: [L], mean cross-entropy of each exit, nats.
        curve: Trade-off, thresholds ascending (so is the mean exit layer).
        histogram_by_class: [C, L], counts by true class.
        histogram_by_memorized: [L, L], counts by memorized layer (row m-1).
        seconds_full_depth: Wall time of the split at full depth, where measured.
        seconds_with_exits: Wall time of the split with exits, where measured.
    """

    metric: str
    num_instances: int
    num_layers: int
    threshold: float
    full_depth_score: float
    score: float
    mean_exit_layer: float
    saved_layers: float
    oracle_score: float
    oracle_mean_exit_layer: float
    oracle_saved_layers: float
    exit_histogram: tuple[int, ...]
    exit_scores: tuple[float, ...]
    exit_losses: tuple[float, ...]
    curve: tuple[CurvePoint, ...]
    histogram_by_class: tuple[tuple[int, ...], ...]
    histogram_by_memorized: tuple[tuple[int, ...], ...]
    seconds_full_depth: float | None = None
    seconds_with_exits: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form: plain dicts, lists and numbers; a curve point is ``[threshold, score, mean_exit_layer]``."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> SplitResult:
        """The inverse of :meth:`to_dict`; keys it does not know are ignored (written by a later version).

        Raises:
            ValueError: A key is missing, or a list does not have num_layers entries.
        """
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in tree]
        if missing:
            raise ValueError(f"no split result: {', '.join(missing)} missing")
        values = {field.name: _frozen(tree[field.name]) for field in fields(cls) if field.name in tree}
        values["curve"] = tuple(CurvePoint(*point) for point in values["curve"])
        result = cls(**values)
        rows = (result.exit_histogram, result.exit_scores, result.exit_losses, *result.histogram_by_class)
        if any(len(row) != result.num_layers for row in (*rows, *result.histogram_by_memorized)):
            raise ValueError(f"no split result: lists over layers must have {result.num_layers} entries")
        return result


def check_metric(metric: str, num_classes: int) -> None:
    """Refuse a metric that does not fit the task; call it before any training.

    Raises:
        ConfigError: Unknown metric, or f1 for other than two classes.
    """
    if metric not in METRICS:
        raise ConfigError(f"task.metric = '{metric}' is unknown; accepted: {', '.join(METRICS)}")
    if metric == "f1" and num_classes != 2:
        raise ConfigError(
            f"task.metric = 'f1' is for two classes (positive class 1), the task has {num_classes}; "
            "accepted here: accuracy, mcc"
        )


def score(metric: str, labels: npt.ArrayLike, predictions: npt.ArrayLike) -> float:
    """Score of predictions, a fraction (MCC: -1..1).

    Args:
        metric: ``"accuracy"``, ``"f1"`` (binary, positive class 1; 0 where nothing is positive) or ``"mcc"``.
        labels: [N].
        predictions: [N].

    Raises:
        ValueError: Unknown metric, or shapes that do not fit or are empty.
    """
    from sklearn import metrics  # A second to load, so only where a score is wanted.

    truth, guess = np.asarray(labels), np.asarray(predictions)
    if truth.ndim != 1 or truth.shape != guess.shape or not truth.size:
        raise ValueError(f"labels {truth.shape} and predictions {guess.shape} must both be [N] with N > 0")
    if metric == "accuracy":
        return float(metrics.accuracy_score(truth, guess))
    if metric == "f1":
        return float(metrics.f1_score(truth, guess, average="binary", pos_label=1, zero_division=0.0))
    if metric == "mcc":
        with warnings.catch_warnings():  # A single class is no error here: its MCC is 0.
            warnings.simplefilter("ignore", UserWarning)
            return float(metrics.matthews_corrcoef(truth, guess))
    raise ValueError(f"metric '{metric}' is unknown; accepted: {', '.join(METRICS)}")


def exit_layers(confidence: npt.ArrayLike, threshold: float) -> IntArray:
    """First layer whose confidence exceeds the threshold, otherwise L.

    Args:
        confidence: [N, L-1], e.g. pi.
        threshold: Compared in float32, as the live engine does.

    Returns:
        [N] in 1..L.
    """
    leave = np.asarray(confidence, dtype=np.float32) > np.float32(threshold)
    forced = np.ones((len(leave), 1), dtype=bool)
    return np.concatenate([leave, forced], axis=1).argmax(axis=1).astype(np.int64) + 1


def oracle_layers(correct: npt.ArrayLike) -> IntArray:
    """First correct layer, else L: the least layers at which the exits allow their best score.

    Args:
        correct: [N, L].

    Returns:
        [N] in 1..L.
    """
    flags = np.asarray(correct, dtype=bool)
    return np.where(flags.any(axis=1), flags.argmax(axis=1) + 1, flags.shape[1]).astype(np.int64)


def log_odds(threshold: float) -> float:
    """``ln(t / (1 - t))`` of a threshold on pi: -inf at 0, inf at 1.

    Thresholds are compared on this scale: a decided policy has log-odds of 20 and more, where pi is 1 to the last digit
    of float32 and orders nothing any more.
    """
    if threshold <= 0.0:
        return -math.inf
    return math.inf if threshold >= 1.0 else math.log(threshold) - math.log1p(-threshold)


def threshold_at(odds: float) -> float:
    """The inverse of :func:`log_odds`."""
    return 0.5 * (1.0 + math.tanh(0.5 * odds))


def useful_thresholds(confidence: npt.ArrayLike, max_points: int = CURVE_POINTS) -> FloatArray:
    """Thresholds that lie between the values at which exits change, evenly spaced in mean exit layer.

    An instance leaves by layer l if the running maximum of its confidence exceeds the threshold, so the mean exit
    layer is ``1 + (L-1) * CDF`` of the pooled running maxima: their quantiles give equal steps of saved layers.
    With at most ``max_points`` distinct values, every threshold that makes a difference is returned.

    Args:
        confidence: [N, L-1].
        max_points: Most thresholds returned.

    Returns:
        [G] float32, strictly ascending; each lies above one observed value and below the next.
    """
    reached = np.sort(np.maximum.accumulate(np.asarray(confidence, dtype=np.float32), axis=1), axis=None)
    values = np.unique(reached)
    if len(values) < 2:
        return np.empty(0, dtype=np.float32)
    lower = np.arange(len(values) - 1)
    if len(lower) > max_points:
        wanted = reached[np.linspace(0, len(reached) - 1, max_points).round().astype(np.int64)]
        lower = np.unique(np.minimum(np.searchsorted(values, wanted), len(values) - 2))
    low, high = values[lower], values[lower + 1]
    # The middle of the gap, so that rounding in a live pass flips no exit; neighbouring float32 have no middle.
    middle = (0.5 * (low.astype(np.float64) + high.astype(np.float64))).astype(np.float32)
    return np.where(middle < high, middle, low)


def threshold_curve(
    labels: npt.ArrayLike,
    predictions: npt.ArrayLike,
    confidence: npt.ArrayLike,
    thresholds: npt.ArrayLike,
    metric: str,
    num_classes: int,
) -> tuple[CurvePoint, ...]:
    """Score and mean exit layer at every threshold, exactly, from one pass: O(N L log G).

    Serves any criterion of the form "leave at the first confidence > threshold".

    Args:
        labels: [N] in 0..C-1.
        predictions: [N, L], class that each exit predicts.
        confidence: [N, L-1].
        thresholds: [G].
        metric: As :func:`score`.
        num_classes: C.

    Returns:
        G points, thresholds ascending.
    """
    truth, guess = np.asarray(labels), np.asarray(predictions)
    cuts = np.unique(np.asarray(thresholds, dtype=np.float32))
    count, layers = guess.shape
    reached = np.maximum.accumulate(np.asarray(confidence, dtype=np.float32), axis=1)
    # Layer l is instance i's exit for the thresholds with index in [edges[i, l-1], edges[i, l]).
    edges = np.empty((count, layers + 1), dtype=np.int64)
    edges[:, 0], edges[:, -1] = 0, len(cuts)
    edges[:, 1:-1] = np.searchsorted(cuts, reached, side="left")
    begin, end = edges[:, :-1], edges[:, 1:]
    passed = _stacked(np.zeros_like(end[:, :-1]), end[:, :-1], np.full_like(end[:, :-1], len(cuts)), 1, len(cuts))
    predicted = _stacked(guess, begin, end, num_classes, len(cuts))
    right = guess == truth[:, None]
    hits = _stacked(guess[right], begin[right], end[right], num_classes, len(cuts))
    scores = _scores_from_counts(metric, np.bincount(truth, minlength=num_classes), predicted, hits)
    means = 1.0 + passed[0] / count
    return tuple(CurvePoint(float(t), float(s), float(m)) for t, s, m in zip(cuts, scores, means, strict=True))


def policy_curve(
    labels: npt.ArrayLike, logits: npt.ArrayLike, exit_logits: npt.ArrayLike, metric: str, threshold: float = 0.5
) -> tuple[CurvePoint, ...]:
    """Trade-off of the policy ``pi > threshold`` over its whole range: 0 and 1, ``threshold``, and the useful ones.

    Args:
        labels: [N].
        logits: [N, L, C].
        exit_logits: [N, L-1].
        metric: As :func:`score`.
        threshold: A point the curve shall contain.

    Returns:
        At most ``CURVE_POINTS + 3`` points; the last (threshold 1) is full depth.
    """
    scores = np.asarray(logits)
    # Beyond these odds pi is 0 or 1 in double precision too, so no threshold lies there.
    odds = np.clip(np.asarray(exit_logits, dtype=np.float32), -_SURE, _SURE)
    given = {np.float32(log_odds(value)): float(value) for value in (0.0, threshold, 1.0)}
    cuts = np.concatenate([np.array(list(given), dtype=np.float32), useful_thresholds(odds)])
    curve = threshold_curve(labels, scores.argmax(-1), odds, cuts, metric, scores.shape[2])
    return tuple(
        point._replace(threshold=given.get(np.float32(point.threshold), threshold_at(point.threshold)))
        for point in curve
    )


def choose_threshold(curve: Sequence[CurvePoint], full_depth_score: float, tolerance: float) -> float:
    """The threshold that saves most layers at a score of at least ``full_depth_score - tolerance``.

    Ties go to the higher score, then to the higher threshold (the more careful one on unseen text). Where no point
    is good enough, the best score wins, then the fewest layers, then the higher threshold.

    Args:
        curve: At least one point.
        full_depth_score: Fraction.
        tolerance: Fraction of score that exits may cost; at least 0.

    Raises:
        ValueError: Empty curve or negative tolerance.
    """
    points = [CurvePoint(*point) for point in curve]
    if not points or tolerance < 0:
        raise ValueError(f"{len(points)} curve points and tolerance {tolerance}; at least 1 and 0 are needed")
    good = [point for point in points if point.score >= full_depth_score - tolerance - _SLACK]
    if good:
        fewest = min(point.mean_exit_layer for point in good) + _SLACK
        tied = [point for point in good if point.mean_exit_layer <= fewest]
        best = max(tied, key=lambda point: (round(point.score, 9), point.threshold))
    else:
        highest = max(point.score for point in points) - _SLACK
        tied = [point for point in points if point.score >= highest]
        best = min(tied, key=lambda point: (round(point.mean_exit_layer, 9), -point.threshold))
    return best.threshold


def evaluate(
    labels: npt.ArrayLike,
    logits: npt.ArrayLike,
    losses: npt.ArrayLike,
    exit_logits: npt.ArrayLike,
    metric: str,
    threshold: float,
    answers: npt.ArrayLike | None = None,
) -> SplitResult:
    """Measure one split from stored arrays.

    Args:
        labels: [N] in 0..C-1.
        logits: [N, L, C], of every exit.
        losses: [N, L], cross-entropy of every exit, nats.
        exit_logits: [N, L-1], log-odds of Exit.
        metric: As :func:`score`.
        threshold: Operating point in [0, 1].
        answers: [N, L, C], what is answered on leaving, where that is not what the exit says: score and curve are
            theirs; full depth, the figures of each exit and the oracle are the exits'.

    Raises:
        ConfigError: The metric does not fit the classes.
        RunError: Numbers that are not finite (training diverged).
        ValueError: Shapes that do not fit, an empty split, or labels outside 0..C-1.
    """
    # Imported here because the package loads torch, which readers of results do not need.
    from rl_exit.method.rewards import memorized_layer

    truth, scores, loss, odds = (np.asarray(array) for array in (labels, logits, losses, exit_logits))
    count, layers, classes = _check(truth, scores, loss, odds, metric)
    guess = scores.argmax(-1)
    given = scores if answers is None else np.asarray(answers)
    if given.shape != scores.shape:
        raise ValueError(f"answers {given.shape} do not fit logits {scores.shape}")
    correct = guess == truth[:, None]
    left = exit_layers(odds, log_odds(threshold))
    ideal = oracle_layers(correct)
    rows = np.arange(count)
    mean, ideal_mean = float(left.mean()), float(ideal.mean())
    exit_scores = tuple(score(metric, truth, guess[:, layer]) for layer in range(layers))
    return SplitResult(
        metric=metric,
        num_instances=count,
        num_layers=layers,
        threshold=float(threshold),
        full_depth_score=exit_scores[-1],
        score=score(metric, truth, given[rows, left - 1].argmax(-1)),
        mean_exit_layer=mean,
        saved_layers=1.0 - mean / layers,
        oracle_score=score(metric, truth, guess[rows, ideal - 1]),
        oracle_mean_exit_layer=ideal_mean,
        oracle_saved_layers=1.0 - ideal_mean / layers,
        exit_histogram=tuple(np.bincount(left - 1, minlength=layers).tolist()),
        exit_scores=exit_scores,
        exit_losses=tuple(loss.mean(axis=0, dtype=np.float64).tolist()),
        curve=policy_curve(truth, given, odds, metric, threshold),
        histogram_by_class=_joint(truth, left, classes, layers),
        histogram_by_memorized=_joint(memorized_layer(correct) - 1, left, layers, layers),
    )


def _check(
    truth: npt.NDArray[Any], scores: npt.NDArray[Any], loss: npt.NDArray[Any], odds: npt.NDArray[Any], metric: str
) -> tuple[int, int, int]:
    if scores.ndim != 3 or not all(scores.shape):
        raise ValueError(f"logits must be [N, L, C], none of them 0, got {scores.shape}")
    count, layers, classes = (int(size) for size in scores.shape)
    if truth.shape != (count,) or loss.shape != (count, layers) or odds.shape != (count, layers - 1):
        raise ValueError(
            f"labels {truth.shape}, losses {loss.shape}, exit_logits {odds.shape} do not fit logits {scores.shape}; "
            f"accepted: ({count},), ({count}, {layers}), ({count}, {layers - 1})"
        )
    if truth.min() < 0 or truth.max() >= classes:
        raise ValueError(f"labels must be in 0..{classes - 1}, got {truth.min()}..{truth.max()}")
    check_metric(metric, classes)
    for name, array in (("logits", scores), ("losses", loss), ("exit logits", odds)):
        if not np.isfinite(array).all():
            raise RunError(
                f"the model's {name} are not finite (NaN or infinite): training diverged. "
                "Lower init.lr, task_step.lr or policy.lr, or set precision to float32."
            )
    return count, layers, classes


def _stacked(key: IntArray, begin: IntArray, end: IntArray, keys: int, size: int) -> IntArray:
    """[keys, size]: how many intervals [begin, end) with this key cover each index."""
    offset = key.ravel() * (size + 1)
    opened = np.bincount(offset + begin.ravel(), minlength=keys * (size + 1))
    closed = np.bincount(offset + end.ravel(), minlength=keys * (size + 1))
    return (opened - closed).reshape(keys, size + 1).cumsum(axis=1)[:, :size]


def _scores_from_counts(metric: str, actual: IntArray, predicted: IntArray, hits: IntArray) -> npt.NDArray[np.float64]:
    """[G] from counts per class: actual [C], predicted [C, G], hits [C, G]."""
    total = float(actual.sum())
    right = hits.sum(axis=0, dtype=np.float64)
    if metric == "accuracy":
        return right / total
    if metric == "f1":
        return 2.0 * hits[1] / np.maximum(predicted[1] + actual[1], 1)
    if metric != "mcc":
        raise ValueError(f"metric '{metric}' is unknown; accepted: {', '.join(METRICS)}")
    # Multi-class form (Gorodkin 2004), as scikit-learn; 0 where either side has a single class.
    share, guess = actual.astype(np.float64), predicted.astype(np.float64)
    spread = (total**2 - (share**2).sum()) * (total**2 - (guess**2).sum(axis=0))
    return np.where(spread > 0, (right * total - share @ guess) / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)


def _joint(key: IntArray, left: IntArray, keys: int, layers: int) -> tuple[tuple[int, ...], ...]:
    counts = np.bincount(key * layers + left - 1, minlength=keys * layers).reshape(keys, layers)
    return tuple(tuple(row) for row in counts.tolist())


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
