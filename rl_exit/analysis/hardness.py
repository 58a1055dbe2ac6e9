"""Table 1: does the memorized layer tell how hard an instance is? Rank correlation with loss and forgetting events."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Correlation(NamedTuple):
    """Spearman's rank correlation with its 95 % interval; all -1..1."""

    value: float
    low: float
    high: float


class Forgetting(NamedTuple):
    """What training forgot of each instance (Toneva et al. 2019).

    Attributes:
        ids: [N] int64, ascending.
        events: [N] int64, how often it was right at one visit and wrong at the next.
        learnt: [N] bool, whether it was ever right.
        visits: Most visits of an instance, which is the number of epochs.
    """

    ids: npt.NDArray[np.int64]
    events: npt.NDArray[np.int64]
    learnt: npt.NDArray[np.bool_]
    visits: int

    def hardness(self) -> npt.NDArray[np.int64]:
        """[N], the events; an instance that was never learnt counts as forgotten more often than any other."""
        return np.where(self.learnt, self.events, self.visits // 2 + 1)


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> Correlation | None:
    """Rank correlation with average ranks for ties.

    The interval is Fisher's with the standard error ``sqrt((1 + r^2/2) / (N - 3))`` (Bonett and Wright 2000).

    Args:
        x: [N], finite.
        y: [N], finite.

    Returns:
        None where it is not defined: fewer than four instances, or one side constant.

    Raises:
        ValueError: Shapes differ, or a value is not finite.
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in (x, y))
    if a.ndim != 1 or a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"two finite [N] are needed, got {a.shape} and {b.shape}")
    if len(a) < 4 or (a == a[0]).all() or (b == b[0]).all():
        return None
    ranks_a, ranks_b = average_ranks(a), average_ranks(b)
    ranks_a -= ranks_a.mean()
    ranks_b -= ranks_b.mean()
    value = float(ranks_a @ ranks_b / math.sqrt(float(ranks_a @ ranks_a) * float(ranks_b @ ranks_b)))
    value = min(max(value, -1.0), 1.0)
    if abs(value) == 1.0:
        return Correlation(value, value, value)
    half = _Z95 * math.sqrt((1.0 + value**2 / 2.0) / (len(a) - 3))
    centre = math.atanh(value)
    return Correlation(value, math.tanh(centre - half), math.tanh(centre + half))


def average_ranks(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Ranks 1..N; equal values share the mean of their ranks. [N] -> [N]."""
    array = np.asarray(values)
    _, place, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2.0)[place]


def forgetting(ids: npt.ArrayLike, epochs: npt.ArrayLike, correct: npt.ArrayLike) -> Forgetting:
    """Count forgetting events from the visits of a training.

    Args:
        ids: [V] integer, the instance of each visit, in any order.
        epochs: [V] integer, its epoch.
        correct: [V] bool, whether the last exit was right at that visit, before the update.

    Raises:
        ValueError: Shapes differ, there are no visits, or an instance is visited twice in an epoch.
    """
    who, when, right = np.asarray(ids, dtype=np.int64), np.asarray(epochs, dtype=np.int64), np.asarray(correct, bool)
    if who.ndim != 1 or not len(who) or who.shape != when.shape or who.shape != right.shape:
        raise ValueError(f"ids {who.shape}, epochs {when.shape} and correct {right.shape} must be [V] with V > 0")
    order = np.lexsort((when, who))
    who, when, right = who[order], when[order], right[order]
    again = who[1:] == who[:-1]
    if (again & (when[1:] == when[:-1])).any():
        raise ValueError("an instance is recorded twice in one epoch")
    unique, place, counts = np.unique(who, return_inverse=True, return_counts=True)
    events = np.bincount(place[1:][again & right[:-1] & ~right[1:]], minlength=len(unique))
    learnt = np.bincount(place[right], minlength=len(unique)) > 0
    return Forgetting(unique, events.astype(np.int64), learnt, int(counts.max()))
