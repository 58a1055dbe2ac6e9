"""Episodes for RLlib's own learners, from the block sampler in place of environment steps.

The draw costs next to nothing; putting it into RLlib's episode objects is what remains (see docs/performance.md). The
built-in algorithms avoid these objects (:mod:`rl_exit.trainers.rllib.episode_blocks`); they serve any other learner.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_AGENT_ID
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import (
    EPISODE_LEN_MEAN,
    EPISODE_RETURN_MEAN,
    NUM_AGENT_STEPS_SAMPLED_LIFETIME,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_EPISODES,
    WEIGHTS_SEQ_NO,
)

from rl_exit.method import Trajectories, explore
from rl_exit.method.sampling import exit_probability
from rl_exit.trainers.rllib.runner import ColumnarEnvRunner

EXITS = "exits"


class EpisodeEnvRunner(ColumnarEnvRunner):
    """Draws this runner's share of the blocks, one block a call, as complete episodes."""

    def sample(self, **kwargs: Any) -> list[Any]:
        """The episodes of the next block; arguments that RLlib passes to its own runner are ignored."""
        columns, behaviour = self.draw_next()
        states = self.sampler.reader.gather(columns.instance)
        spaces = (self.config.observation_space, self.config.action_space)
        episodes = list(single_agent_episodes(columns, behaviour, states, spaces, self._weights_seq_no))
        self.log_episodes(columns, sum(map(len, episodes)))
        return episodes

    def draw_next(self) -> tuple[Trajectories, npt.NDArray[np.float64]]:
        """Draw the next block.

        Returns:
            (trajectories, probability of Exit under the behaviour policy [B, L-1]).
        """
        epsilon = float(self.module.epsilon)
        seen: list[npt.NDArray[np.float32]] = []

        def behave(states: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            seen.append(self.behaviour(self.policy(states)))
            return seen[-1]

        columns = self.sampler.draw(behave, self.next_block(), epsilon)
        return columns, explore(exit_probability(seen[0]), epsilon)

    def behaviour(self, exit_logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Log-odds of Exit by which to act, before exploration; the policy's own unless a subclass differs."""
        return exit_logits

    def log_episodes(self, columns: Trajectories, steps: int) -> None:
        """Log what RLlib and the policy phase want to know of a block."""
        self.num_env_steps_sampled_lifetime += steps
        log = self.metrics.log_value
        for layer, count in enumerate(np.bincount(columns.exit_layer.ravel())):
            if count:
                log((EXITS, str(layer)), int(count), reduce="sum")
        log(NUM_ENV_STEPS_SAMPLED, steps, reduce="sum")
        log(NUM_ENV_STEPS_SAMPLED_LIFETIME, steps, reduce="lifetime_sum")
        log((NUM_AGENT_STEPS_SAMPLED_LIFETIME, DEFAULT_AGENT_ID), steps, reduce="lifetime_sum")
        log(NUM_EPISODES, len(columns), reduce="sum")
        log(EPISODE_RETURN_MEAN, float(columns.reward.mean()), window=10)
        log(EPISODE_LEN_MEAN, steps / len(columns), window=10)
        log(WEIGHTS_SEQ_NO, self._weights_seq_no, window=1)

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Weights and their number, unless they are not wanted."""
        unwanted = [not_components] if isinstance(not_components, str) else list(not_components or [])
        return {} if COMPONENT_RL_MODULE in unwanted else super().get_state(components, **kwargs)


def single_agent_episodes(
    columns: Trajectories,
    behaviour: npt.NDArray[np.floating],
    states: npt.NDArray[np.float32],
    spaces: tuple[Any, Any],
    weights_number: int = 0,
) -> Iterator[SingleAgentEpisode]:
    """RLlib's episode objects, the K of an instance in a row.

    Args:
        columns: B instances, K trajectories each.
        behaviour: [B, L-1], probability of Exit under the behaviour policy.
        states: [B, L, H].
        spaces: Of observations and actions.
        weights_number: Number of the weights that drew them.
    """
    pi = behaviour.clip(1e-7, 1 - 1e-7)
    log_probs = np.stack([np.log1p(-pi), np.log(pi)], -1).astype(np.float32)  # [B, L-1, 2]: Continue, Exit
    last = states.shape[1]
    layers = np.arange(1, last + 1)
    for i, k in np.ndindex(*columns.exit_layer.shape):
        leaves = int(columns.exit_layer[i, k])
        steps = min(leaves, last - 1)
        actions = np.zeros(steps, dtype=np.int64)
        actions[-1] = leaves < last
        # Exit stays at its layer; the forced exit is reached by Continue, so its last observation is layer L's.
        seen = [*range(steps), leaves - 1]
        rewards = np.zeros(steps)
        rewards[-1] = columns.reward[i, k]
        logits = log_probs[i, :steps]
        yield SingleAgentEpisode(
            observations=[{"state": states[i, at], "layer": layers[at]} for at in seen],
            observation_space=spaces[0],
            actions=list(actions),
            action_space=spaces[1],
            rewards=list(rewards),
            terminated=True,
            extra_model_outputs={
                Columns.ACTION_DIST_INPUTS: list(logits),
                Columns.ACTION_LOGP: list(logits[np.arange(steps), actions]),
                WEIGHTS_SEQ_NO: [weights_number] * steps,
            },
            len_lookback_buffer=0,
            t_started=0,
        ).to_numpy()
