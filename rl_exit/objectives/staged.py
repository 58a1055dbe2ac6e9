"""Objectives that first fine-tune the backbone with its last exit and then freeze both: full depth stays as it was."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rl_exit.criteria.head_losses import agreement_loss, gate_loss
from rl_exit.criteria.heads import Head, make_head
from rl_exit.method.distribution import log_exit_distribution
from rl_exit.objectives.base import Loss, Objective, ObjectiveOptions, Phase, Shape
from rl_exit.objectives.losses import exit_losses, imitation_losses

FASTBERT_EPOCHS = 5


def last_exit_loss(states: Tensor, logits: Tensor, labels: Tensor, step: int) -> Tensor:
    """``CE_L``: plain fine-tuning."""
    return exit_losses(logits[:, -1:], labels).mean()


def early_exits_loss(states: Tensor, logits: Tensor, labels: Tensor, step: int) -> Tensor:
    """``sum_{l<L} CE_l``: the exits below the last, on labels."""
    return exit_losses(logits[:, :-1], labels).sum(1).mean()


def imitation_loss(states: Tensor, logits: Tensor, labels: Tensor, step: int) -> Tensor:
    """``sum_{l<L} KL(p_l || p_L)``: the exits below the last, on its probabilities; labels are not read."""
    return imitation_losses(logits).sum(1).mean()


def agreement_target_loss(states: Tensor, logits: Tensor, labels: Tensor, step: int) -> Tensor:
    """Mean over l < L of the cross-entropy to the last exit's answer; labels are not read."""
    return exit_losses(logits[:, :-1], logits[:, -1].argmax(-1)).mean()


@dataclass(frozen=True)
class AgreementLoss:
    """CAT's meta head, exits frozen.

    Attributes:
        agreement: The head.
    """

    agreement: Head

    def __call__(self, states: Tensor, logits: Tensor, labels: Tensor, step: int) -> Tensor:
        """See :class:`~rl_exit.objectives.base.Loss`."""
        return agreement_loss(self.agreement(states, logits), logits)


@dataclass(frozen=True)
class GatedLoss:
    """JEI-DNN: each exit learns from the instances that its gates send to it, the gates from the exits' losses.

    ``sum_l P(l) CE_l``, P from the gates and taken as given, plus the mean cross-entropy of the gates.

    Attributes:
        gates: The gates.
        price: c.
    """

    gates: Head
    price: float

    def __call__(self, states: Tensor, logits: Tensor, labels: Tensor, step: int) -> Tensor:
        """See :class:`~rl_exit.objectives.base.Loss`."""
        losses, gates = exit_losses(logits, labels), self.gates(states, logits)
        sent = log_exit_distribution(gates.detach()).exp()
        return (sent * losses).sum(1).mean() + gate_loss(gates, losses, self.price)


def two_stage(shape: Shape, epochs: int, options: ObjectiveOptions) -> Objective:
    """DeeBERT (Xin et al., 2020): ``CE_L``, then ``sum_{l<L} CE_l`` on the frozen backbone, for as many epochs."""
    return Objective((_fine_tune(epochs), _early("exits", _second(options, epochs), early_exits_loss)))


def self_distillation(shape: Shape, epochs: int, options: ObjectiveOptions) -> Objective:
    """FastBERT (Liu et al., 2020): ``CE_L``, then ``sum_{l<L} KL(p_l || p_L)`` on the frozen backbone, 5 epochs."""
    return Objective((_fine_tune(epochs), _early("distill", _second(options, FASTBERT_EPOCHS), imitation_loss)))


def cat(shape: Shape, epochs: int, options: ObjectiveOptions) -> Objective:
    """CAT (Schuster et al., 2021): ``CE_L``; exits to the last layer's answer; meta head; as many epochs each."""
    head = make_head("cat", shape.num_layers, shape.hidden_size, shape.num_classes)
    second = _second(options, epochs)
    meta = Phase("meta", second, AgreementLoss(head), backbone=False, exits="none", heads=True)
    return Objective((_fine_tune(epochs), _early("exits", second, agreement_target_loss), meta), {"cat": head})


def jei(shape: Shape, epochs: int, options: ObjectiveOptions) -> Objective:
    """JEI-DNN (Regol et al., 2024): ``CE_L``; exits as in DeeBERT to begin with; exits and gates jointly."""
    head = make_head("jei", shape.num_layers, shape.hidden_size, shape.num_classes)
    second = _second(options, epochs)
    joint = Phase("joint", second, GatedLoss(head, options.gate_price), backbone=False, exits="early", heads=True)
    return Objective((_fine_tune(epochs), _early("exits", second, early_exits_loss), joint), {"jei": head})


def _fine_tune(epochs: int) -> Phase:
    return Phase("fine_tune", epochs, last_exit_loss, exits="last")


def _early(name: str, epochs: int, loss: Loss) -> Phase:
    return Phase(name, epochs, loss, backbone=False, exits="early")


def _second(options: ObjectiveOptions, usual: int) -> int:
    return usual if options.second_epochs is None else options.second_epochs
