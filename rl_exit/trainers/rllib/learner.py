"""The learner's common part: from columnar batches to optimizer steps and diagnostics.

RLlib's generic update (connectors, minibatch iterators, per-parameter finite checks, dozens of metric objects) costs
more than the mathematics here, therefore :meth:`ColumnarLearner.update` goes straight from trajectories to gradients.
What RLlib provides stays in use: module, optimizer registry, DDP wrapping, state and device handling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.learner.training_data import TrainingData
from torch import Tensor

from rl_exit.envs.sampler import RewardTable, StateReader
from rl_exit.envs.state_store import StateStore
from rl_exit.method import log_exit_distribution
from rl_exit.trainers.rllib.batch import TrajectoryBatch
from rl_exit.trainers.rllib.logs import quiet_rllib
from rl_exit.trainers.rllib.module import EXIT_LOGITS, STATES, ExitModule
from rl_exit.trainers.rllib.passes import heads_pass

STATS = "stats"
STATE_AFTER = "_rl_module_state_after_update"


@dataclass(frozen=True)
class Block:
    """A batch on the learner's device.

    Attributes:
        batch: The columns as they came.
        states: [B, L, H].
        exit_layer: [B, K] int64.
        reward: [B, K].
        log_prob: [B, K].
    """

    batch: TrajectoryBatch
    states: Tensor
    exit_layer: Tensor
    reward: Tensor
    log_prob: Tensor


class ColumnarLearner(TorchLearner):
    """Base of the columnar learners; a subclass says how one update is learnt in :meth:`learn`."""

    def __init__(self, **kwargs: Any) -> None:
        quiet_rllib()
        super().__init__(**kwargs)

    def build(self) -> None:
        """Build module and optimizer, and map the state store."""
        if self._is_built:
            return
        super().build()
        #: Source of states, which a sampler in the same process shares.
        self.reader = StateReader(StateStore.open(self.config.store_path))
        self.table = RewardTable(self.reader.store, self.config.reward, self.config.alpha, self.config.cost)
        self.parameters: list[Tensor] = [p for p in self._module[DEFAULT_MODULE_ID].parameters() if p.requires_grad]
        self._grad_norms: list[Tensor] = []

    @property
    def exit_module(self) -> ExitModule:
        """The module without the DDP wrapping."""
        return self._module[DEFAULT_MODULE_ID].unwrapped()

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Adam, one fused step for all parameters."""
        params = self.get_parameters(self._module[module_id])
        optimizer = torch.optim.Adam(params, lr=self.config.lr, fused=True)
        self.register_optimizer(
            module_id=module_id, optimizer=optimizer, params=params, lr_or_lr_schedule=self.config.lr
        )

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        """Outputs of the module with graph (through DDP where there are several learners)."""
        return self._module[DEFAULT_MODULE_ID].forward_train({STATES: states})

    def exit_logits(self, block: Block) -> Tensor:
        """Exit logits with graph, [B, L-1]; the sampler's own pass where it is still valid."""
        if block.batch.exit_logits is not None:
            return block.batch.exit_logits
        return self.forward(block.states)[EXIT_LOGITS]

    def learn(self, block: Block) -> tuple[Tensor, dict[str, Tensor]]:
        """Update the module from one batch.

        Returns:
            (exit logits under which the batch was drawn, [B, L-1] detached; scalars of the algorithm).
        """
        raise NotImplementedError

    def compute_loss_for_module(self, **kwargs: Any) -> Tensor:
        """RLlib's hook for row batches, which columnar learners have none of: see :meth:`learn`."""
        raise NotImplementedError("columnar learners learn from TrajectoryBatch, see learn()")

    def descend(self, loss: Tensor) -> None:
        """One optimizer step; a gradient that is not finite is not applied (and reported by its norm)."""
        for optimizer in self._optimizer_parameters:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip or math.inf)
        self._grad_norms.append(norm.detach())
        if math.isfinite(float(norm)):
            for optimizer in self._optimizer_parameters:
                optimizer.step()

    def total(self, value: Tensor) -> Tensor:
        """Sum over all learners of a statistic without gradient."""
        if self.distributed:
            value = value.detach().clone()
            torch.distributed.all_reduce(value)
        return value

    def scale(self, block: Block) -> float:
        """Factor from the mean over this learner's trajectories to its share of the whole update.

        DDP averages over learners, so parts of unequal size need their weight back.
        """
        return max(1, self.config.num_learners) * len(block.batch) / block.batch.total

    def update(
        self,
        *args: Any,
        training_data: TrainingData | None = None,
        episodes: list[TrajectoryBatch] | None = None,
        return_state: bool = False,
        diagnose: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Learn from columnar batches, one update each.

        Args:
            *args: None; RLlib's signature.
            training_data: What RLlib's learner group hands over.
            episodes: The batches, if called directly.
            return_state: Whether the weights are wanted.
            diagnose: Whether the diagnostics of the last batch are wanted; they cost a policy pass.
            **kwargs: Ignored; RLlib's signature.

        Returns:
            ``{"stats": {...}}`` with plain floats, and the weights where ``return_state``.
        """
        if training_data is not None:
            training_data.validate()
            training_data.solve_refs()
            episodes = training_data.episodes
        if not episodes:
            raise ValueError("update: columnar learners accept `episodes`, a list of TrajectoryBatch")
        self._weights_seq_no += 1
        self._grad_norms.clear()
        for batch in episodes:
            block = self._load(batch)
            logits, scalars = self.learn(block)
        # The largest norm is nan if one of them was: a failed step is never hidden.
        stats = {"grad_norm": float(torch.stack(self._grad_norms).max())}
        if diagnose:
            stats |= {name: float(value) for name, value in scalars.items()} | self._diagnose(block, logits)
        result: dict[str, Any] = {STATS: stats}
        if return_state:
            result[STATE_AFTER] = self.get_state(components=COMPONENT_RL_MODULE, inference_only=True)
        return result

    def _load(self, batch: TrajectoryBatch) -> Block:
        columns = batch.trajectories
        device = self._device
        return Block(
            batch,
            torch.from_numpy(self.reader.gather(columns.instance)).to(device),
            # Copied: columns out of the object store are read-only, which torch does not accept.
            torch.tensor(columns.exit_layer, dtype=torch.int64, device=device),
            torch.tensor(columns.reward, device=device),
            torch.tensor(columns.log_prob, device=device),
        )

    @torch.no_grad()
    def _diagnose(self, block: Block, logits: Tensor) -> dict[str, float]:
        """Entropy of the exit distribution, and how far the update has moved it: KL(before || after); both nats."""
        before = log_exit_distribution(logits)
        after = log_exit_distribution(heads_pass(block.states, self.exit_module.policy)[0])
        chance = before.exp()
        return {
            "entropy": float(-(chance * before).sum(-1).mean()),
            "kl": float((chance * (before - after)).sum(-1).mean()),
        }
