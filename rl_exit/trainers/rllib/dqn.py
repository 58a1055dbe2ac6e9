"""RLlib's DQN on the exit policy: the policy is the greedy choice between Q(Exit) and Q(Continue).

The replay buffer keeps exit layers and returns with the number of their instance (6 bytes an episode); states come from
the store. It lives as long as one policy phase and is never carried to the next: another round's states are those of
another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from ray.rllib.algorithms.dqn import DQN, DQNConfig
from ray.rllib.algorithms.dqn.dqn_learner import QF_NEXT_PREDS, QF_PREDS, QF_TARGET_NEXT_PREDS
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import QNetAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer
from torch import Tensor

from rl_exit.errors import ConfigError
from rl_exit.method import Trajectories, explore
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.rllib.episode_blocks import (
    BLOCK,
    BlockEnvRunner,
    BlockModule,
    EpisodeBlock,
    TrajectoryRows,
    block_connectors,
)
from rl_exit.trainers.rllib.settings import StoreSettings
from rl_exit.trainers.rllib.stock import CountExits, StockAlgorithm

CERTAIN = 50.0  # log-odds of an action taken for sure


class QModule(BlockModule, QNetAPI):
    """Q-values from the policy heads: ``Q(Exit), Q(Continue) = V +- T/2 * exit_logit``, V from the critic heads.

    So the exit logit is ``(Q(Exit) - Q(Continue)) / T``: pi > 0.5 if and only if Exit is worth more, and pi itself is
    the Boltzmann policy of temperature T (``model_config["temperature"]``, in units of the return), which is what the
    task step draws exits from. It acts greedily, but for the exploration.
    """

    def setup(self) -> None:
        """Build the heads."""
        super().setup()
        self.temperature = float(self.model_config["temperature"])

    def get_non_inference_attributes(self) -> list[str]:
        """What a runner does not need."""
        return ["critic", "target", "target_critic"]

    def make_target_networks(self) -> None:
        """Frozen copies of both sets of heads."""
        super().make_target_networks()
        self.target_critic = PolicyHeads(
            self.critic.num_layers, self.critic.hidden_size, self.critic.width, self.critic.shared
        )
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)

    def get_target_network_pairs(self) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
        """(heads, their copies)."""
        return [*super().get_target_network_pairs(), (self.critic, self.target_critic)]

    def compute_q_values(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Q-values of single steps, [T, 2] for Continue and Exit."""
        return {QF_PREDS: self._q_values(self.policy, self.critic, batch[Columns.OBS])}

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The same of the copies."""
        with torch.no_grad():
            return {QF_PREDS: self._q_values(self.target, self.target_critic, batch[Columns.OBS])}

    def _q_values(self, policy: PolicyHeads, critic: PolicyHeads, observation: Mapping[str, Tensor]) -> Tensor:
        half = 0.5 * self.temperature * self._by_layer(policy, observation)
        value = self._by_layer(critic, observation)
        return torch.stack([value - half, value + half], -1)

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if BLOCK in batch[Columns.OBS]:
            values = self.compute_q_values(batch)[QF_PREDS]
            following, target = values.detach(), self.forward_target(batch)[QF_PREDS]
            return {
                QF_PREDS: values,
                QF_NEXT_PREDS: self._one_layer_on(following),
                QF_TARGET_NEXT_PREDS: self._one_layer_on(target),
            }
        after = {Columns.OBS: batch[Columns.NEXT_OBS]}
        with torch.no_grad():  # of the next step, only the best action is asked for (double Q)
            following = self.compute_q_values(after)[QF_PREDS]
        target = self.forward_target(after)[QF_PREDS]
        return {**self.compute_q_values(batch), QF_NEXT_PREDS: following, QF_TARGET_NEXT_PREDS: target}

    def _one_layer_on(self, values: Tensor) -> Tensor:
        """Values [T, 2] of the next row of each episode; nothing follows its last."""
        return F.pad(values.view(-1, self.num_layers, 2)[:, 1:], (0, 0, 0, 1)).flatten(0, 1)

    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        with torch.no_grad():
            better = (self._by_layer(self.policy, batch[Columns.OBS]) > 0).float()
            pi = explore(better, float(self.epsilon)).clamp(1e-7, 1 - 1e-7)
            return {Columns.ACTION_DIST_INPUTS: torch.stack([torch.log1p(-pi), pi.log()], -1)}


class GreedyBlockRunner(BlockEnvRunner):
    """Acts by the better action, apart from the exploration."""

    def behaviour(self, exit_logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Certain exit where pi > 0.5, otherwise certain continuation."""
        return np.where(exit_logits > 0, CERTAIN, -CERTAIN).astype(np.float32)


class TrajectoryReplayBuffer(EpisodeReplayBuffer):
    """Uniform replay of episodes in columns; the K of an instance stay together, for they share its states.

    Args:
        capacity: Instances with their K episodes each; the oldest give way to the newest.
        trajectories: K.
        layers: L.
        seed: Decides what is drawn.
    """

    def __init__(self, capacity: int, trajectories: int, layers: int, seed: int) -> None:
        super().__init__(capacity=capacity)
        self.rng = np.random.default_rng(seed)
        self.layers = layers
        self._instance = np.zeros(capacity, np.int32)
        self._exit_layer = np.zeros((capacity, trajectories), np.uint8)
        self._reward = np.zeros((capacity, trajectories), np.float32)
        self._added = 0

    def __len__(self) -> int:
        """Instances held."""
        return min(self.capacity, self._added)

    def add(self, episodes: Any) -> None:
        """Take over the episodes of blocks."""
        for block in episodes:
            drawn = block.trajectories
            index = (self._added + np.arange(len(drawn.instance))) % self.capacity
            self._instance[index] = drawn.instance
            self._exit_layer[index] = drawn.exit_layer
            self._reward[index] = drawn.reward
            self._added += len(index)

    def sample(self, num_items: int | None = None, **kwargs: Any) -> list[Any]:
        """Episodes of evenly drawn instances.

        Args:
            num_items: Instances.
            **kwargs: Ignored; what RLlib passes to its own buffers.
        """
        index = self.rng.integers(len(self), size=num_items)
        exits = self._exit_layer[index]
        drawn = Trajectories(self._instance[index], exits, np.zeros(exits.shape, np.float32), self._reward[index])
        # Q-learning does not ask how likely an action was.
        return [EpisodeBlock(drawn, np.full((len(index), self.layers - 1), 0.5, np.float32))]


class QRows(TrajectoryRows):
    """Rows of DQN's loss."""

    def rows(self, episodes: Any) -> dict[str, Any]:
        """Columns of length B*K*L; the next observation is the next row (:class:`QModule`)."""
        columns = super().rows(episodes)
        ones = torch.ones(len(columns[Columns.ACTIONS]))
        return {**columns, "weights": ones, "n_step": ones, Columns.NEXT_OBS: columns[Columns.OBS]}


class StockDQNConfig(StoreSettings, DQNConfig):
    """RLlib's DQN with the policy phase's settings.

    Attributes:
        temperature: T of :class:`QModule`.
        replay: How often a step is learnt from, on average.
        capacity: Episodes that the replay buffer holds (single steps where RLlib's own runner samples).
    """

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or StockDQN)
        self.add_store_settings()
        self.critic = True
        self.temperature = 0.05
        self.minibatch_size = 256
        self.replay = 2.0
        self.capacity = 1_000_000
        self.callbacks(CountExits)

    def columnar(self) -> StockDQNConfig:
        """Blocks of episodes from the block sampler, and the settings under RLlib's names.

        Raises:
            ConfigError: Several learners, between which RLlib would cut the columns by steps.
        """
        if self.num_learners > 1:
            raise ConfigError(f"learners.num_learners is {self.num_learners}; algorithm=dqn learns with at most 1")
        self.env_runners(env_runner_cls=GreedyBlockRunner)
        self.learners(
            learner_connector=partial(block_connectors, rows=QRows, store_path=self.store_path),
            add_default_connectors_to_learner_pipeline=False,
        )
        # RLlib relates what it trains on to what one call of sample() gives; both in instances here.
        self.env_runners(rollout_fragment_length=1, num_envs_per_env_runner=min(self.batch_size, self.block_rows))
        return self._named(min(self.minibatch_size, self.batch_size))

    def plain(self, envs_per_runner: int) -> StockDQNConfig:
        """RLlib's stock runner, connectors and replay buffer, all step by step."""
        self.use_environment(envs_per_runner)
        return self._named(min(self.minibatch_size, self.batch_size) * self.trajectories)

    def _named(self, batch: int) -> StockDQNConfig:
        self.training(
            train_batch_size=batch,
            training_intensity=self.replay,
            replay_buffer_config={"type": EpisodeReplayBuffer, "capacity": self.capacity},
            num_steps_sampled_before_learning_starts=0,
            target_network_update_freq=1,  # after every call of sample(): the longest chain of values is L-1 steps
            td_error_loss_fn="mse",  # a return has rare large losses; Huber's would learn their median
            gamma=1.0,
            grad_clip_by="global_norm",
        )
        self.reporting(log_gradients=True, min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=0)
        return self

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """Q-values on the policy heads."""
        spec = super().get_default_rl_module_spec()
        spec.module_class = QModule
        return spec

    def model_settings(self) -> dict[str, Any]:
        """The module's settings, with K and the temperature."""
        return {**super().model_settings(), "trajectories": self.trajectories, "temperature": self.temperature}


class StockDQN(StockAlgorithm, DQN):
    """RLlib's DQN (double Q, target network) with epsilon-greedy behaviour and a replay of the phase's own episodes."""

    @classmethod
    def get_default_config(cls) -> Any:
        """The settings' defaults."""
        return StockDQNConfig()

    def _create_local_replay_buffer_if_necessary(self, config: Any) -> Any:
        if config.env_runner_cls is not GreedyBlockRunner:
            buffer = EpisodeReplayBuffer(capacity=config.capacity)
            buffer.rng = np.random.default_rng(config.sampling_seed)
            return buffer
        layers, number = int(config.observation_space["layer"].n), config.trajectories
        return TrajectoryReplayBuffer(max(1, config.capacity // number), number, layers, config.sampling_seed)
