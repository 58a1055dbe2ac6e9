from __future__ import annotations

import numpy as np
import pytest

from rl_exit.analysis.trade_off import PolicyPoint, default_alphas, frontier, most_saved, prices_of, reward_row


def point(score: float, layer: float, alpha: float = 0.1) -> PolicyPoint:
    return PolicyPoint(score, layer, alpha, 0.5)


def test_the_frontier_by_hand() -> None:
    points = [point(0.9, 4.0), point(0.8, 2.0), point(0.7, 3.0), point(0.85, 2.0), point(0.9, 5.0), point(0.6, 1.0)]
    assert [(at.mean_exit_layer, at.score) for at in frontier(points)] == [(1.0, 0.6), (2.0, 0.85), (4.0, 0.9)]
    assert frontier([]) == []


@pytest.mark.parametrize("seed", range(3))
def test_nothing_beats_the_frontier_and_it_beats_the_rest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [point(score, layer) for score, layer in rng.random((200, 2)).round(2)]
    best = frontier(points)
    for at in points:
        beaten = any(
            o.score >= at.score and o.mean_exit_layer <= at.mean_exit_layer and o[:2] != at[:2] for o in points
        )
        assert beaten == (at[:2] not in {o[:2] for o in best})


def test_most_saved_takes_the_fewest_layers_that_are_good_enough() -> None:
    points = [point(0.90, 5.0), point(0.895, 3.0), point(0.89, 2.0), point(0.8, 1.0)]
    found = [most_saved(points, 0.9, loss) for loss in (0.0, 0.005, 0.01)]
    assert [at.mean_exit_layer for at in found if at] == [5.0, 3.0, 2.0]
    assert most_saved(points, 0.95, 0.01) is None
    # Of equal depth the better score.
    assert most_saved([point(0.9, 3.0), point(0.95, 3.0)], 0.9, 0.0) == point(0.95, 3.0)


def test_a_row_per_reward() -> None:
    row = reward_row([point(0.90, 3.0, 0.2), point(0.892, 1.5, 0.4)], 0.9, 6)
    assert row["no_loss"]["saved_layers"] == 0.5 and row["no_loss"]["alpha"] == 0.2
    assert row["within_1"]["saved_layers"] == 0.75
    assert reward_row([point(0.5, 1.0)], 0.9, 6)["no_loss"] is None


def test_alphas_around_the_runs_own() -> None:
    assert default_alphas("vanilla", 0.3) == (0.0375, 0.075, 0.15, 0.3, 0.6, 1.2)
    assert default_alphas("correctness", 0.03) == default_alphas("hardness", 0.3)
    assert default_alphas("vanilla", 0.0)[3] == 0.1
    assert prices_of("vanilla", (0.1, 0.3)) == (0.1, 0.3)
    assert prices_of("correctness", (0.1, 0.3)) == (0.01, 0.03)
