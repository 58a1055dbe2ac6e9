from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rl_exit.envs import ENV_ID, EarlyExitEnv, EarlyExitVectorEnv, Outcome, StateStore


class Scripted(EarlyExitEnv):
    """A scalar environment that takes the instances it is told."""

    def __init__(self, store: StateStore, rows: list[int], **settings: Any) -> None:
        super().__init__(store, **settings)
        self.script = iter(rows)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=seed, options={"instance": next(self.script)})


def own_reward(outcome: Outcome) -> float:
    return float(outcome.logits[outcome.label]) - 0.1 * outcome.exit_layer + outcome.correct + outcome.id * 1e-3


def run(env: Any, actions: np.ndarray) -> list[Any]:
    return [(*env.reset(seed=3),), *(env.step(action) for action in actions)]


def assert_same(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, tuple):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_same(left, right)
    else:
        assert one.dtype == two.dtype and np.array_equal(one, two)


@pytest.mark.parametrize("reward", ["hardness", "vanilla", "correctness", "fidelity", own_reward])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shard_size", "num_envs"), [(7, 1), (50, 5), (7, 5), (3, 30)])
def test_equals_scalar_environments_step_by_step(
    make_store, block, shard_size: int, num_envs: int, reward: Any, dtype: str
) -> None:
    store = make_store(block, shard_size=shard_size, dtype=dtype)
    settings = {"reward": reward, "alpha": 0.2}
    env = EarlyExitVectorEnv(num_envs, store, **settings)
    actions = (np.random.default_rng(0).random((60, num_envs)) < 0.3).astype(np.int64)
    steps = run(env, actions)
    scripts: list[list[int]] = [[] for _ in range(num_envs)]
    begins = np.ones(num_envs, dtype=bool)  # at the reset, and wherever the step before ended an episode
    for step in steps:
        for i in np.flatnonzero(begins):
            scripts[i].append(int(step[-1]["instance"][i]))
        begins = step[2] if len(step) == 5 else np.zeros(num_envs, dtype=bool)
    scalars = SyncVectorEnv([lambda rows=rows: Scripted(store, rows, **settings) for rows in scripts])
    assert scalars.metadata["autoreset_mode"] is env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert (scalars.observation_space, scalars.action_space) == (env.observation_space, env.action_space)
    assert (scalars.single_observation_space, scalars.single_action_space) == (
        env.single_observation_space,
        env.single_action_space,
    )
    for mine, theirs in zip(steps, run(scalars, actions), strict=True):
        assert_same(mine, theirs)
    assert sum(step[2].sum() for step in steps[1:]) > 5 * num_envs  # episodes did end and begin again
    assert all(step[0] in env.observation_space for step in steps)


def test_one_pass_is_shared(store: StateStore) -> None:
    env = EarlyExitVectorEnv(5, store)
    drawn = env.reset(seed=1)[1]["instance"].tolist()
    while len(drawn) < 40:
        env.step(np.ones(5, dtype=np.int64))
        drawn += env.step(np.zeros(5, dtype=np.int64))[4]["instance"].tolist()
    assert sorted(drawn[:20]) == sorted(drawn[20:]) == list(range(20))
    assert drawn[:20] != drawn[20:]


def test_seeds(store: StateStore) -> None:
    env = EarlyExitVectorEnv(12, store)

    def order(seed: Any) -> list[int]:
        return env.reset(seed=seed)[1]["instance"].tolist()

    assert order(4) == order(4) != order(5)
    assert order([*range(12)]) == order([*range(12)]) != order([*range(1, 13)])
    order(4)
    assert order(None) != order(4)


def test_fixed_instances_hold_for_the_episodes_that_begin(store: StateStore) -> None:
    env = EarlyExitVectorEnv(3, store)
    observation, info = env.reset(options={"instances": [4, 19, 4]})
    assert info["instance"].tolist() == [4, 19, 4]
    assert np.array_equal(observation["state"], store.states([4, 19, 4])[:, 0])


@pytest.mark.parametrize("rows", [[1, 2], [1, 2, 20], [0, 1, -1], [0.0, 1.0, 2.0], 3])
def test_instances_that_are_not_there(store: StateStore, rows: Any) -> None:
    with pytest.raises(ValueError, match=r"options\['instances'\]"):
        EarlyExitVectorEnv(3, store).reset(options={"instances": rows})


@pytest.mark.parametrize("actions", [[0, 1], [0, 1, 2], [[0, 1, 0]], [0, 1, -1]])
def test_actions_that_are_none(store: StateStore, actions: Any) -> None:
    env = EarlyExitVectorEnv(3, store)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(3, dtype=np.int64))
    env.reset()
    with pytest.raises(ValueError, match=r"accepted: \[3\] of 0 \(Continue\) and 1 \(Exit\)"):
        env.step(np.array(actions))


def test_misuse(store: StateStore) -> None:
    with pytest.raises(ValueError, match="num_envs 0"):
        EarlyExitVectorEnv(0, store)
    with pytest.raises(ValueError, match="shards are chosen when a store is opened"):
        EarlyExitVectorEnv(2, store, shards=[0])
    with pytest.raises(ValueError, match=r"reset options \['instance'\]; accepted: instances"):
        EarlyExitVectorEnv(2, store).reset(options={"instance": 1})


def test_some_shards_only(store: StateStore) -> None:
    env = EarlyExitVectorEnv(13, store.path, shards=[0, 2])
    assert sorted(env.reset(seed=0)[1]["instance"].tolist()) == [*range(7), *range(14, 20)]


def test_what_it_returns_is_the_callers(store: StateStore) -> None:
    env, twin = EarlyExitVectorEnv(2, store), EarlyExitVectorEnv(2, store)
    for step in range(8):
        mine = env.reset(seed=0) if step == 0 else env.step(np.zeros(2, dtype=np.int64))
        theirs = twin.reset(seed=0) if step == 0 else twin.step(np.zeros(2, dtype=np.int64))
        assert_same(mine, theirs)
        for array in (*mine[0].values(), *mine[-1].values()):
            array[:] = 0


def test_made_by_gymnasium(store: StateStore) -> None:
    env = gymnasium.make_vec(ENV_ID, num_envs=4, source=str(store.path), reward="vanilla", alpha=0.1)
    assert isinstance(env, EarlyExitVectorEnv) and env.num_envs == 4
    observation, _ = env.reset(seed=0)
    assert observation["state"].shape == (4, 8)


@pytest.mark.ray
def test_rllibs_own_runner_takes_it(store: StateStore) -> None:
    pytest.importorskip("ray.rllib")
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.rllib.core.rl_module.torch import TorchRLModule
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
    from ray.tune.registry import register_env

    register_env("early-exit-vector", lambda config: EarlyExitVectorEnv(**config))
    config = (
        PPOConfig()
        .environment("early-exit-vector", env_config={"source": str(store.path), "alpha": 0.2})
        .env_runners(gym_env_vectorize_mode="vector_entry_point", num_envs_per_env_runner=4)
        .rl_module(rl_module_spec=RLModuleSpec(module_class=TorchRLModule))
        .debugging(seed=0)
    )
    runner = SingleAgentEnvRunner(config=config)
    episodes = runner.sample(num_episodes=30, random_actions=True)
    runner.stop()
    assert len(episodes) >= 30
    for episode in episodes:
        gains, layers = episode.get_rewards(), episode.get_observations()["layer"].tolist()
        end = episode.get_infos(-1)
        assert np.count_nonzero(gains[:-1]) == 0 and gains[-1] != 0
        assert layers[:-1] == [*range(1, len(layers))] and end["exit_layer"] == layers[-1]
        block = store.block([end["instance"]])
        last = -block.losses[0, layers[-1] - 1] - 0.2 * (1 - block.memorized()[0] / 4) * layers[-1]
        assert gains[-1] == pytest.approx(last, abs=1e-5)
