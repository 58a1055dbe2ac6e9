"""A columnar RLlib ``EnvRunner``: blocks of whole trajectories in place of environment steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import ray
import torch
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.env import INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO
from torch import Tensor

from rl_exit.envs.sampler import Block, BlockSampler, FloatArray, StateReader
from rl_exit.method import Trajectories
from rl_exit.models.policy_arrays import Weights, exit_logits
from rl_exit.trainers.rllib.logs import quiet_rllib
from rl_exit.trainers.rllib.module import ExitModule
from rl_exit.trainers.rllib.passes import arrays, heads_pass
from rl_exit.trainers.rllib.pool import SamplerPool

Drawn = list[tuple[int, Trajectories]]


class ColumnarEnvRunner(EnvRunner):
    """Draws blocks of trajectories from a memory-mapped state store.

    Without a state of its own: a block depends only on (weights, seed, epoch, block), so a runner that died can be
    replaced, and its blocks drawn again, without changing the result.

    Args:
        config: An :class:`~rl_exit.trainers.rllib.algorithm.ExitConfig`.
        module: A module to share (sampling in the learner's own process); None builds one.
        reader: Likewise for the states.
        samplers: Sampling actors to start; blocks are then drawn by them, and this runner is their front.
    """

    pool: SamplerPool | None = None

    def __init__(
        self,
        *,
        config: Any,
        module: ExitModule | None = None,
        reader: StateReader | None = None,
        samplers: int = 0,
        **kwargs: Any,
    ) -> None:
        quiet_rllib()
        super().__init__(config=config, **kwargs)
        self.sampler: BlockSampler = self.config.open_sampler(reader)
        self.plan = self.config.block_plan(self.sampler.reader.store)
        self.module: ExitModule = module or self._build_module()
        self._weights_seq_no = 0
        self._next = 0
        if samplers:
            self.pool = self.config.start_samplers(samplers, self.sampler.reader.store, self.plan)
        self._waiting: list[Block] = []

    def _build_module(self) -> ExitModule:
        """The policy without its critic."""
        spec = self.config.get_multi_rl_module_spec(spaces=self.get_spaces(), inference_only=True)
        return spec.build()[DEFAULT_MODULE_ID]

    def sample(
        self,
        *,
        blocks: Sequence[Block] | None = None,
        epsilon: float = 0.0,
        state: Any = None,
        keep: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> Drawn:
        """Draw blocks.

        Args:
            blocks: From :meth:`BlockPlan.blocks <rl_exit.envs.sampler.BlockPlan.blocks>`; None takes the next of this
                runner's own share.
            epsilon: Exploration.
            state: Weights to take over first, as :meth:`set_state` accepts them (saves a call).
            keep: Exit logits are computed with their graph and appended, for a learner in this process (not where
                sampling actors draw).
            **kwargs: Ignored; RLlib passes some.

        Returns:
            (number of the block, trajectories) in the order given.
        """
        if state is not None:
            self.set_state(state)
        if blocks is None:
            blocks = [self.next_block()]

        def policy(states: FloatArray) -> FloatArray:
            if keep is None:
                return self.policy(states)
            with torch.enable_grad():
                (logits,) = heads_pass(torch.from_numpy(states), self.module.policy)
            keep.append(logits)
            return logits.detach().cpu().numpy()

        if self.pool is not None:
            parts = self.pool.sample(blocks, self.weights(), epsilon)
            drawn = [(block.number, part) for block, part in zip(blocks, parts, strict=True)]
        else:
            drawn = [(block.number, self.sampler.draw(policy, block, epsilon)) for block in blocks]
        self.num_env_steps_sampled_lifetime += sum(part.num_steps for _, part in drawn)
        return drawn

    def policy(self, states: FloatArray) -> FloatArray:
        """Exit logits [B, L-1] of states [B, L, H]."""
        return exit_logits(self.weights(), states)

    def weights(self) -> Weights:
        """Weights of the policy, views where they are in this process."""
        return arrays(self.module.policy)

    def stop(self) -> None:
        """End the sampling actors."""
        if self.pool is not None:
            self.pool.stop()
            self.pool = None

    def next_block(self) -> Block:
        """The next block of this runner's own share: every ``num_workers``-th update, block by block, without end."""
        while not self._waiting:
            number = self._next * max(1, self.num_workers) + max(0, (self.worker_index or 0) - 1)
            self._next += 1
            self._waiting += self.plan.blocks(*divmod(number, self.plan.updates))
        return self._waiting.pop(0)

    def get_spaces(self) -> dict[str, Any]:
        """Observation and action space of the environment that this runner stands for."""
        spaces = (self.config.observation_space, self.config.action_space)
        return {INPUT_ENV_SPACES: spaces, DEFAULT_MODULE_ID: spaces}

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Weights and their number."""
        return {COMPONENT_RL_MODULE: self.module.get_state(**kwargs), WEIGHTS_SEQ_NO: self._weights_seq_no}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over weights; a number not above the present one means they are known already."""
        if COMPONENT_RL_MODULE not in state:
            return
        number = state.get(WEIGHTS_SEQ_NO, 0)
        if number != 0 and number <= self._weights_seq_no:
            return
        weights = state[COMPONENT_RL_MODULE]
        if isinstance(weights, ray.ObjectRef):
            weights = ray.get(weights)
        self.module.set_state(weights.get(DEFAULT_MODULE_ID, weights))
        self._weights_seq_no = number

    def assert_healthy(self) -> None:
        """Raise if the constructor did not finish."""
        if not hasattr(self, "_waiting"):
            raise ValueError("the runner's constructor did not finish")

    def get_metrics(self) -> dict[str, Any]:
        """RLlib's form of this runner's metrics."""
        return self.metrics.reduce()
