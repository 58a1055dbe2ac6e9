from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rl_exit.envs import CONTINUE, ENV_ID, EXIT, EarlyExitEnv, StateBlock, StateStore, check_early_exit_env
from rl_exit.envs.episode import Epochs
from rl_exit.errors import RunError

UNBOUNDED = "ignore:.*A Box observation space (minimum|maximum) value.*"


def play(env: EarlyExitEnv, row: int, exit_layer: int) -> tuple[list[Any], list[float], dict[str, Any]]:
    observation, info = env.reset(options={"instance": row})
    layers, gains = [int(observation["layer"])], []
    ended = False
    while not ended:
        action = EXIT if layers[-1] == exit_layer else CONTINUE
        observation, reward, ended, _, info = env.step(action)
        layers.append(int(observation["layer"]))
        gains.append(reward)
    return layers, gains, info


@pytest.fixture
def known(make_store) -> StateStore:
    """One instance worked by hand: L=3, right at 2 and 3, so m=2."""
    return make_store(
        StateBlock(
            ids=np.array([77]),
            labels=np.array([1]),
            losses=np.array([[1.5, 0.5, 0.25]], dtype=np.float32),
            correct=np.array([[False, True, True]]),
            logits=np.zeros((1, 3, 2), dtype=np.float32),
            states=np.arange(6, dtype=np.float32).reshape(1, 3, 2),
        )
    )


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("vanilla", (-1.8, -1.1, -1.15)),  # -CE - 0.3 l
        ("correctness", (-0.3, 0.4, 0.1)),  # [right] - 0.3 l
        ("hardness", (-1.6, -0.7, -0.55)),  # -CE - 0.3 (1 - 2/3) l
    ],
)
def test_an_episode_worked_by_hand(known: StateStore, reward: str, expected: tuple[float, ...]) -> None:
    env = EarlyExitEnv(known, reward, alpha=0.3)
    seen = [
        (([1, 1], [expected[0]]), (1, 1.5, False, False)),
        (([1, 2, 2], [0.0, expected[1]]), (2, 0.5, True, False)),
        (([1, 2, 3], [0.0, expected[2]]), (3, 0.25, True, True)),  # Continue at L-1 leaves at L: no action at L
    ]
    for exit_layer, ((layers, gains), (at, loss, correct, forced)) in enumerate(seen, start=1):
        got_layers, got_gains, info = play(env, 0, exit_layer)
        assert got_layers == layers
        assert got_gains == pytest.approx(gains, abs=1e-6)
        end = {"exit_layer": at, "loss": loss, "correct": correct, "forced": forced, "memorized": 2}
        assert info == {"instance": 0, "id": 77, "layer": at} | end


def test_states_come_in_order_and_are_the_callers(known: StateStore) -> None:
    env = EarlyExitEnv(known)
    first, _ = env.reset()
    second, *_ = env.step(CONTINUE)
    assert first["state"].tolist() == [0.0, 1.0] and second["state"].tolist() == [2.0, 3.0]
    second["state"][:] = -1
    assert known.states([0])[0, 1].tolist() == [2.0, 3.0]


@pytest.mark.filterwarnings(UNBOUNDED, "ignore:.*alternative render modes.*")
@pytest.mark.parametrize("reward", ["hardness", "vanilla", "correctness", "fidelity"])
def test_gymnasiums_checker_and_ours(store: StateStore, reward: str) -> None:
    check_env(EarlyExitEnv(store, reward))
    check_early_exit_env(EarlyExitEnv(store, reward, alpha=0.2))


@pytest.mark.filterwarnings(UNBOUNDED)
def test_the_registered_environment_passes_too(store: StateStore) -> None:
    env = gymnasium.make(ENV_ID, source=str(store.path), alpha=0.2)
    check_env(env.unwrapped)
    check_early_exit_env(env)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_storage_passes(make_store, block, dtype: str) -> None:
    check_early_exit_env(EarlyExitEnv(make_store(block, dtype=dtype)))


def test_some_shards_only(store: StateStore) -> None:
    env = EarlyExitEnv(StateStore.open(store.path, shards=[0, 2]))
    check_early_exit_env(env)
    drawn = [env.reset()[1]["instance"] for _ in range(13)]
    assert sorted(drawn) != drawn
    with pytest.raises(ValueError, match=r"instance'\] = 9; accepted: 0..19 \(13 of them mapped\)"):
        env.reset(options={"instance": 9})


def test_each_pass_takes_every_instance_once_in_a_new_order(store: StateStore) -> None:
    env = EarlyExitEnv(store)
    drawn = [env.reset(seed=5)[1]["instance"]] + [env.reset()[1]["instance"] for _ in range(59)]
    passes = [drawn[:20], drawn[20:40], drawn[40:]]
    assert all(sorted(one) == list(range(20)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert [env.reset(seed=5)[1]["instance"], env.reset()[1]["instance"]] == drawn[:2]


def test_a_chosen_instance_leaves_the_pass_where_it_is(store: StateStore) -> None:
    env = EarlyExitEnv(store)
    plain = [env.reset(seed=5)[1]["instance"], env.reset()[1]["instance"]]
    mixed = [env.reset(seed=5)[1]["instance"]]
    assert env.reset(options={"instance": 3})[1]["instance"] == 3
    assert [*mixed, env.reset()[1]["instance"]] == plain


def test_draws_of_several_cross_the_end_of_a_pass() -> None:
    epochs, generator = Epochs(np.arange(5)), np.random.default_rng(0)
    drawn = np.concatenate([epochs.draw(count, generator) for count in (3, 4, 8)])
    assert all(sorted(drawn[i : i + 5]) == [0, 1, 2, 3, 4] for i in (0, 5, 10))


@pytest.mark.parametrize("value", [20, -1, "0", 1.0, True, None, [1]])
def test_instances_that_are_not_there(store: StateStore, value: Any) -> None:
    with pytest.raises(ValueError, match=r"options\['instance'\] = "):
        EarlyExitEnv(store).reset(options={"instance": value})


def test_misuse(store: StateStore) -> None:
    env = EarlyExitEnv(store)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(EXIT)
    with pytest.raises(ValueError, match=r"reset options \['row'\]; accepted: instance"):
        env.reset(options={"row": 1})
    env.reset()
    with pytest.raises(ValueError, match=r"action 2; accepted: 0 \(Continue\), 1 \(Exit\)"):
        env.step(2)
    env.step(EXIT)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(EXIT)


def test_rewards_that_cannot_be(store: StateStore) -> None:
    with pytest.raises(ValueError, match=r"'hardnes' is unknown. Did you mean 'hardness'"):
        EarlyExitEnv(store, "hardnes")
    for alpha in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="accepted: a finite number of at least 0"):
            EarlyExitEnv(store, alpha=alpha)


def test_a_path_that_is_no_store(tmp_path) -> None:
    with pytest.raises(RunError, match="no such state store"):
        EarlyExitEnv(tmp_path / "nowhere")


def test_a_reward_of_ones_own(known: StateStore) -> None:
    env = EarlyExitEnv(known, lambda outcome: 10.0 * outcome.correct - outcome.exit_layer)
    assert [play(env, 0, exit_layer)[1][-1] for exit_layer in (1, 2, 3)] == [-1.0, 8.0, 7.0]
    check_early_exit_env(env)
