"""Episodes made from blocks are those of the environment, and RLlib's own algorithms learn from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ray.rllib.core.columns import Columns
from rllib_stores import heads, random_store

from rl_exit.envs.episode import EarlyExitEnv
from rl_exit.method import explore
from rl_exit.trainers.rllib.episodes import EpisodeEnvRunner
from rl_exit.trainers.rllib.registry import algorithm_class


@pytest.mark.parametrize("name", ["impala", "appo"])
def test_episodes_replay_in_the_environment(tmp_path: Path, name: str) -> None:
    store = random_store(tmp_path / "store", count=24, layers=4)
    config = algorithm_class(name).get_default_config().open_store(store.path)
    config.exits(trajectories=3, batch_size=8, reward="hardness", alpha=0.07, width=16, epochs=1).columnar()
    runner = EpisodeEnvRunner(config=config, worker_index=1, num_workers=1)
    policy = heads(store)
    runner.module.load_policy(policy.state_dict())
    runner.module.epsilon.fill_(0.25)
    env = EarlyExitEnv(store.path, reward="hardness", alpha=0.07)
    rows_of = {store.states([row])[0, 0].tobytes(): row for row in range(24)}
    seen: list[int] = []
    for _ in range(3):  # an epoch
        for episode in runner.sample():
            observations = episode.get_observations()
            row = rows_of[observations["state"][0].tobytes()]
            seen.append(row)
            observation, _info = env.reset(options={"instance": row})
            for step in range(len(episode)):
                np.testing.assert_array_equal(observations["state"][step], observation["state"])
                assert observations["layer"][step] == observation["layer"]
                layer = int(observation["layer"])
                with torch.no_grad():
                    pi = explore(policy.at(layer, observation["state"][None]).sigmoid(), 0.25)[0]
                action = int(episode.get_actions(step))
                log_prob = float(episode.get_extra_model_outputs(Columns.ACTION_LOGP)[step])
                assert log_prob == pytest.approx(float((pi if action else 1 - pi).log()), abs=1e-4)
                assert log_prob != pytest.approx(float((1 - pi if action else pi).log()), abs=1e-4)
                observation, reward, terminated, _, _info = env.step(action)
                assert episode.get_rewards(step) == pytest.approx(reward, rel=1e-6)
                assert terminated == (step == len(episode) - 1)
            np.testing.assert_array_equal(observations["state"][-1], observation["state"])
            assert observations["layer"][-1] == observation["layer"]
            assert episode.is_terminated
    assert sorted(seen) == sorted(list(range(24)) * 3)
