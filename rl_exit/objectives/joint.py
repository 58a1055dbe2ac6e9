"""Objectives with one phase, in which backbone, all exits and heads are trained together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rl_exit.criteria.head_losses import certainty_loss, ponder_loss
from rl_exit.criteria.heads import Head, make_head
from rl_exit.objectives.base import Objective, ObjectiveOptions, Phase, Shape
from rl_exit.objectives.losses import distilled_losses, exit_losses, layer_weights


@dataclass(frozen=True)
class WeightedLoss:
    """``sum_l w_l CE_l``, distilled from the last exit where d > 0 (:func:`.losses.distilled_losses`).

    Attributes:
        even: w_l = 1 (Right-Tool, BERxiT "all"); otherwise w_l = l / sum l (Eq. 2; PABEE, PCEE-BERT, ConsistentEE).
        distillation: d.
        temperature: T.
    """

    even: bool = False
    distillation: float = 0.0
    temperature: float = 1.0

    def __call__(self, states: Tensor, logits: Tensor, labels: Tensor, step: int) -> Tensor:
        """See :class:`~rl_exit.objectives.base.Loss`."""
        losses = distilled_losses(logits, labels, self.distillation, self.temperature)
        if not self.even:
            losses = layer_weights(losses.shape[1]).to(losses.device).expand_as(losses) * losses
        return losses.sum(1).mean()


def weighted(shape: Shape, epochs: int, options: ObjectiveOptions) -> Objective:
    """``sum_l l CE_l / sum_l l`` (Eq. 2; Zhou et al., 2020)."""
    return Objective((Phase("weighted", epochs, WeightedLoss()),))


def uniform(shape: Shape, epochs: int, options: ObjectiveOptions) -> Objective:
    """``sum_l CE_l`` (Schwartz et al., 2020)."""
    return Objective((Phase("uniform", epochs, WeightedLoss(even=True)),))


def distilled(shape: Shape, epochs: int, options: ObjectiveOptions) -> Objective:
    """The weighted sum with each exit below L taught by the last exit's softened answer as well."""
    loss = WeightedLoss(distillation=options.distillation, temperature=options.temperature)
    return Objective((Phase("distilled", epochs, loss),))


@dataclass(frozen=True)
class AlternateLoss:
    """BERxiT: odd updates (the first) ``CE_L``; even ones ``sum_l CE_l`` and LTE's squared error, summed over l < L.

    Attributes:
        certainty: The LTE head.
    """

    certainty: Head

    def __call__(self, states: Tensor, logits: Tensor, labels: Tensor, step: int) -> Tensor:
        """See :class:`~rl_exit.objectives.base.Loss`."""
        if step % 2 == 0:
            return exit_losses(logits[:, -1:], labels).mean()
        below = logits.shape[1] - 1
        errors = below * certainty_loss(self.certainty(states, logits), logits, labels)
        return exit_losses(logits, labels).sum(1).mean() + errors


@dataclass(frozen=True)
class PonderLoss:
    """PonderNet on the exits (:func:`rl_exit.criteria.head_losses.ponder_loss`).

    Attributes:
        halting: PALBERT's lambda head.
        weight: beta.
        prior: lambda_p.
    """

    halting: Head
    weight: float
    prior: float

    def __call__(self, states: Tensor, logits: Tensor, labels: Tensor, step: int) -> Tensor:
        """See :class:`~rl_exit.objectives.base.Loss`."""
        return ponder_loss(self.halting(states, logits), exit_losses(logits, labels), self.weight, self.prior)


def alternate(shape: Shape, epochs: int, options: ObjectiveOptions) -> Objective:
    """BERxiT (Xin et al., 2021) with its learning-to-exit head."""
    head = make_head("lte", shape.num_layers, shape.hidden_size, shape.num_classes)
    return Objective((Phase("alternate", epochs, AlternateLoss(head), heads=True),), {"lte": head})


def pondernet(shape: Shape, epochs: int, options: ObjectiveOptions) -> Objective:
    """PonderNet (Banino et al., 2021) as PALBERT (Balagansky and Gavrilov, 2022) puts it on a language model."""
    head = make_head("palbert", shape.num_layers, shape.hidden_size, shape.num_classes)
    loss = PonderLoss(head, options.ponder_weight, options.ponder_prior)
    return Objective((Phase("pondernet", epochs, loss, heads=True),), {"palbert": head})
