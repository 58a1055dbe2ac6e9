"""Figures 4 and 5: what a reward and its price of a layer reach, as points of score against depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rl_exit.evaluation import SplitResult

UNIT = {
    "correctness": 0.1
}  # Price in right answers that goes with one nat: exits differ less in accuracy than in loss.
_SLACK = 1e-9  # Two routes to the same score differ in the last bits.


class PolicyPoint(NamedTuple):
    """One threshold of one policy.

    Attributes:
        score: Fraction.
        mean_exit_layer: 1..L.
        alpha: Price of a layer that the policy was trained with, nats.
        threshold: Leave where pi is above it.
    """

    score: float
    mean_exit_layer: float
    alpha: float
    threshold: float


def points_of(result: SplitResult, alpha: float) -> list[PolicyPoint]:
    """The curve of one policy as points."""
    return [PolicyPoint(at.score, at.mean_exit_layer, alpha, at.threshold) for at in result.curve]


def frontier(points: Iterable[PolicyPoint]) -> list[PolicyPoint]:
    """The points that no other beats: none has at least the score at fewer layers.

    Returns:
        Mean exit layer and score both rise strictly.
    """
    best: list[PolicyPoint] = []
    for point in sorted(points, key=lambda at: (at.mean_exit_layer, -at.score)):
        if not best or point.score > best[-1].score + _SLACK:
            best.append(point)
    return best


def most_saved(points: Sequence[PolicyPoint], reference: float, loss: float) -> PolicyPoint | None:
    """The point with the fewest layers whose score is at least ``reference - loss``; None where there is none.

    Args:
        points: Any.
        reference: Score at full depth, a fraction.
        loss: Fraction that leaving early may cost, e.g. 0.01.
    """
    good = [point for point in points if point.score >= reference - loss - _SLACK]
    return min(good, key=lambda at: (at.mean_exit_layer, -at.score), default=None)


def default_alphas(reward: str, alpha: float) -> tuple[float, ...]:
    """Prices of a layer in nats around a run's own, a factor of two apart.

    Args:
        reward: The run's reward.
        alpha: Its price, in the unit of that reward.
    """
    own = alpha / UNIT.get(reward, 1.0) or 0.1
    return tuple(float(f"{own * factor:.6g}") for factor in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0))


def prices_of(reward: str, nats: Sequence[float]) -> tuple[float, ...]:
    """Prices in the unit of a reward."""
    return tuple(float(f"{value * UNIT.get(reward, 1.0):.6g}") for value in nats)


def policy_row(reward: str, alpha: float, result: SplitResult) -> dict[str, Any]:
    """JSON form of one policy: its operating point at its threshold, and its curve."""
    return {
        "reward": reward,
        "alpha": alpha,
        "threshold": result.threshold,
        "score": result.score,
        "mean_exit_layer": result.mean_exit_layer,
        "saved_layers": result.saved_layers,
        "curve": [list(point) for point in result.curve],
    }


def reward_row(points: Sequence[PolicyPoint], reference: float, num_layers: int) -> dict[str, Any]:
    """JSON form of what one reward reaches over all its alphas and thresholds."""
    row: dict[str, Any] = {"frontier": [list(point) for point in frontier(points)]}
    for name, loss in (("no_loss", 0.0), ("within_1", 0.01)):
        at = most_saved(points, reference, loss)
        row[name] = None if at is None else {**at._asdict(), "saved_layers": 1.0 - at.mean_exit_layer / num_layers}
    return row
