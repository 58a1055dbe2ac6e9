"""What a training objective is: phases in a row, each with its loss, its length and the parts that it trains.

An objective is put together from plain parts, there is nothing to inherit from: a loss is any callable of the shape of
:class:`Loss`; heads of learned criteria belong to the objective, and its losses hold the same modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from rl_exit.criteria.heads import Head


class Loss(Protocol):
    """The loss of one phase."""

    def __call__(self, states: Tensor, logits: Tensor, labels: Tensor, step: int) -> Tensor:
        """Compute it.

        Args:
            states: [B, L, H], pooled states.
            logits: [B, L, C] float32, of all exits.
            labels: [B] int64.
            step: Updates done in this phase, from 0.

        Returns:
            Scalar, mean over the batch, in nats where it is a cross-entropy.
        """


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one loss, its own optimiser and its own schedule of the learning rate.

    Attributes:
        name: What it does, for logs.
        epochs: Passes over the training set.
        loss: Its loss.
        backbone: Whether the backbone is trained; if not, it runs without dropout and without gradient.
        exits: Which exit classifiers are trained: ``"all"``, ``"last"`` (L), ``"early"`` (1..L-1) or ``"none"``. The
            others keep their weights to the bit; a last exit that is kept answers without dropout.
        heads: Whether the objective's own heads are trained.
        leaves: Of a decoder: whether tokens leave as the policy draws, so that later ones see what they present.
    """

    name: str
    epochs: int
    loss: Loss
    backbone: bool = True
    exits: Literal["all", "last", "early", "none"] = "all"
    heads: bool = False
    leaves: bool = False


@dataclass(frozen=True)
class Objective:
    """How backbone, exits and heads are trained.

    Attributes:
        phases: In order; one of 0 epochs is passed over.
        heads: Heads of learned criteria that are trained along, by the criterion's word; saved beside the model.
    """

    phases: tuple[Phase, ...]
    heads: Mapping[str, Head] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """Passes over the training set in all phases together."""
        return sum(phase.epochs for phase in self.phases)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model that an objective is made for.

    Attributes:
        num_layers: L.
        hidden_size: H.
        num_classes: C.
    """

    num_layers: int
    hidden_size: int
    num_classes: int


@dataclass(frozen=True)
class ObjectiveOptions:
    """Settings of the objectives; each reads its own.

    Attributes:
        second_epochs: Passes in each phase after the first; None: what the objective's source says.
        distillation: d in [0, 1], share of the last exit's answer in the target of the exits below.
        temperature: T of that answer.
        anchor: Weight of ``CE_L`` beside the loss of the task step.
        ponder_weight: beta of PonderNet.
        ponder_prior: lambda_p of PonderNet, in (0, 1).
        gate_price: c of JEI-DNN, nats that running all L layers costs.
    """

    second_epochs: int | None = None
    distillation: float = 0.0
    temperature: float = 1.0
    anchor: float = 0.0
    ponder_weight: float = 0.5
    ponder_prior: float = 0.1
    gate_price: float = 0.5
