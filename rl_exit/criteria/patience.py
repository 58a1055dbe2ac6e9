"""Criteria that wait for consecutive exits: PABEE (classes and numbers), PCEE-BERT, BEEM."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rl_exit.criteria.base import Carry, LayerView, Scored, checked_count, checked_number
from rl_exit.criteria.confidence import normalised_entropy
from rl_exit.criteria.learned import Learned
from rl_exit.criteria.with_head import check_learned, check_sizes
from rl_exit.errors import ConfigError


@dataclass(frozen=True)
class PABEE(Scored):
    """Leave when ``patience`` exits in a row have confirmed the prediction of the exit before (Zhou et al. 2020).

    The counter starts at 0 at layer 1, so layer ``patience + 1`` is the first at which a row can leave.

    Attributes:
        patience: t >= 1; usual L/2; L or more never leaves early.
    """

    patience: int
    name = "pabee"
    comparison = ">="
    swept = "patience"
    whole = True
    bounds = (1, math.inf)

    def __post_init__(self) -> None:
        checked_count(self.name, "patience", self.patience, "a whole number from 1")

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`; the counter."""
        predicted = view.logits.argmax(-1)
        if "last" in carry:
            carry["count"] = torch.where(predicted == carry["last"], carry["count"] + 1.0, 0.0)
        else:
            carry["count"] = torch.zeros(view.batch_size, device=view.device)
        carry["last"] = predicted
        return carry["count"]


@dataclass(frozen=True)
class PABEERegression(Scored):
    """PABEE for numbers: leave after ``patience`` exits in a row with ``|y_l - y_{l-1}| < threshold``.

    The score is the largest of the last ``patience`` differences.

    Attributes:
        threshold: tau, 0 or more, in the unit of the answer; 0 never leaves early.
        patience: t >= 1; layer t+1 is the first at which a row can leave.
    """

    threshold: float
    patience: int = 1
    name = "pabee_regression"
    comparison = "<"
    bounds = (0.0, math.inf)

    def __post_init__(self) -> None:
        checked_number(self.name, "threshold", self.threshold, self.bounds)
        checked_count(self.name, "patience", self.patience, "a whole number from 1")

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`.

        Raises:
            ConfigError: The exits give classes, not one number.
        """
        if view.logits.shape[-1] != 1:
            raise ConfigError(
                f"criterion 'pabee_regression' needs exits that give one number, these give {view.logits.shape[-1]} "
                "classes; for classes: 'pabee'"
            )
        answer = view.logits[:, 0].float()
        change = (answer - carry["last"]).abs() if "last" in carry else torch.full_like(answer, math.inf)
        carry["last"] = answer
        return _largest_of_last(self.patience, change, carry)


@dataclass(frozen=True)
class PCEE(Scored):
    """Leave after ``patience`` confident exits in a row: ``entropy / ln C < threshold`` (PCEE-BERT, Zhang et al. 2022).

    The score is the largest of the last ``patience`` normalised entropies.

    Attributes:
        threshold: tau in [0, 1]; 0 never leaves early; usual k/18, k = 1..9.
        patience: t >= 1, the first layer at which a row can leave; usual 2.
    """

    threshold: float
    patience: int = 2
    name = "pcee"
    comparison = "<"

    def __post_init__(self) -> None:
        checked_number(self.name, "threshold", self.threshold, self.bounds)
        checked_count(self.name, "patience", self.patience, "a whole number from 1")

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`."""
        return _largest_of_last(self.patience, normalised_entropy(view.logits), carry)


@dataclass(frozen=True)
class BEEM(Scored):
    """Leave when the weighted confidence gathered over agreeing exits reaches the threshold (Bajpai & Hanawal 2025).

    ``S_l = S_{l-1} + w_l max softmax(z_l)`` while the prediction is that of the exit before; otherwise the sum starts
    anew with this exit's own term, as at layer 1. Leave where ``S_l >= threshold``.

    Attributes:
        threshold: a, 0 or more; at most sum w.
        learned: Holds ``weight`` [L-1], the accuracy of each exit; None: ``w_l = 0.1 l``.
    """

    threshold: float
    learned: Learned | None = field(default=None, repr=False)
    name = "beem"
    comparison = ">="
    bounds = (0.0, math.inf)

    def __post_init__(self) -> None:
        checked_number(self.name, "threshold", self.threshold, self.bounds)
        if self.learned is not None:
            check_learned(self.name, self.learned)

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`; S_l."""
        weight = 0.1 * layer
        if self.learned is not None:
            check_sizes(self.learned, view)
            weight = float(self.learned.tensors["weight"][layer - 1])
        best = view.logits.float().softmax(-1).max(-1)
        own = weight * best.values
        if "last" in carry:
            own = torch.where(best.indices == carry["last"], carry["sum"] + own, own)
        carry["last"], carry["sum"] = best.indices, own
        return own


def _largest_of_last(count: int, value: Tensor, carry: Carry) -> Tensor:
    """Largest of the last ``count`` values, infinite until there are as many; the carry keeps ``count - 1`` of them."""
    if count == 1:
        return value
    before = carry.get("recent")
    if before is None:
        before = torch.full((len(value), count - 1), math.inf, device=value.device)
    window = torch.cat([before, value.unsqueeze(1)], 1)
    carry["recent"] = window[:, 1:]
    return window.amax(1)
