"""The plain route: stock runner on the environment, against the columnar runner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rllib_stores import heads, random_store, reward_table, share_of_best, solvable_store

from rl_exit.envs.state_store import StateStore
from rl_exit.errors import ConfigError
from rl_exit.method import exit_distribution, explore
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, build_algorithm, train_policy
from rl_exit.trainers.rllib.algorithm import ExitAlgorithm

PLAIN = PolicyPhaseSettings(
    epochs=1, batch_size=8, trajectories=8, reward="vanilla", alpha=0.05, width=16, runner="rllib", envs_per_runner=60
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    return random_store(tmp_path_factory.mktemp("store") / "store", count=8)


def _runner(store: StateStore, **settings: Any) -> tuple[ExitAlgorithm, Any]:
    algorithm = build_algorithm(store.path, replace(PLAIN, **settings))
    algorithm.load_policy(heads(store).state_dict())
    return algorithm, algorithm.env_runner


def test_plain_and_columnar_routes_agree_in_distribution(store: StateStore) -> None:
    algorithm, runner = _runner(store)
    epsilon, rounds = 0.2, 25
    counts = np.zeros((8, 5))
    for epoch in range(rounds):
        ((_, drawn),) = runner.sample(blocks=algorithm.plan.blocks(epoch, 0), epsilon=epsilon)
        assert sorted(drawn.instance) == list(range(8))
        for row, exits in zip(drawn.instance, drawn.exit_layer, strict=True):
            counts[row] += np.bincount(exits, minlength=6)[1:]
    with torch.no_grad():
        pi = heads(store)(store.states(np.arange(8))).sigmoid().double()
    chance = exit_distribution(explore(pi, epsilon)).numpy()
    number = rounds * 8
    assert (counts.sum(1) == number).all()

    def chi_square(probability: np.ndarray) -> float:
        return float(((counts - number * probability) ** 2 / (number * probability)).sum())

    # 8 * 4 degrees of freedom: mean 32, standard deviation 8.
    assert chi_square(chance) < 32 + 5 * 8
    assert chi_square(exit_distribution(explore(pi, 0.6)).numpy()) > 32 + 10 * 8
    # What is known of a trajectory is the same, too.
    index = drawn.exit_layer.astype(int) - 1
    np.testing.assert_allclose(
        drawn.reward,
        np.take_along_axis(reward_table(store, "vanilla", 0.05).numpy()[drawn.instance], index, 1),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        drawn.log_prob, np.log(np.take_along_axis(chance[drawn.instance], index, 1)), rtol=1e-4, atol=1e-5
    )
    algorithm.stop()


def test_a_plain_block_repeats_itself(store: StateStore) -> None:
    algorithm, runner = _runner(store)
    first, other, again = (
        runner.sample(blocks=algorithm.plan.blocks(epoch, 0), epsilon=0.1)[0][1] for epoch in (0, 1, 0)
    )
    for name, column in vars(first).items():
        np.testing.assert_array_equal(column, getattr(again, name))
    assert (first.exit_layer != other.exit_layer).any()
    algorithm.stop()


def test_pg_learns_on_the_plain_route(tmp_path: Path) -> None:
    store = solvable_store(tmp_path / "store", count=32, layers=3)
    start = heads(store).state_dict()
    settings = replace(PLAIN, alpha=0.0, epochs=12, lr=3e-2, batch_size=32, envs_per_runner=256)
    result = train_policy(store.path, start, settings)
    assert share_of_best(store, start) < 0.3
    assert share_of_best(store, result.weights) > 0.8


def test_fewer_environments_than_trajectories_are_refused(store: StateStore) -> None:
    with pytest.raises(ConfigError, match=r"sampling.envs_per_runner is 4"):
        build_algorithm(store.path, replace(PLAIN, envs_per_runner=4))
