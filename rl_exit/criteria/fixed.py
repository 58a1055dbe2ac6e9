"""Fixed depth: every instance leaves at the same layer (static layer pruning)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl_exit.criteria.base import Carry, LayerView, Scored, checked_count


@dataclass(frozen=True)
class Fixed(Scored):
    """Leave at layer ``depth``; a depth of L or more is full depth. The score is the layer's number.

    Attributes:
        depth: k >= 1.
    """

    depth: int
    name = "fixed"
    comparison = ">="
    swept = "depth"
    whole = True
    bounds = (1, float("inf"))

    def __post_init__(self) -> None:
        checked_count(self.name, "depth", self.depth, "a layer number from 1")

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`."""
        return torch.full((view.batch_size,), float(layer), device=view.device)
