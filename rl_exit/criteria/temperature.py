"""Right-Tool: the largest probability after each exit's logits were divided by its own temperature."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from rl_exit.criteria.base import Carry, LayerView, Scored, checked_number
from rl_exit.criteria.learned import Learned
from rl_exit.criteria.with_head import check_learned, check_sizes


@dataclass(frozen=True)
class RightTool(Scored):
    """Leave where ``max softmax(z_l / T_l) >= threshold`` (Schwartz et al. 2020).

    Attributes:
        learned: Holds ``temperature`` [L-1], fitted on data that the exits were not trained on.
        threshold: c in [0, 1]; usual 0.7-0.99.
    """

    learned: Learned = field(repr=False)
    threshold: float = 0.9
    name = "right_tool"
    comparison = ">="

    def __post_init__(self) -> None:
        check_learned(self.name, self.learned)
        checked_number(self.name, "threshold", self.threshold, self.bounds)

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`."""
        check_sizes(self.learned, view)
        temperature = float(self.learned.tensors["temperature"][layer - 1])
        return (view.logits.float() / temperature).softmax(-1).amax(-1)
