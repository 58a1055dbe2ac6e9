"""What goes from the runners to the learners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rl_exit.method import Trajectories


@dataclass(frozen=True, eq=False)
class TrajectoryBatch:
    """The trajectories of one update (or a learner's part of it).

    Attributes:
        trajectories: Columns; all that travels between processes.
        epsilon: Exploration under which they were drawn.
        total: Trajectories of the whole update over all learners; normalises the loss, so that parts of unequal size
            add up to the same gradient as one learner's.
        lag: Updates between the weights that drew them and those that learn from them.
        exit_logits: [B, L-1] with graph, if the sampler of this process has just computed them with the current
            weights: the learner then saves its own pass. Never leaves the process.
    """

    trajectories: Trajectories
    epsilon: float
    total: int
    lag: int = 0
    exit_logits: Tensor | None = None

    def __len__(self) -> int:
        """Number of trajectories."""
        return len(self.trajectories)

    def __reduce__(self) -> tuple[Any, ...]:
        return TrajectoryBatch, (self.trajectories, self.epsilon, self.total, self.lag)
