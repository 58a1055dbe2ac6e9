"""Score and saved layers at every threshold, for any weights of the instances, from one sort.

As the threshold rises over the cuts, an instance moves from its exit at layer l to l+1 when the cut reaches the
running maximum of its scores up to l. What an instance adds to a count (right answers, predicted positives, layers)
changes only there. These changes form a sparse matrix [G, N] with at most L entries per instance; its product with the
weights [N, R], summed up over the cuts, gives the count at every cut in every replicate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array

from rl_exit.comparison.evidence import Split

MAX_CUTS = 8192  # Exact up to here; beyond, cuts are spaced evenly in mean exit layer, 1/8192 of the range apart.

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measured:
    """A trade-off in every replicate.

    Attributes:
        score: [G, R], fraction (MCC: -1..1).
        saved: [G, R], saved layers as a fraction; row 0 is ``1 - 1/L`` (all leave at layer 1; with measured costs what
            that saves), the last row 0 (nobody leaves before L), never rising in between.
    """

    score: Doubles
    saved: Doubles


def cuts_of(scores: npt.ArrayLike, most: int = MAX_CUTS) -> Doubles:
    """The cuts that make a difference: an instance leaves at the first layer whose score is above the cut.

    Args:
        scores: [N, L-1], larger leaving earlier; infinities are allowed.
        most: Most finite cuts returned.

    Returns:
        [G] ascending: ``-inf`` (by convention everyone leaves at layer 1), cuts half way between neighbouring values,
        ``inf`` (nobody leaves early).

    Raises:
        ValueError: A score is not a number.
    """
    array = np.asarray(scores, dtype=np.float64)
    if np.isnan(array).any():
        raise ValueError("scores must be numbers, got NaN")
    reached = np.sort(np.maximum.accumulate(array, axis=1), axis=None)
    values = np.unique(reached)
    lower = np.arange(max(len(values) - 1, 0))
    if len(lower) > most:
        # The mean exit layer falls by as much for each of the pooled running maxima: their quantiles are even steps.
        wanted = reached[np.linspace(0, len(reached) - 1, most).round().astype(np.int64)]
        lower = np.unique(np.minimum(np.searchsorted(values, wanted), len(values) - 2))
    low, high = values[lower], values[lower + 1]
    # The middle of the gap as a live pass in float32 sees it; neighbouring float32 have none: "above low" is the same.
    with np.errstate(over="ignore", invalid="ignore"):
        low = np.where(np.isneginf(low), np.where(np.isposinf(high), 0.0, high - 1.0 - np.abs(high)), low)
        middle = (0.5 * low + 0.5 * high).astype(np.float32).astype(np.float64)
    return np.concatenate([[-np.inf], np.where((middle > low) & (middle < high), middle, low), [np.inf]])


@dataclass(frozen=True, eq=False)
class Tally:
    """The changes of every count over the cuts, for one criterion on one split.

    Attributes:
        metric: ``accuracy``, ``f1`` (positive class 1) or ``mcc``.
        num_layers: L.
        layers: [G, N] sparse, changes of what leaving costs, in layers.
        right: [G, N] sparse, changes of "the answer is right".
        predicted: For each class that the metric counts: [G, N] sparse, changes of "this class is predicted".
        actual: For each of these classes: [N], whether it is the label.
        hits: For f1: [G, N] sparse, changes of "a positive is predicted and right".
    """

    metric: str
    num_layers: int
    layers: coo_array
    right: coo_array
    predicted: tuple[coo_array, ...] = ()
    actual: tuple[Floats, ...] = ()
    hits: coo_array | None = None

    def measure(self, weights: Floats) -> Measured:
        """Score and saved layers at every cut.

        Args:
            weights: [N, R], how often each instance counts; every column sums to the same number of instances or
                not, each is normalised by its own sum.

        Returns:
            [G, R] each.
        """
        total = weights.sum(axis=0, dtype=np.float64)
        saved = 1.0 - _running(self.layers, weights) / (total * self.num_layers)
        return Measured(self._score(weights, total), saved)

    def _score(self, weights: Floats, total: Doubles) -> Doubles:
        if self.metric == "accuracy":
            return _running(self.right, weights) / total
        if self.metric == "f1":
            hits = _running(self.hits, weights)
            both = _running(self.predicted[0], weights) + self.actual[0] @ weights
            return 2.0 * hits / np.maximum(both, 1e-12)
        # Multi-class MCC (Gorodkin 2004), as scikit-learn; 0 where labels or answers are of a single class.
        joint = _running(self.right, weights) * total
        guess_squared, truth_squared = np.zeros_like(joint), np.zeros_like(total)
        for changes, flags in zip(self.predicted, self.actual, strict=True):
            guessed = _running(changes, weights)
            truth = (flags @ weights).astype(np.float64)
            joint -= guessed * truth
            guess_squared += guessed**2
            truth_squared += truth**2
        spread = (total**2 - truth_squared) * (total**2 - guess_squared)
        return np.where(spread > 0, joint / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)


def tally(split: Split, scores: npt.ArrayLike, cuts: npt.ArrayLike, metric: str) -> Tally:
    """Prepare the counts of one criterion on one split.

    Args:
        split: Labels and predictions, N instances, L layers.
        scores: [N, L-1], larger leaving earlier.
        cuts: [G] as :func:`cuts_of` gives them, of this split or another.
        metric: ``accuracy``, ``f1`` or ``mcc``.

    Raises:
        ValueError: Unknown metric, or scores of another shape.
    """
    values = np.asarray(scores, dtype=np.float64)
    count, layers = split.predictions.shape
    if values.shape != (count, layers - 1):
        raise ValueError(f"scores {values.shape}; accepted: ({count}, {layers - 1})")
    if metric not in ("accuracy", "f1", "mcc"):
        raise ValueError(f"metric '{metric}' is unknown; accepted: accuracy, f1, mcc")
    bounds = np.asarray(cuts, dtype=np.float64)
    # Cut 0 sends everyone out at layer 1. From cut `move[i, l]` on, instance i no longer leaves at a layer <= l+1.
    move = np.zeros((count, layers), dtype=np.int64)
    move[:, 1:] = 1 + np.searchsorted(bounds[1:], np.maximum.accumulate(values, axis=1), side="left")
    shape = (len(bounds), count)
    right = split.predictions == split.labels[:, None]
    # Whole numbers are added exactly in float32; measured costs are not whole.
    exact = np.float32 if split.costs is None else np.float64
    depth = np.broadcast_to(split.depths.astype(exact), (count, layers))

    def changes(what: npt.NDArray[np.generic]) -> coo_array:
        return _changes(what.astype(np.float32), move, shape)

    paid = _changes(depth, move, shape)

    if metric == "accuracy":
        return Tally(metric, layers, paid, changes(right))
    classes = [1] if metric == "f1" else list(range(split.num_classes))
    return Tally(
        metric,
        layers,
        paid,
        changes(right),
        tuple(changes(split.predictions == label) for label in classes),
        tuple((split.labels == label).astype(np.float32) for label in classes),
        changes(right & (split.predictions == 1)) if metric == "f1" else None,
    )


def measure_once(split: Split, layers: npt.ArrayLike, weights: Floats, metric: str) -> tuple[Doubles, Doubles]:
    """Score and saved layers of given exit layers.

    Args:
        split: N instances, L layers.
        layers: [N] in 1..L.
        weights: [N, R].
        metric: As :func:`tally`.

    Returns:
        (score [R], saved layers [R]).
    """
    left = np.asarray(layers, dtype=np.int64)
    answer = split.predictions[np.arange(split.num_instances), left - 1]
    alone = Split(split.ids, split.labels, answer[:, None], split.num_classes)
    score = tally(alone, np.empty((split.num_instances, 0)), [-np.inf], metric).measure(weights).score[0]
    return score, 1.0 - (split.depths[left - 1] @ weights) / (weights.sum(axis=0, dtype=np.float64) * split.num_layers)


def _changes(values: npt.NDArray[np.floating], move: npt.NDArray[np.int64], shape: tuple[int, int]) -> coo_array:
    """Sparse [G, N]: at cut ``move[i, l]`` instance i goes from ``values[i, l-1]`` to ``values[i, l]``."""
    step = np.diff(values, axis=1, prepend=0)
    rows = np.broadcast_to(np.arange(shape[1])[:, None], step.shape)
    keep = step != 0
    return coo_array((step[keep], (move[keep], rows[keep])), shape=shape, dtype=values.dtype).tocsr()


def _running(changes: coo_array | None, weights: Floats) -> Doubles:
    """[G, R]: the count at every cut."""
    assert changes is not None
    # In float32 whole numbers far below 2^24, which it adds exactly.
    moved = np.asarray(changes @ weights)
    for row in range(1, len(moved)):
        moved[row] += moved[row - 1]
    return moved.astype(np.float64)
