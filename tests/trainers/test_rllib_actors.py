"""Runners and learners as Ray actors: the same result as in one process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from rllib_stores import heads, random_store, share_of_best, solvable_store

from rl_exit.envs.state_store import StateStore
from rl_exit.trainers import policy_phase
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, PolicyProgress, build_algorithm, train_policy

pytestmark = pytest.mark.ray

QUICK = PolicyPhaseSettings(
    epochs=1, batch_size=32, trajectories=4, reward="vanilla", alpha=0.05, width=16, epsilon=0.2, minibatch_size=16
)


@pytest.fixture(scope="module", autouse=True)
def one_thread(local_ray: None) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the actors: then sums are taken in the same order
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    return random_store(tmp_path_factory.mktemp("store") / "store")


@pytest.mark.parametrize(("algorithm", "numbers"), [("pg", (1, 2)), ("ppo", (2,))])
def test_any_number_of_runners_gives_the_same_weights(
    store: StateStore, algorithm: str, numbers: tuple[int, ...]
) -> None:
    start = heads(store).state_dict()
    alone = train_policy(store.path, start, replace(QUICK, algorithm=algorithm))
    for number in numbers:
        spread = train_policy(store.path, start, replace(QUICK, algorithm=algorithm, num_env_runners=number))
        assert all(torch.equal(value, spread.weights[name]) for name, value in alone.weights.items())
        assert [row["return"] for row in spread.rows] == [row["return"] for row in alone.rows]


@pytest.mark.parametrize("algorithm", ["pg", pytest.param("ppo", marks=pytest.mark.slow)])
def test_two_learners_hold_equal_weights_and_learn_as_one(store: StateStore, algorithm: str) -> None:
    # 96 instances in batches of 36: the last update has 24; minibatches of a whole batch, so that their make-up agrees.
    settings = replace(QUICK, algorithm=algorithm, batch_size=36, minibatch_size=64, num_learners=2)
    algo = build_algorithm(store.path, settings)
    algo.load_policy(heads(store).state_dict())
    while not algo.finished:
        algo.train()
    states = [
        result.get()
        for result in algo.learner_group.foreach_learner(lambda learner: learner.exit_module.policy_weights())
    ]
    algo.stop()
    assert len(states) == 2
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    alone = train_policy(store.path, heads(store).state_dict(), replace(settings, num_learners=0))
    for name, value in alone.weights.items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(states[0]["weight_in"], heads(store).weight_in, rtol=1e-4, atol=1e-5)


def test_a_runner_that_dies_changes_nothing(store: StateStore) -> None:
    start = heads(store).state_dict()
    settings = replace(QUICK, num_env_runners=2, epochs=2)
    alone = train_policy(store.path, start, replace(settings, num_env_runners=0))
    algo = build_algorithm(store.path, settings)
    algo.load_policy(start)
    algo.train()
    ray.kill(algo.env_runner.pool.actors[0], no_restart=False)
    started = time.monotonic()
    while not algo.finished:
        algo.train()
    weights = algo.policy_weights()
    algo.stop()
    assert time.monotonic() - started < 120
    assert all(torch.equal(value, weights[name]) for name, value in alone.weights.items())


@pytest.mark.slow
def test_a_learner_that_dies_changes_nothing(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    start = heads(store).state_dict()
    # Minibatches in a seeded order, and trajectories drawn ahead: all of it must be as it was.
    settings = replace(QUICK, algorithm="ppo", num_env_runners=1, num_learners=1, overlap=True, epochs=3)
    whole = train_policy(store.path, start, settings)
    built: list[Any] = []
    build = policy_phase.build_algorithm
    monkeypatch.setattr(policy_phase, "build_algorithm", lambda *args: built.append(build(*args)) or built[-1])
    told: list[int] = []

    def kill(at: PolicyProgress) -> None:
        told.append(at.step)
        if at.step == 4:
            (pid,) = [result.get() for result in built[-1].learner_group.foreach_learner(lambda _: os.getpid())]
            os.kill(pid, signal.SIGKILL)

    again = train_policy(store.path, start, settings, kill)
    assert len(built) == 2
    assert told == list(range(1, 10))  # nothing twice, nothing left out
    assert all(torch.equal(value, again.weights[name]) for name, value in whole.weights.items())
    assert [row["return"] for row in again.rows] == [row["return"] for row in whole.rows]


@pytest.mark.slow
def test_stock_ppo_on_the_plain_environment_learns(tmp_path: Path) -> None:
    store = solvable_store(tmp_path / "store", count=64, layers=3)
    start = heads(store).state_dict()
    settings = replace(
        QUICK,
        algorithm="ppo",
        runner="rllib",
        alpha=0.0,
        epochs=40,
        batch_size=64,
        trajectories=4,
        minibatch_size=64,
        lr=1e-2,
        envs_per_runner=64,
        epsilon=0.1,
    )
    result = train_policy(store.path, start, settings)
    assert share_of_best(store, start) < 0.3
    assert share_of_best(store, result.weights) > 0.8
    assert all(np.isfinite(row["return"]) for row in result.rows)


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "number"), [("impala", 1), ("appo", 0)])
def test_stock_algorithms_learn_from_block_episodes(tmp_path: Path, algorithm: str, number: int) -> None:
    store = solvable_store(tmp_path / "store", count=64, layers=3)
    start = heads(store).state_dict()
    settings = replace(
        QUICK, algorithm=algorithm, alpha=0.0, epochs=60, trajectories=8, lr=2e-2, epsilon=0.1, num_env_runners=number
    )
    result = train_policy(store.path, start, settings)
    assert share_of_best(store, start) < 0.3
    assert share_of_best(store, result.weights) > 0.8
