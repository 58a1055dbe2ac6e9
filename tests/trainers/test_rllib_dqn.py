"""DQN: Q-values and policy are one, behaviour is greedy but for the exploration, replay stays within the phase."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core.columns import Columns
from rllib_stores import heads, random_store

from rl_exit.envs.state_store import StateStore
from rl_exit.errors import ConfigError
from rl_exit.method import Trajectories, threshold_exit
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, build_algorithm
from rl_exit.trainers.rllib.dqn import StockDQNConfig, TrajectoryReplayBuffer
from rl_exit.trainers.rllib.episode_blocks import EpisodeBlock
from rl_exit.trainers.rllib.registry import algorithm_class

QUICK = PolicyPhaseSettings(
    algorithm="dqn", epochs=1, batch_size=32, trajectories=4, reward="vanilla", alpha=0.05, width=16, epsilon=0.5
)


def config(store: StateStore, **settings: Any) -> StockDQNConfig:
    found = algorithm_class("dqn").get_default_config().open_store(store.path)
    found.exits(trajectories=64, batch_size=8, reward="vanilla", alpha=0.0, width=16, epochs=1, **settings).columnar()
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    return random_store(tmp_path_factory.mktemp("dqn") / "store")


def test_exit_is_worth_more_exactly_where_the_policy_leaves(store: StateStore) -> None:
    module = config(store, temperature=0.2).get_multi_rl_module_spec().build()["default_policy"]
    torch.nn.init.normal_(module.policy.weight_out)
    torch.nn.init.normal_(module.critic.weight_out)
    state, layer = torch.randn(400, store.hidden_size), torch.randint(1, store.num_layers, (400,))
    values = module.compute_q_values({Columns.OBS: {"state": state, "layer": layer}})["qf_preds"]
    policy = PolicyHeads(store.num_layers, store.hidden_size, 16)
    policy.load_state_dict(module.policy_weights())
    logits = torch.stack([policy.at(int(at), one.unsqueeze(0))[0] for at, one in zip(layer, state, strict=True)])
    assert torch.equal(logits.sigmoid() > 0.5, values[:, 1] > values[:, 0])
    assert 0.2 < float((logits > 0).float().mean()) < 0.8
    torch.testing.assert_close((values[:, 1] - values[:, 0]) / 0.2, logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose((values[:, 1] - values[:, 0]) / 0.21, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 0.4])
def test_behaviour_is_greedy_but_for_the_exploration(store: StateStore, epsilon: float) -> None:
    settings = config(store)
    runner = settings.env_runner_cls(config=settings, worker_index=1, num_workers=1)
    policy = heads(store)
    torch.nn.init.normal_(policy.weight_out)
    runner.module.load_policy(policy.state_dict())
    runner.module.epsilon.fill_(epsilon)
    (block,) = runner.sample()
    with torch.no_grad():
        pi = policy(store.states(block.trajectories.instance)).sigmoid()
    np.testing.assert_allclose(block.behaviour, (1 - epsilon) * (pi > 0.5).numpy() + epsilon / 2, atol=1e-6)
    exits = block.trajectories.exit_layer
    if epsilon == 0.0:
        assert (exits == threshold_exit(pi).numpy()[:, None]).all()
        assert len(np.unique(exits)) > 1
    else:
        first = (exits == 1).mean(1)
        wanted = block.behaviour[:, 0]
        assert (np.abs(first - wanted) < 4.5 * np.sqrt(wanted * (1 - wanted) / 64)).all()
        assert not (np.abs(first - wanted.mean()) < 0.1).all()


def block_of(instances: range, exits: int, number: int = 2) -> EpisodeBlock:
    rows = np.array(instances, dtype=np.int32)
    shape = (len(rows), number)
    drawn = Trajectories(
        rows, np.full(shape, exits, np.uint8), np.zeros(shape, np.float32), np.full(shape, -exits, np.float32)
    )
    return EpisodeBlock(drawn, np.full((len(rows), 3), 0.5, np.float32))


def test_the_buffer_forgets_the_oldest_and_repeats_itself() -> None:
    buffer = TrajectoryReplayBuffer(10, 2, 4, seed=3)
    buffer.add([block_of(range(6), 1), block_of(range(6, 12), 2)])
    assert len(buffer) == 10
    (drawn,) = buffer.sample(2000)
    assert set(drawn.trajectories.instance) == set(range(2, 12))
    counts = np.bincount(drawn.trajectories.instance)[2:]
    assert (np.abs(counts - 200) < 5 * np.sqrt(200)).all()
    assert (drawn.trajectories.exit_layer[:, 0] == np.where(drawn.trajectories.instance < 6, 1, 2)).all()
    assert (drawn.trajectories.reward == -drawn.trajectories.exit_layer.astype(np.float32)).all()
    other = TrajectoryReplayBuffer(10, 2, 4, seed=3)
    other.add([block_of(range(6), 1), block_of(range(6, 12), 2)])
    assert (other.sample(2000)[0].trajectories.instance == drawn.trajectories.instance).all()
    assert (other.sample(2000)[0].trajectories.instance != drawn.trajectories.instance).any()


def test_several_learners_are_refused(store: StateStore) -> None:
    with pytest.raises(ConfigError, match="num_learners is 2; algorithm=dqn"):
        build_algorithm(store.path, replace(QUICK, num_learners=2))
