"""Thresholds with a guarantee: conformal prediction for CAT, Learn-then-Test for CALM.

Both need a calibration split that neither the model nor the criterion was fitted on; the guarantee holds for new
instances drawn as that split was. What is guaranteed is agreement with full depth, not being right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rl_exit.criteria.calm import CALMMeta, CALMSaturation, CALMSoftmax
from rl_exit.criteria.stored import StoredSplit, scores_from_store
from rl_exit.criteria.with_head import CAT
from rl_exit.errors import ConfigError

CALM = TypeVar("CALM", CALMSoftmax, CALMSaturation, CALMMeta)


def conformal_threshold(scores: npt.ArrayLike, disagree: npt.ArrayLike, eps: float) -> float:
    """Threshold above which exits agree with the last layer for a share of at least 1 - eps (Schuster et al. 2021).

    For each calibration instance that has a disagreeing exit, the largest score of those exits is taken; infinity is
    appended; the threshold is their (1 - eps) quantile, the higher of two neighbours. A new instance that leaves only
    above it gets another answer than at full depth with probability at most eps. As published, calibration instances
    without a disagreeing exit do not count, which errs on the careful side.

    Args:
        scores: [N, L-1], larger leaves earlier.
        disagree: [N, L-1] bool, whether the exit says something else than exit L.
        eps: In (0, 1).

    Returns:
        The threshold; ``inf`` where there are too few instances with a disagreeing exit for this eps.

    Raises:
        ConfigError: eps out of range.
        ValueError: Shapes do not fit.
    """
    _check_share("eps", eps)
    value, bad = np.asarray(scores, dtype=np.float64), np.asarray(disagree, dtype=bool)
    if value.ndim != 2 or value.shape != bad.shape:
        raise ValueError(f"scores and disagree must both be [N, L-1], got {value.shape} and {bad.shape}")
    worst = np.where(bad, value, -np.inf).max(axis=1, initial=-np.inf)[bad.any(axis=1)]
    ranked = np.sort(np.append(worst, np.inf))
    return float(ranked[_higher_index(len(ranked), 1.0 - eps)])


def conformal(criterion: CAT, split: StoredSplit, eps: float) -> CAT:
    """CAT at the threshold that :func:`conformal_threshold` finds on a calibration split.

    Args:
        criterion: Its own threshold does not matter.
        split: Calibration instances.
        eps: Share of new instances that may get another answer than at full depth.

    Returns:
        The criterion; at threshold 1 nothing leaves.
    """
    cut = conformal_threshold(scores_from_store(criterion, split), _disagree(split), eps)
    return replace(criterion, threshold=min(max(cut, 0.0), 1.0))


def learn_then_test(risks: npt.ArrayLike, delta: float, level: float) -> int | None:
    """Most aggressive setting whose risk is below delta with confidence ``1 - level`` (Angelopoulos et al. 2021).

    Fixed-sequence testing: settings are tested from the most careful on, each against "its risk exceeds delta", and
    testing stops at the first that cannot be rejected. Losses of 0 and 1 get the exact binomial p-value, others the
    Hoeffding-Bentkus one.

    Args:
        risks: [S, N] in [0, 1], loss of each calibration instance at each setting, the most careful setting first.
        delta: Risk that is accepted, in (0, 1).
        level: Probability that the guarantee may fail, in (0, 1).

    Returns:
        Number of the last setting rejected, or None if the first is not.

    Raises:
        ConfigError: delta or level out of range.
        ValueError: risks are not [S, N] in [0, 1].
    """
    _check_share("delta", delta)
    _check_share("level", level)
    loss = np.asarray(risks, dtype=np.float64)
    if loss.ndim != 2 or loss.shape[1] == 0 or not ((loss >= 0.0) & (loss <= 1.0)).all():
        raise ValueError(f"risks must be [S, N] with values from 0 to 1, got shape {loss.shape}")
    binary = bool(np.isin(loss, (0.0, 1.0)).all())
    passed: int | None = None
    for number, row in enumerate(loss):
        p = (binomial_p if binary else hoeffding_bentkus_p)(float(row.mean()), len(row), delta)
        if p > level:
            break
        passed = number
    return passed


def calibrated(
    criterion: CALM, split: StoredSplit, delta: float, level: float = 0.05, grid: Sequence[float] | None = None
) -> CALM:
    """CALM at the smallest lambda whose answers differ from full depth for at most a share delta of new instances.

    Args:
        criterion: A CALM criterion; its own threshold does not matter.
        split: Calibration instances.
        delta: Share that may get another answer, in (0, 1).
        level: Probability that the guarantee may fail.
        grid: Candidates for lambda; default 0.00, 0.01, ..., 1.00.

    Returns:
        The criterion at that lambda.

    Raises:
        ConfigError: Not even the largest candidate passes; the message says what would help.
    """
    if not isinstance(criterion, (CALMSoftmax, CALMSaturation, CALMMeta)):
        raise ConfigError(
            f"criterion {criterion!r}; accepted: a CALM criterion (calm_softmax, calm_saturation, calm_meta)"
        )
    scores, other = scores_from_store(criterion, split), _disagree(split)
    candidates = sorted(set(np.linspace(0.0, 1.0, 101).tolist() if grid is None else map(float, grid)), reverse=True)
    risks = np.stack([_differs(scores >= np.float32(value), other) for value in candidates])
    best = learn_then_test(risks, delta, level)
    if best is None:
        raise ConfigError(
            f"criterion '{criterion.name}': no threshold keeps the risk below {delta} with confidence {1 - level:g} on "
            f"{split.num_instances} calibration instances; give more of them, or a larger delta or level"
        )
    return replace(criterion, threshold=candidates[best])


def binomial_p(mean: float, count: int, delta: float) -> float:
    """Exact p-value of "the risk exceeds delta" for losses of 0 and 1: ``P(Bin(count, delta) <= count * mean)``."""
    from scipy.special import bdtr

    return float(bdtr(round(count * mean), count, delta))


def hoeffding_bentkus_p(mean: float, count: int, delta: float) -> float:
    """P-value of "the risk exceeds delta" for losses in [0, 1]: the smaller of Hoeffding's and Bentkus's bounds.

    ``min(exp(-n KL(min(mean, delta) || delta)), e P(Bin(n, delta) <= ceil(n mean)))``, at most 1.
    """
    from scipy.special import bdtr

    low = min(mean, delta)
    apart = (low * math.log(low / delta) if low > 0 else 0.0) + (1 - low) * math.log((1 - low) / (1 - delta))
    # A mean of n equal parts can lie above the count by rounding alone.
    hits = math.ceil(count * mean - 1e-9)
    return float(min(math.exp(-count * apart), math.e * float(bdtr(hits, count, delta)), 1.0))


def betting_p(losses: npt.ArrayLike, bound: float, level: float) -> float:
    """P-value of "the mean loss exceeds the bound" for losses in [-1, 1], by betting (Waudby-Smith & Ramdas 2024).

    A gambler who starts with 1 stakes ``lambda_i`` against each loss, ``K_t = prod (1 - lambda_i (loss_i - bound))``,
    and chooses the stake from the losses before it. If the mean is at least the bound, no choice gains on average, so
    ``P(max_t K_t >= 1/p) <= p`` (Ville). It adapts to the variance, which is what makes it sharp here: most texts lose
    nothing. Depends on the order of the losses, which must not depend on their values.

    Args:
        losses: [N] in [-1, 1].
        bound: In (0, 1).
        level: The level it will be compared with; decides the stakes, not the validity.
    """
    loss = np.asarray(losses, dtype=np.float64)
    count = len(loss)
    if count == 0:
        return 1.0
    # Mean and variance of what came before each loss, with one made-up loss of variance 1/4 before all.
    before = np.arange(1, count + 1)
    mean = np.concatenate([[0.0], np.cumsum(loss)[:-1]]) / before
    squares = np.concatenate([[0.0], np.cumsum(np.square(loss - np.cumsum(loss) / (before + 1)))[:-1]])
    variance = (0.25 + squares) / before
    stake = np.minimum(np.sqrt(2.0 * math.log(1.0 / level) / (count * variance)), 0.9 / (1.0 - bound))
    # Nothing is staked where the past says that the bound is broken.
    stake = np.where(mean < bound, stake, 0.0)
    wealth = np.cumsum(np.log1p(-stake * (loss - bound)))
    return float(min(1.0, math.exp(-max(float(wealth.max()), 0.0))))


def fewest_for(bound: float, level: float) -> int:
    """Instances below which :func:`betting_p` cannot fall to the level, even if nothing is lost."""
    low, high = 1, 1
    while betting_p(np.zeros(high), bound, level) > level:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if betting_p(np.zeros(middle), bound, level) <= level else (middle + 1, high)
    return high


def careful_first(losses: Iterable[npt.NDArray[np.float64]], bound: float, level: float) -> tuple[int | None, float]:
    """Most aggressive setting whose mean loss is below the bound with confidence ``1 - level``, gains counted.

    Fixed-sequence testing as :func:`learn_then_test`, for losses in [-1, 1].

    Args:
        losses: One [N] for each setting, the most careful first; the settings must not come from these instances.
        bound: In (0, 1).
        level: In (0, 1).

    Returns:
        (number of the last setting that passed or None, its p-value).

    Raises:
        ConfigError: bound or level out of range.
    """
    _check_share("max_loss", bound)
    _check_share("level", level)
    passed, value = None, 1.0
    for number, loss in enumerate(losses):
        p = betting_p(loss, bound, level)
        if p > level:
            break
        passed, value = number, p
    return passed, value


def _disagree(split: StoredSplit) -> npt.NDArray[np.bool_]:
    said = np.asarray(split.logits).argmax(-1)
    return said[:, :-1] != said[:, -1:]


def _differs(leave: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Loss of each instance: 1 where it leaves early with another answer than at full depth."""
    first = leave.argmax(axis=1)
    rows = np.arange(len(leave))
    return (leave[rows, first] & other[rows, first]).astype(np.float64)


def _higher_index(count: int, share: float) -> int:
    """Index of the higher of the two values around a quantile; a whole index is not pushed up by rounding."""
    return min(math.ceil(share * (count - 1) - 1e-9), count - 1)


def _check_share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
        raise ConfigError(f"{name} = {value!r}; accepted: a number between 0 and 1")
