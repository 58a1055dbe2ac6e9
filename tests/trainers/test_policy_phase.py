"""The policy phase as a whole: it learns, it repeats itself, it says what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from rllib_stores import heads, random_store, reward_table, share_of_best, solvable_store

from rl_exit.envs.state_store import StateStore
from rl_exit.errors import ConfigError, RunError
from rl_exit.method import expected_return
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.policy_phase import (
    PolicyPhaseSettings,
    PolicyProgress,
    build_algorithm,
    collapse_warnings,
    train_policy,
)
from rl_exit.trainers.rllib.registry import algorithm_class, algorithms
from rl_exit.trainers.rllib.settings import checked

QUICK = PolicyPhaseSettings(
    epochs=2, batch_size=32, trajectories=4, reward="vanilla", alpha=0.05, width=16, epsilon=0.2, minibatch_size=16
)
LEARN = replace(QUICK, epochs=40, batch_size=64, trajectories=8, alpha=0.0, lr=1e-2, epsilon=0.1, minibatch_size=64)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    return random_store(tmp_path_factory.mktemp("random") / "store")


@pytest.fixture(scope="module")
def solvable(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    return solvable_store(tmp_path_factory.mktemp("solvable") / "store")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("algorithm", ["pg", "ppo", "exact"])
def test_finds_the_known_best_exits(solvable: StateStore, algorithm: str, seed: int) -> None:
    start = heads(solvable, seed=seed).state_dict()
    assert share_of_best(solvable, start) < 0.3
    result = train_policy(solvable.path, start, replace(LEARN, algorithm=algorithm, seed=seed))
    assert share_of_best(solvable, result.weights) > 0.99


@pytest.mark.parametrize("algorithm", ["pg", "ppo", "exact"])
def test_same_seed_same_weights(store: StateStore, algorithm: str) -> None:
    start = heads(store).state_dict()
    settings = replace(QUICK, algorithm=algorithm)
    first = train_policy(store.path, start, settings)
    torch.manual_seed(99)  # the state of the global generators does not matter
    second = train_policy(store.path, start, settings)
    assert _same(first.weights, second.weights)
    assert not _same(first.weights, start)
    if algorithm != "exact":
        assert not _same(first.weights, train_policy(store.path, start, replace(settings, seed=1)).weights)


def test_neither_starts_ray_nor_touches_generators_or_home(
    store: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    if ray.is_initialized():
        pytest.skip("another test has started Ray in this process")
    monkeypatch.setenv("HOME", str(tmp_path))
    before = torch.random.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    train_policy(store.path, heads(store).state_dict(), QUICK)
    torch.manual_seed(0)
    heads(store)
    assert not ray.is_initialized()
    assert (np.random.get_state()[1] == numpy_state).all()
    assert list(tmp_path.iterdir()) == []
    assert before is not None


@pytest.mark.parametrize("algorithm", ["pg", "ppo", "exact"])
def test_reports_progress(store: StateStore, algorithm: str) -> None:
    seen: list[PolicyProgress] = []
    result = train_policy(store.path, heads(store).state_dict(), replace(QUICK, algorithm=algorithm), seen.append)
    assert [at.step for at in seen] == list(range(1, 7))
    assert seen[-1].epoch == 2.0
    assert [row["return"] for row in result.rows] == [at.metrics["return"] for at in seen]
    for at in seen:
        shares = [at.metrics[f"exits_{layer}"] for layer in range(1, 6)]
        assert sum(shares) == pytest.approx(1.0)
        assert at.metrics["mean_exit_layer"] == pytest.approx(sum(i * share for i, share in enumerate(shares, 1)))
        assert 0 < at.metrics["entropy"] <= np.log(5)
        assert at.metrics["grad_norm"] > 0
        assert at.metrics["kl"] > 0
        assert ("explained_variance" in at.metrics) == (algorithm == "ppo")
    assert seen[0].metrics["epsilon"] == pytest.approx(0.2)
    assert seen[-1].metrics["epsilon"] == pytest.approx(0.0)


def test_the_step_is_the_schedules_not_the_iterations(store: StateStore) -> None:
    start = heads(store).state_dict()
    more = train_policy(store.path, start, replace(QUICK, batch_size=4))
    assert len(more.rows) == 16  # 24 updates an epoch, 3 an iteration
    assert [row["step"] for row in more.rows[:3]] == [3.0, 6.0, 9.0]


@pytest.mark.parametrize("algorithm", ["pg", "ppo", "exact"])
def test_shared_heads_find_the_best_exits_too(solvable: StateStore, algorithm: str) -> None:
    start = PolicyHeads(solvable.num_layers, solvable.hidden_size, 16, shared=True).state_dict()
    result = train_policy(solvable.path, start, replace(LEARN, algorithm=algorithm, shared=True))
    assert len(result.weights["weight_in"]) == 1
    judge = PolicyHeads(solvable.num_layers, solvable.hidden_size, 16, shared=True)
    judge.load_state_dict(result.weights)
    table = reward_table(solvable)
    with torch.no_grad():
        reached = float(expected_return(judge(solvable.states(solvable.rows)), table).mean())
    best, uniform = float(table.max(1).values.mean()), float(table.mean())
    assert (reached - uniform) / (best - uniform) > 0.9


@pytest.mark.parametrize("algorithm", ["pg", "ppo", "exact"])
def test_a_rate_that_falls_to_zero_comes_to_rest(store: StateStore, algorithm: str) -> None:
    start = heads(store).state_dict()
    settings = replace(QUICK, algorithm=algorithm, lr_final=0.0)
    algo = build_algorithm(store.path, settings)
    algo.load_policy(start)
    seen = []
    while not algo.finished:
        algo.train()
        learner = checked(algo.learner_group.foreach_learner(lambda learner: learner))[0]
        seen.append(learner.get_optimizers_for_module(DEFAULT_MODULE_ID)[0][1].param_groups[0]["lr"])
    algo.stop()
    # The rate of each iteration is that of its beginning.
    assert seen == pytest.approx([settings.lr * (1 - k / len(seen)) for k in range(len(seen))])
    constant = train_policy(store.path, start, replace(settings, lr_final=None))
    assert _same(constant.weights, train_policy(store.path, start, replace(settings, lr_final=settings.lr)).weights)
    assert not _same(constant.weights, train_policy(store.path, start, settings).weights)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"exits_1": 0.995, "exits_2": 0.005, "exits_3": 0.0, "entropy": 0.02}, "leave at layer 1"),
        ({"exits_1": 0.0, "exits_2": 0.005, "exits_3": 0.995, "entropy": 0.02}, "never leaves"),
        ({"exits_1": 0.5, "exits_2": 0.5, "exits_3": 0.0, "entropy": 1e-5}, "nearly deterministic"),
        ({"exits_1": 0.5, "exits_2": 0.4, "exits_3": 0.1, "entropy": 0.5}, None),
    ],
)
def test_collapse_is_told_in_words(row: dict[str, float], expected: str | None) -> None:
    warnings = list(collapse_warnings([row], QUICK))
    assert [expected in text for text in warnings] == ([True] if expected else [])


def test_a_price_that_is_too_high_collapses_and_says_so(store: StateStore) -> None:
    settings = replace(QUICK, alpha=50.0, epochs=60, lr=3e-2, epsilon=0.0)
    result = train_policy(store.path, heads(store).state_dict(), settings)
    assert result.rows[-1]["mean_exit_layer"] < 1.05
    assert "reward.alpha" in result.warnings[0]


def test_gradients_that_are_not_finite_stop_the_phase(store: StateStore) -> None:
    start = heads(store).state_dict()
    start["bias_out"] = torch.full_like(start["bias_out"], float("nan"))
    with pytest.raises(RunError, match="not finite in epoch 1, update 1"):
        train_policy(store.path, start, QUICK)


def test_bad_input(store: StateStore, tmp_path: Path) -> None:
    start = heads(store).state_dict()
    with pytest.raises(ConfigError, match="Did you mean 'ppo'"):
        train_policy(store.path, start, replace(QUICK, algorithm="pppo"))
    with pytest.raises(ConfigError, match="cannot be imported"):
        train_policy(store.path, start, replace(QUICK, algorithm="nowhere.Algorithm"))
    with pytest.raises(ConfigError, match="a subclass of"):
        train_policy(store.path, start, replace(QUICK, algorithm="rl_exit.errors.RunError"))
    with pytest.raises(RunError, match="no such state store"):
        train_policy(tmp_path / "absent", start, QUICK)


def test_registry_names_and_dotted_paths() -> None:
    for info in algorithms():
        assert algorithm_class(info.name) is algorithm_class(info.path)
        assert info.good_for
    defaults: dict[str, Any] = vars(algorithm_class("ppo").get_default_config())
    assert defaults["critic"] is True
