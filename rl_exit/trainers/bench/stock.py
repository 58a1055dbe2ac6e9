"""What RLlib offers by itself, set up as well as it allows: its runner, and its PPO, on the Gymnasium environment.

Without this project's callbacks and diagnostics, which would only slow it down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.rllib.algorithms.ppo import PPO
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rl_exit.trainers.rllib.settings import PolicyAccess
from rl_exit.trainers.rllib.stock import StockPPOConfig

VECTORISATIONS = ("sync", "vector_entry_point")


class ReferencePPO(PolicyAccess, PPO):
    """RLlib's PPO as it is; only the folder of results in the user's home is avoided."""


class CountingRunner(SingleAgentEnvRunner):
    """RLlib's runner; what its samples visited is counted (the time of counting is negligible)."""

    layers_visited = 0

    def sample(self, **kwargs: Any) -> list[SingleAgentEpisode]:
        """RLlib's own."""
        episodes: list[SingleAgentEpisode] = super().sample(**kwargs)
        self.layers_visited += layers_visited(episodes)
        return episodes


def layers_visited(episodes: Sequence[SingleAgentEpisode]) -> int:
    """Layers that episodes (or pieces of them) visited: one per action, one more where exit was forced at L."""
    forced = sum(bool(episode.get_infos(-1).get("forced", False)) for episode in episodes if episode.is_done)
    return sum(len(episode) for episode in episodes) + forced


def config(
    store_path: str,
    num_envs: int,
    trajectories: int,
    width: int,
    vectorisation: str,
    *,
    rows: int = 4096,
    epochs: int = 4,
    lr: float = 1e-9,
) -> StockPPOConfig:
    """Settings of RLlib's PPO on the environment; sampling happens in this process.

    Args:
        store_path: State store.
        num_envs: Sub-environments of the runner.
        trajectories: K; only its share in the size of a batch matters here.
        width: Width of the policy heads.
        vectorisation: One of :data:`VECTORISATIONS`.
        rows: Environment steps of a training batch, which is one minibatch.
        epochs: Passes over a batch.
        lr: Learning rate.
    """
    settings = StockPPOConfig(ReferencePPO)
    settings.callbacks(RLlibCallback)
    settings.open_store(store_path)
    settings.exits(trajectories=trajectories, width=width, ppo_epochs=epochs, lr=lr)
    settings.plain(num_envs)
    settings.env_runners(env_runner_cls=CountingRunner, num_env_runners=0, gym_env_vectorize_mode=vectorisation)
    settings.reporting(log_gradients=False)
    settings.training(train_batch_size_per_learner=rows, minibatch_size=rows, num_epochs=epochs)
    return settings
