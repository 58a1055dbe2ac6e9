"""Exact: the expected return in closed form, the policy gradient without variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl_exit.method import action_entropy, expected_return
from rl_exit.trainers.rllib.algorithm import ExitAlgorithm, ExitConfig
from rl_exit.trainers.rllib.learner import Block, ColumnarLearner


class ExactLearner(ColumnarLearner):
    """``-mean_i J_i``. The drawn trajectories only serve the diagnostics."""

    def learn(self, block: Block) -> tuple[Tensor, dict[str, Tensor]]:
        """One step."""
        logits = self.exit_logits(block)
        reward = torch.from_numpy(self.table(block.batch.trajectories.instance)).to(logits.device)
        exact = expected_return(logits, reward).mean()
        bonus = self.config.entropy * action_entropy(logits) if self.config.entropy > 0.0 else 0.0
        self.descend(-(exact + bonus) * self.scale(block))
        return logits.detach(), {"expected_return": exact.detach()}


class ExactConfig(ExitConfig):
    """Settings of exact."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or Exact)

    def get_default_learner_class(self) -> type:
        """The learner."""
        return ExactLearner


class Exact(ExitAlgorithm):
    """Gradient ascent on ``J = sum_l P(l) R[l]``; needs a reward that is a sum over layers."""

    @classmethod
    def get_default_config(cls) -> Any:
        """The settings' defaults."""
        return ExactConfig()
