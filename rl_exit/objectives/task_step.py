"""Task step (Eq. 6): cross-entropy of the exit that the frozen policy draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_exit.method.distribution import exit_distribution
from rl_exit.objectives.base import Objective, ObjectiveOptions, Phase
from rl_exit.objectives.losses import distilled_losses, exit_losses

DRAWS = ("sample", "expected")


@dataclass(frozen=True)
class PolicyWeights:
    """How much the loss of each exit counts for each instance.

    Attributes:
        policy: Maps states [B, L, H] and logits [B, L, C] to exit logits [B, L-1].
        draw: ``"sample"``: one layer drawn per instance; ``"expected"``: P(exit at l) itself, the same in expectation
            with less variance.
    """

    policy: Callable[[Tensor, Tensor], Tensor]
    draw: str

    def __call__(self, states: Tensor, logits: Tensor) -> Tensor:
        """[B, L], detached; drawn from torch's global generator, which the loop seeds for every update."""
        with torch.no_grad():
            probability = exit_distribution(self.policy(states.detach().float(), logits.detach().float()).sigmoid())
            if self.draw == "expected":
                return probability
            layer = torch.multinomial(probability, 1)
            return torch.zeros_like(probability).scatter_(1, layer, 1.0)


@dataclass(frozen=True)
class TaskStepLoss:
    """``sum_l w_l D_l + anchor CE_L`` with the drawn weights w and D_l of :func:`.losses.distilled_losses`.

    With d = 0 and no anchor it is Eq. 6. Distillation lets an exit that is drawn learn the last exit's answer too; the
    anchor keeps the last exit good where it is seldom drawn.

    Attributes:
        weights: Draws w.
        distillation: d.
        temperature: T.
        anchor: Weight of CE_L.
    """

    weights: PolicyWeights
    distillation: float = 0.0
    temperature: float = 1.0
    anchor: float = 0.0

    def __call__(self, states: Tensor, logits: Tensor, labels: Tensor, step: int) -> Tensor:
        """See :class:`~rl_exit.objectives.base.Loss`."""
        losses = distilled_losses(logits, labels, self.distillation, self.temperature)
        loss = (self.weights(states, logits) * losses).sum(1).mean()
        if self.anchor:
            loss = loss + self.anchor * exit_losses(logits[:, -1:], labels).mean()
        return loss


def task_step(
    policy: Callable[[Tensor, Tensor], Tensor], draw: str, epochs: int, options: ObjectiveOptions
) -> Objective:
    """The objective of the task step.

    Args:
        policy: Frozen policy, states [B, L, H] and logits [B, L, C] -> exit logits [B, L-1].
        draw: ``"sample"`` or ``"expected"``.
        epochs: Passes over the training set.
        options: Reads distillation, temperature and anchor.
    """
    loss = TaskStepLoss(PolicyWeights(policy, draw), options.distillation, options.temperature, options.anchor)
    return Objective((Phase("task", epochs, loss, leaves=True),))
