"""Blocks of episodes are RLlib's episodes in columns: the same rows, the same outputs of the module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core.columns import Columns
from rllib_stores import heads, random_store

from rl_exit.envs.state_store import StateStore
from rl_exit.trainers.rllib.dqn import QRows
from rl_exit.trainers.rllib.episode_blocks import BLOCK, BlockEnvRunner, EpisodeBlock, TrajectoryRows
from rl_exit.trainers.rllib.episodes import single_agent_episodes
from rl_exit.trainers.rllib.registry import algorithm_class

LAYERS, NUMBER = 4, 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    return random_store(tmp_path_factory.mktemp("blocks") / "store", count=24, layers=LAYERS)


def config(store: StateStore, name: str) -> Any:
    found = algorithm_class(name).get_default_config().open_store(store.path)
    found.exits(trajectories=NUMBER, batch_size=8, reward="hardness", alpha=0.07, width=16, epochs=1).columnar()
    return found


def draw(store: StateStore, name: str, epsilon: float = 0.25) -> tuple[BlockEnvRunner, EpisodeBlock]:
    settings = config(store, name)
    runner = settings.env_runner_cls(config=settings, worker_index=1, num_workers=1)
    runner.module.load_policy(heads(store).state_dict())
    runner.module.epsilon.fill_(epsilon)
    (block,) = runner.sample()
    return runner, block


def stepwise(store: StateStore, block: EpisodeBlock) -> list[dict[str, Any]]:
    """The rows as RLlib's own episode objects have them, one dict a step."""
    states = store.states(block.trajectories.instance)
    rows = []
    for episode in single_agent_episodes(block.trajectories, block.behaviour, states, (None, None)):
        seen = episode.get_observations()
        rows += [
            {
                "state": seen["state"][at],
                "layer": seen["layer"][at],
                "next_state": seen["state"][at + 1],
                "next_layer": seen["layer"][at + 1],
                Columns.ACTIONS: episode.get_actions(at),
                Columns.REWARDS: episode.get_rewards(at),
                Columns.ACTION_LOGP: episode.get_extra_model_outputs(Columns.ACTION_LOGP)[at],
                Columns.TERMINATEDS: episode.is_terminated and at == len(episode) - 1,
            }
            for at in range(len(episode))
        ]
    return rows


def column(rows: list[dict[str, Any]], name: str) -> torch.Tensor:
    return torch.as_tensor(np.array([row[name] for row in rows]))


@pytest.mark.parametrize("name", ["impala", "appo"])
def test_rows_are_those_of_rllibs_episodes(store: StateStore, name: str) -> None:
    _, block = draw(store, name)
    columns = TrajectoryRows(store_path=str(store.path)).rows([block])
    rows = stepwise(store, block)
    mask = columns[Columns.LOSS_MASK]
    assert len(mask) == len(block.trajectories) * LAYERS
    assert int(mask.sum()) == len(rows) == len(block)
    for key in (Columns.ACTIONS, Columns.REWARDS, Columns.ACTION_LOGP, Columns.TERMINATEDS):
        wanted = column(rows, key).to(columns[key].dtype)
        torch.testing.assert_close(columns[key][mask], wanted, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(columns[key][mask].float(), wanted.roll(1).float())
    states = columns[Columns.OBS][BLOCK].repeat_interleave(NUMBER, 0).flatten(0, 1)
    torch.testing.assert_close(states[mask], column(rows, "state"))
    # V-trace works on pieces of L rows: one episode each, and nothing flows in from behind its end.
    fragments = columns[Columns.TERMINATEDS].view(-1, LAYERS)
    assert (fragments.sum(1) == 1).all()
    assert not (mask.view(-1, LAYERS) & (fragments.cumsum(1) > 1)).any()


def test_the_module_reads_blocks_as_it_reads_steps(store: StateStore) -> None:
    _, block = draw(store, "appo")
    module = config(store, "appo").get_multi_rl_module_spec().build()["default_policy"]
    module.make_target_networks()
    columns = TrajectoryRows(store_path=str(store.path)).rows([block])
    rows = stepwise(store, block)
    single = {Columns.OBS: {"state": column(rows, "state"), "layer": column(rows, "layer")}}
    mask = columns[Columns.LOSS_MASK]
    outputs = {
        "policy": lambda batch: module._forward(batch)[Columns.ACTION_DIST_INPUTS],
        "value": module.compute_values,
        "target": lambda batch: next(iter(module.forward_target(batch).values())),
    }
    for output in outputs.values():
        torch.testing.assert_close(output(columns)[mask], output(single), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(output(columns)[mask].roll(1, 0), output(single), rtol=1e-4, atol=1e-5)


def test_q_values_and_their_successors(store: StateStore) -> None:
    _, block = draw(store, "dqn", epsilon=0.6)
    module = config(store, "dqn").get_multi_rl_module_spec().build()["default_policy"]
    module.make_target_networks()
    torch.manual_seed(1)
    for value in (*module.critic.parameters(), *module.target.parameters(), *module.target_critic.parameters()):
        torch.nn.init.normal_(value, std=0.3)  # so that no two of the outputs agree by chance
    columns = QRows(store_path=str(store.path)).rows([block])
    rows = stepwise(store, block)
    single = {
        Columns.OBS: {"state": column(rows, "state"), "layer": column(rows, "layer")},
        Columns.NEXT_OBS: {"state": column(rows, "next_state"), "layer": column(rows, "next_layer")},
    }
    mask, ends = columns[Columns.LOSS_MASK], column(rows, Columns.TERMINATEDS)
    ours, theirs = module._forward_train(columns), module._forward_train(single)
    assert ours.keys() == theirs.keys() and len(ours) == 3
    for name, wanted in theirs.items():
        found = ours[name][mask]
        rows_that_count = slice(None) if name == "qf_preds" else ~ends  # a last step has no successor
        torch.testing.assert_close(found[rows_that_count], wanted[rows_that_count], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found.roll(1, 0)[rows_that_count], wanted[rows_that_count], rtol=1e-4, atol=1e-5)


def test_an_exploring_policys_probabilities_are_those_of_the_actions(store: StateStore) -> None:
    runner, block = draw(store, "impala", epsilon=0.5)
    states = torch.from_numpy(store.states(block.trajectories.instance))
    with torch.no_grad():
        pi = runner.module.policy(states).sigmoid().numpy()
    np.testing.assert_allclose(block.behaviour, 0.5 * pi + 0.25, rtol=1e-5)
    assert not np.allclose(block.behaviour, pi, rtol=1e-2)
