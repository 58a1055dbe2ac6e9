"""ConsistentEE: leave where the learned policy says Exit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from rl_exit.criteria.base import Carry, LayerView, Parted, Scored, checked_number, parted
from rl_exit.evaluation import log_odds, threshold_at


@dataclass(frozen=True)
class ConsistentEE(Scored):
    """Leave at the first layer with ``pi > threshold`` (docs/method.md: inference).

    Attributes:
        threshold: In [0, 1]; the paper's is 0.5; higher leaves later, 1 never leaves early.
    """

    threshold: float = 0.5
    name = "consistentee"

    def __post_init__(self) -> None:
        checked_number(self.name, "threshold", self.threshold, self.bounds)

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """Log-odds of Exit, which keep their order where pi is 1; see :meth:`rl_exit.criteria.base.Scored.score`."""
        return view.exit_logit(carry)

    def answer(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """What the policy answers, [B, C]: where the model has heads for it, theirs; else what the exit says."""
        return view.answer

    def leave(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """``pi > threshold``, compared as log-odds."""
        return self.score(layer, view, carry).float() > log_odds(self.threshold)

    def leaving(self, layer: int, view: LayerView, carry: Carry) -> Parted | None:
        """As :meth:`leave`, in place of it, for an engine that wants row numbers on the CPU; None: nobody leaves."""
        mine = type(self)
        made_of_this = mine is not ConsistentEE
        if made_of_this and (mine.leave is not ConsistentEE.leave or mine.score is not ConsistentEE.score):
            return parted(self.leave(layer, view, carry))
        return view.leaving(self._cut, carry)

    @cached_property
    def _cut(self) -> float:
        return log_odds(self.threshold)

    @classmethod
    def threshold_above(cls, value: float) -> float:
        """``pi`` at these log-odds; see :meth:`rl_exit.criteria.base.Scored.threshold_above`."""
        return threshold_at(value)
