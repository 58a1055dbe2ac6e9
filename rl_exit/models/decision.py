"""An exit decision in one call: what it gives, and what its compiled forms have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from rl_exit.criteria.base import Parted
from rl_exit.models.answer_heads import AnswerHeads
from rl_exit.models.backbones import StepState
from rl_exit.models.exits import ExitHeads
from rl_exit.models.head_weights import HeadWeights
from rl_exit.models.policy import PolicyHeads


class Decision(Protocol):
    """One decision for B rows."""

    @property
    def answers(self) -> Tensor:
        """Logits of what each row would answer here, float32 [B, C]."""

    @property
    def odds(self) -> Tensor:
        """Log-odds of Exit, float32 [B]."""

    @property
    def apart(self) -> Parted | None:
        """Whose odds exceed the cut, and who stays; None: nobody's do."""


class CompiledExits(ABC):
    """Exits, the policy's own answers, and a policy that reads answers, in compiled code.

    The modules' own memory is read, so weights that change in place are followed; :meth:`serves` says whether they
    still are where they were.

    Args:
        weights: Of the modules.
        dtype: Of the hidden states.

    Attributes:
        device: Where the hidden states must be.
        dtype: What they must be.
    """

    def __init__(self, weights: HeadWeights, dtype: torch.dtype) -> None:
        self._weights, self.device, self.dtype = weights, weights.device, dtype
        self._classes = weights.exits.num_classes

    def reads(self, hidden: Tensor) -> bool:
        """Whether it decides on hidden states like these."""
        return hidden.dtype == self.dtype and hidden.device == self.device

    @abstractmethod
    def decide(self, layer: int, hidden: Tensor, state: StepState, carry: dict[str, Tensor], cut: float) -> Decision:
        """Decide for all rows.

        Args:
            layer: 1..L-1, asked in turn.
            hidden: [B, T, H], what the exits pool.
            state: Its lengths.
            carry: Keeps the memory that :class:`rl_exit.models.quick_policy.QuickPolicy` keeps, and may keep more of
                each row behind it.
            cut: Log-odds above which a row leaves.
        """

    def serves(self, exits: ExitHeads, heads: AnswerHeads | None, policy: PolicyHeads | None) -> bool:
        """Whether it reads the memory of these modules."""
        return self._weights.serves(exits, heads, policy)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Addresses mean nothing to a copy of the model, which makes its own at its first decision."""
        return _nothing, ()


def _nothing() -> None:
    return None
