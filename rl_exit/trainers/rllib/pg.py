"""PG: the paper's policy gradient (Eq. 5) on folded trajectories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl_exit.method import action_entropy, advantages, importance_weights, policy_gradient_loss
from rl_exit.trainers.rllib.algorithm import ExitAlgorithm, ExitConfig
from rl_exit.trainers.rllib.learner import Block, ColumnarLearner


class PGLearner(ColumnarLearner):
    """``-(1/BK) sum_k rho_k A_k log P(exit at e_k)`` with A from the other trajectories of the instance.

    ``rho`` is P_pi/P_behaviour: under exploration, and with trajectories drawn by the weights of the update before, the
    gradient stays that of pi itself.
    """

    def loss(self, logits: Tensor, block: Block) -> Tensor:
        """The loss of one batch; its gradient is the policy gradient.

        Args:
            logits: [B, L-1].
            block: The batch.
        """
        weight = torch.from_numpy(advantages(block.batch.trajectories.reward, self.config.baseline)).to(logits.device)
        if block.batch.epsilon > 0.0 or block.batch.lag > 0:
            weight = weight * importance_weights(logits, block.exit_layer, block.log_prob)
        loss = policy_gradient_loss(logits, block.exit_layer, weight) * self.scale(block)
        if self.config.entropy > 0.0:
            loss = loss - self.config.entropy * action_entropy(logits) * self.scale(block)
        return loss

    def learn(self, block: Block) -> tuple[Tensor, dict[str, Tensor]]:
        """One step."""
        logits = self.exit_logits(block)
        self.descend(self.loss(logits, block))
        return logits.detach(), {}


class PGConfig(ExitConfig):
    """Settings of PG."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or PG)
        self.baseline = "leave_one_out"

    def get_default_learner_class(self) -> type:
        """The learner."""
        return PGLearner


class PG(ExitAlgorithm):
    """Policy gradient with the leave-one-out (or the paper's own-sample) baseline."""

    @classmethod
    def get_default_config(cls) -> Any:
        """The settings' defaults."""
        return PGConfig()
