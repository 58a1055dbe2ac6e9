"""RLlib's own algorithms in a Ray session: every block is learnt from, DQN repeats itself, actors serve all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rllib_stores import heads, random_store, reward_table, solvable_store

from rl_exit.envs.state_store import StateStore
from rl_exit.method import threshold_exit
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, build_algorithm, train_policy

pytestmark = pytest.mark.ray

QUICK = PolicyPhaseSettings(
    algorithm="dqn", epochs=1, batch_size=32, trajectories=4, reward="vanilla", alpha=0.05, width=16, epsilon=0.5
)


@pytest.fixture(scope="module", autouse=True)
def one_thread(local_ray: None) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the actors: then sums are taken in the same order
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    return random_store(tmp_path_factory.mktemp("stock") / "store")


@pytest.mark.parametrize("name", ["impala", "appo", "dqn"])
def test_an_update_follows_every_block(store: StateStore, name: str) -> None:
    algo = build_algorithm(store.path, replace(QUICK, algorithm=name))
    algo.load_policy(heads(store).state_dict())
    before = algo.policy_weights()
    for iteration in range(3):
        algo.train()
        after = algo.policy_weights()
        assert not torch.equal(after["weight_in"], before["weight_in"]), f"iteration {iteration} has changed nothing"
        assert algo.iteration_metrics["trajectories"] == 32 * 4
        runner = algo.env_runner.module.policy_weights()
        assert all(torch.equal(value, runner[key]) for key, value in after.items())
        before = after
    assert algo.finished and algo.epochs_done == 1.0
    algo.stop()


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("impala", "appo")), "dqn"])
def test_runner_and_learner_as_actors(store: StateStore, name: str) -> None:
    start = heads(store).state_dict()
    result = train_policy(store.path, start, replace(QUICK, algorithm=name, num_env_runners=1, num_learners=1))
    assert not torch.equal(result.weights["weight_in"], start["weight_in"])
    assert all(np.isfinite(row["return"]) for row in result.rows)


def test_same_seed_same_weights_and_a_fresh_buffer_for_every_phase(store: StateStore) -> None:
    start = heads(store).state_dict()
    algo = build_algorithm(store.path, QUICK)
    assert len(algo.local_replay_buffer) == 0
    algo.train()
    assert len(algo.local_replay_buffer) == 32
    algo.stop()
    first = train_policy(store.path, start, QUICK)
    torch.manual_seed(99)
    second = train_policy(store.path, start, QUICK)
    other = train_policy(store.path, start, replace(QUICK, seed=1))
    assert all(torch.equal(value, second.weights[name]) for name, value in first.weights.items())
    assert not torch.equal(first.weights["weight_in"], other.weights["weight_in"])
    assert first.rows[0]["epsilon"] == 0.5


def greedy_share(store: StateStore, weights: dict[str, torch.Tensor]) -> float:
    """As ``share_of_best``, of the policy that leaves where pi > 0.5."""
    policy = heads(store)
    policy.load_state_dict(weights)
    table = reward_table(store)
    with torch.no_grad():
        layer = threshold_exit(policy(store.states(store.rows)).sigmoid())
    reached = table.gather(1, layer.unsqueeze(1) - 1).mean()
    best, anywhere = table.max(1).values.mean(), table.mean()
    return float((reached - anywhere) / (best - anywhere))


@pytest.mark.parametrize(("runner", "least"), [("columnar", 0.95), pytest.param("rllib", 0.8, marks=pytest.mark.slow)])
def test_finds_the_known_best_exits(tmp_path: Path, runner: Any, least: float) -> None:
    store = solvable_store(tmp_path / "store", count=64, layers=3)
    start = heads(store).state_dict()
    settings = replace(
        QUICK, runner=runner, alpha=0.0, epochs=40 if runner == "columnar" else 10, trajectories=8, lr=2e-2
    )
    result = train_policy(store.path, start, settings)
    assert greedy_share(store, start) < 0.6
    assert greedy_share(store, result.weights) > least
    assert all(np.isfinite(row["return"]) for row in result.rows)
