"""Criteria on the exit's own probabilities, each on one layer: entropy, normalised entropy, largest probability."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rl_exit.criteria.base import Carry, LayerView, Scored, checked_number
from rl_exit.criteria.heads import entropy


@dataclass(frozen=True)
class MaxProbability(Scored):
    """Leave where ``max softmax(z_l) >= threshold``.

    Attributes:
        threshold: In [0, 1]; usual 0.7-0.99.
    """

    threshold: float
    name = "max_probability"
    comparison = ">="

    def __post_init__(self) -> None:
        checked_number(self.name, "threshold", self.threshold, self.bounds)

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`; the largest probability."""
        return view.logits.float().softmax(-1).amax(-1)


@dataclass(frozen=True)
class Entropy(Scored):
    """Leave where ``-sum p ln p < threshold`` in nats (DeeBERT, Xin et al. 2020).

    Attributes:
        threshold: S, 0 or more; 0 never leaves early; usual 0.01-0.6, at most ln C makes a difference.
    """

    threshold: float
    name = "entropy"
    comparison = "<"
    bounds = (0.0, math.inf)

    def __post_init__(self) -> None:
        checked_number(self.name, "threshold", self.threshold, self.bounds, " (nats)")

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`; the entropy, nats."""
        return entropy(view.logits.float())


@dataclass(frozen=True)
class FastBERT(Scored):
    """Leave where ``entropy / ln C < threshold`` (FastBERT, Liu et al. 2020).

    Attributes:
        threshold: The paper's *speed*, in [0, 1]; 0 never leaves early; usual 0.1-0.9.
    """

    threshold: float
    name = "fastbert"
    comparison = "<"

    def __post_init__(self) -> None:
        checked_number(self.name, "threshold", self.threshold, self.bounds)

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`; the entropy as a share of ln C."""
        return normalised_entropy(view.logits)


def normalised_entropy(logits: Tensor) -> Tensor:
    """``entropy / ln C``, 0..1. [B, C] -> [B]."""
    return entropy(logits.float()) / math.log(logits.shape[-1])
