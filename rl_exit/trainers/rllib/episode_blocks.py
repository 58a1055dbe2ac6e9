"""Whole episodes by reference for RLlib's own learners: what travels and waits is a few bytes per trajectory.

RLlib's ``SingleAgentEpisode`` copies states into Python objects, one by one; building them and turning them back into
tensors takes far longer than learning from them. Here a block of episodes stays columnar, and a learner connector lays
the rows out that RLlib's loss expects, with states from the learner's own map of the store.
:func:`~rl_exit.trainers.rllib.episodes.single_agent_episodes` is the slow twin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ray.rllib.connectors.common import AddObservationsFromEpisodesToBatch
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from torch import Tensor
from torch.nn import functional as F

from rl_exit.envs.sampler import StateReader
from rl_exit.envs.state_store import StateStore
from rl_exit.method import Trajectories
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.rllib.episodes import EpisodeEnvRunner
from rl_exit.trainers.rllib.module import ExitModule

BLOCK = "block"
"""Key of an observation that holds whole instances: states [B, L, H] in place of one state for every row."""


@dataclass(frozen=True, eq=False)
class EpisodeBlock:
    """Complete episodes of a block of instances.

    Attributes:
        trajectories: B instances, K episodes each.
        behaviour: [B, L-1] float32, probability of Exit under the policy that drew them.
    """

    trajectories: Trajectories
    behaviour: npt.NDArray[np.float32]

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Actions taken in each episode, [B, K]: the forced exit at L is none."""
        return np.minimum(self.trajectories.exit_layer, self.behaviour.shape[1]).astype(np.int64)

    def __len__(self) -> int:
        """Environment steps, as RLlib counts them."""
        return int(self.steps.sum())


class BlockEnvRunner(EpisodeEnvRunner):
    """Draws this runner's share of the blocks, one block a call, and leaves the episodes in columns."""

    def sample(self, **kwargs: Any) -> list[Any]:
        """The episodes of the next block as one :class:`EpisodeBlock`."""
        columns, behaviour = self.draw_next()
        block = EpisodeBlock(columns, behaviour.astype(np.float32))
        self.log_episodes(columns, len(block))
        return [block]


class StoreConnector(ConnectorV2):
    """Base of learner connectors that lay out rows and look their states up in the store.

    Args:
        input_observation_space: RLlib's argument.
        input_action_space: Likewise.
        store_path: State store.
    """

    def __init__(
        self, input_observation_space: Any = None, input_action_space: Any = None, *, store_path: str, **kwargs: Any
    ) -> None:
        super().__init__(input_observation_space, input_action_space, **kwargs)
        self.reader = StateReader(StateStore.open(store_path))

    def rows(self, episodes: Sequence[Any]) -> dict[str, Any]:
        """The columns of a batch, as tensors on the CPU."""
        raise NotImplementedError

    def __call__(self, *, episodes: Sequence[Any], **kwargs: Any) -> Any:
        """The columns; :class:`OneModule` makes a batch of them."""
        return self.rows(episodes)


class OneModule(ConnectorV2):
    """From columns to the batch of RLlib's one module, on the learner's device."""

    def __call__(self, *, rl_module: Any, batch: dict[str, Any], **kwargs: Any) -> Any:
        """The batch."""
        device = next(iter(rl_module[DEFAULT_MODULE_ID].parameters())).device
        return {DEFAULT_MODULE_ID: _to(batch, device)}


def block_connectors(
    observations: Any, actions: Any, *, rows: type[StoreConnector], store_path: str
) -> list[ConnectorV2]:
    """A learner's connectors in place of RLlib's default ones.

    Args:
        observations: Space; RLlib's argument.
        actions: Likewise.
        rows: Lays the columns out.
        store_path: State store.
    """
    return [
        rows(observations, actions, store_path=store_path),
        # Finds its work done. RLlib's DQN learner puts a piece of its own behind it, which does likewise.
        AddObservationsFromEpisodesToBatch(observations, actions, as_learner_connector=True),
        OneModule(observations, actions),
    ]


class TrajectoryRows(StoreConnector):
    """Rows for losses that go along time (V-trace): L rows for each episode, in the order of the layers.

    Layers that the episode has not reached are masked, so with a fragment length of L no row of the loss meets another
    episode. The K episodes of an instance share its states: the observation is ``{"block": [B, L, H]}`` for B*K*L
    rows.
    """

    def rows(self, episodes: Sequence[EpisodeBlock]) -> dict[str, Any]:
        """Columns of length B*K*L; see :class:`StoreConnector`."""
        exits = torch.from_numpy(np.concatenate([part.trajectories.exit_layer for part in episodes])).long()
        reward = torch.from_numpy(np.concatenate([part.trajectories.reward for part in episodes]))
        pi = np.concatenate([part.behaviour for part in episodes]).astype(np.float64).clip(1e-7, 1 - 1e-7)
        instance = np.concatenate([part.trajectories.instance for part in episodes])
        layers = torch.arange(1, pi.shape[1] + 2)
        ends = exits.clamp_max(pi.shape[1]).unsqueeze(-1)  # the layer of the last action
        leaves = layers == exits.unsqueeze(-1)
        leaves[..., -1] = False  # forced
        leave, stay = (torch.from_numpy(value).float() for value in (np.log(pi), np.log1p(-pi)))
        log_prob = torch.where(leaves, F.pad(leave, (0, 1)).unsqueeze(1), F.pad(stay, (0, 1)).unsqueeze(1))
        last = layers == ends
        return {
            Columns.ACTIONS: leaves.long().flatten(),
            Columns.ACTION_LOGP: log_prob.flatten(),
            Columns.REWARDS: (reward.unsqueeze(-1) * last).flatten(),
            Columns.TERMINATEDS: last.flatten(),
            Columns.LOSS_MASK: (layers <= ends).flatten(),
            Columns.OBS: {BLOCK: torch.from_numpy(np.asarray(self.reader.gather(instance)))},
        }


class BlockModule(ExitModule):
    """The exit module, which also reads observations of :class:`TrajectoryRows`: the heads pass each state once."""

    def _by_layer(self, heads: PolicyHeads, observation: Mapping[str, Tensor]) -> Tensor:
        if BLOCK not in observation:
            return super()._by_layer(heads, observation)
        out = F.pad(heads(observation[BLOCK]), (0, 1))
        return out.unsqueeze(1).expand(-1, self.model_config["trajectories"], -1).reshape(-1)


def _to(columns: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: _to(value, device) if isinstance(value, dict) else value.to(device) for name, value in columns.items()
    }
