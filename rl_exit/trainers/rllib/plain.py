"""The plain route: RLlib's stock runner on the Gymnasium environment, as the reference for the columnar one.

For the learners of whole trajectories (PG, exact) the stock runner's episodes are put into columns. Each instance of a
block gets K sub-environments of the vector environment; after a forced reset the runner steps until every first
episode has ended, and only first episodes are kept: a runner that stopped at a number of episodes would prefer short
ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rl_exit.envs.episode import EXIT
from rl_exit.envs.sampler import Block, BlockSampler, Rows, StateReader, block_seed, join
from rl_exit.method import Trajectories
from rl_exit.trainers.rllib.logs import quiet_rllib
from rl_exit.trainers.rllib.module import ExitModule


class PlainEnvRunner(SingleAgentEnvRunner):
    """RLlib's runner; only the instances of forced resets are chosen here.

    Args:
        config: An :class:`~rl_exit.trainers.rllib.algorithm.ExitConfig` on the environment.
        module: A module to share; None builds one.
        reader: Not used: the environment reads the store itself.
    """

    pool = None

    def __init__(
        self, *, config: Any, module: ExitModule | None = None, reader: StateReader | None = None, **kwargs: Any
    ) -> None:
        quiet_rllib()
        self._shared = module
        self._assigned: Rows | None = None
        super().__init__(config=config, **kwargs)
        self.sampler: BlockSampler = self.config.open_sampler(reader)

    def make_module(self) -> None:
        """Build the module, or share the given one."""
        if self._shared is None:
            super().make_module()
        else:
            self.module = self._shared

    def sample(
        self,
        *,
        blocks: Sequence[Block] | None = None,
        epsilon: float = 0.0,
        state: Any = None,
        keep: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Draw blocks as :class:`~rl_exit.trainers.rllib.runner.ColumnarEnvRunner` does; without blocks, RLlib's own.

        Args:
            blocks: From :meth:`BlockPlan.blocks <rl_exit.envs.sampler.BlockPlan.blocks>`.
            epsilon: Exploration.
            state: Weights to take over first.
            keep: Not served: the stock runner has no graph.
            **kwargs: RLlib's arguments where ``blocks`` is None.
        """
        if blocks is None:
            return super().sample(**kwargs)
        if state is not None:
            self.set_state(state)
        self.module.epsilon.fill_(epsilon)
        return [(block.number, self._draw(block)) for block in blocks]

    def _draw(self, block: Block) -> Trajectories:
        rows, number = block.rows, self.sampler.trajectories
        (seed,) = block_seed(self.sampler.seed, block).generate_state(1, np.uint64).tolist()
        size = self.num_envs // number
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed >> 1)
            parts = [self._first_episodes(rows[start : start + size], number) for start in range(0, len(rows), size)]
        return join(parts)

    def _first_episodes(self, rows: Rows, number: int) -> Trajectories:
        """K episodes of each instance, in sub-environments i*K..i*K+K-1."""
        wanted = np.repeat(rows, number)
        # Sub-environments that are left over take the last instance; their episodes are dropped.
        self._assigned = np.concatenate([wanted, np.full(self.num_envs - len(wanted), rows[-1])])
        # A vector step counts at most num_envs steps, so this runs at least the L-1 that the longest episode needs.
        steps = self.num_envs * (self.sampler.reader.store.num_layers - 1)
        self._first: list[str] = []
        episodes = super().sample(num_timesteps=steps, explore=True, force_reset=True)
        by_id = {episode.id_: episode for episode in episodes}
        return to_columns([by_id[name] for name in self._first[: len(wanted)]], number, self.sampler)

    def _try_env_reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, Any]:
        if self._assigned is not None:
            options = {"instances": self._assigned}
        return super()._try_env_reset(seed=seed, options=options)

    def _reset_envs_and_episodes(self, explore: bool) -> None:
        super()._reset_envs_and_episodes(explore)
        self._first = [episode.id_ for episode in self._ongoing_episodes]


def to_columns(episodes: Sequence[SingleAgentEpisode], number: int, sampler: BlockSampler) -> Trajectories:
    """Complete episodes as columns.

    Args:
        episodes: B*K of them, the K of an instance in a row.
        number: K.
        sampler: Knows L.

    Raises:
        ValueError: An episode has not ended.
    """
    if not all(episode.is_done for episode in episodes):
        raise ValueError("to_columns: every episode must have ended")
    last = sampler.reader.store.num_layers
    shape = (len(episodes) // number, number)

    def column(values: list[float], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return np.array(values, dtype=dtype).reshape(shape)

    return Trajectories(
        instance=np.array([episode.get_infos(0)["instance"] for episode in episodes[::number]], dtype=np.int32),
        exit_layer=column(
            [len(e) if int(e.get_actions(-1)) == EXIT else last for e in episodes],
            np.uint8,
        ),
        log_prob=column(
            [float(np.sum(e.get_extra_model_outputs(Columns.ACTION_LOGP))) for e in episodes],
            np.float32,
        ),
        reward=column([e.get_return() for e in episodes], np.float32),
    )
