"""An exit decision in one call of compiled code (``native_exits.c``, :mod:`rl_exit.native`).

Beside a small model's layer at batch size 1 the decision's arithmetic is nothing, and its forty operations of torch or
numpy are everything: a layer sweeps the caches, so that each of them finds its own code cold. One call is a tenth of
that. The slow twins are the modules' own methods; tests hold them together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rl_exit.criteria.base import Parted
from rl_exit.models.answer_heads import AnswerHeads
from rl_exit.models.backbones import StepState
from rl_exit.models.decision import CompiledExits
from rl_exit.models.exits import ExitHeads
from rl_exit.models.head_weights import POOLING, HeadWeights
from rl_exit.models.policy import PolicyHeads
from rl_exit.models.quick_policy import KEY
from rl_exit.native import function

SOURCE = Path(__file__).with_name("native_exits.c")
_SIZES = ("layers", "hidden", "classes", "width", "answer_width", "pooling", "shared")
_ARRAYS = (
    *("exit_weight", "exit_bias", "scale", "answer_in", "answer_in_bias", "answer_out", "answer_out_bias"),
    *("policy_in", "policy_in_bias", "policy_out", "policy_out_bias"),
)


class _Heads(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in _SIZES), *((name, ctypes.c_void_p) for name in _ARRAYS)]


class NativeDecision(NamedTuple):
    """See :class:`rl_exit.models.decision.Decision`; a part is taken out of what was written when it is asked for.

    Attributes:
        memory: float32 [B, 4C + 4]: 3C + 3 numbers as :class:`rl_exit.models.quick_policy.QuickPolicy` keeps them, then
            the answer's logits, then the odds.
        apart: Whose odds exceed the cut, and who stays; None: nobody's do.
    """

    memory: Tensor
    apart: Parted | None

    @property
    def answers(self) -> Tensor:
        """Logits of what each row would answer here, [B, C]."""
        return self.memory[:, -(self.memory.shape[1] // 4) : -1]

    @property
    def odds(self) -> Tensor:
        """Log-odds of Exit, [B]."""
        return self.memory[:, -1]


class NativeExits(CompiledExits):
    """In C, on the CPU; weights and hidden states are float32.

    Between two layers each piece of Python and each allocation finds its own code cold, so there are as few as can be:
    what a decision says lies in its rows' memory, which goes with them.

    Args:
        weights: Of the modules.
        pooling: ``"cls"``, ``"mean"`` or ``"last"``.
        decide: The compiled function.
    """

    def __init__(self, weights: HeadWeights, pooling: str, decide: Callable[..., int]) -> None:
        super().__init__(weights, torch.float32)
        self._decide = decide
        exits, addresses = weights.exits, [weight.data_ptr() for weight in weights.tensors]
        widths = weights.policy_width, weights.answer_width
        sizes = (exits.num_layers, exits.hidden_size, exits.num_classes, *widths, POOLING[pooling], int(weights.shared))
        arrays = addresses if weights.heads is not None else [*addresses[:2], *(None,) * 5, *addresses[2:]]
        self._structure = _Heads(*sizes, *arrays, *(None,) * (len(_ARRAYS) - len(arrays)))
        self._pointer = ctypes.addressof(self._structure)
        self._kept = 4 * exits.num_classes + 4  # numbers of memory a row

    @classmethod
    def of(
        cls, exits: ExitHeads, heads: AnswerHeads | None, policy: PolicyHeads | None, pooling: str, dtype: torch.dtype
    ) -> NativeExits | None:
        """The compiled form; None where there is none on this machine, or something is not float32 on the CPU."""
        decide = _function()
        if decide is None or dtype != torch.float32:
            return None
        weights = HeadWeights(exits, heads, policy)
        if not weights.readable("cpu"):
            return None
        return cls(weights, pooling, decide)

    def reads(self, hidden: Tensor) -> bool:
        """See :meth:`CompiledExits.reads`."""
        return hidden.is_cpu and hidden.dtype is torch.float32

    def decide(
        self, layer: int, hidden: Tensor, state: StepState, carry: dict[str, Tensor], cut: float
    ) -> NativeDecision:
        """Decide for all rows; see :meth:`CompiledExits.decide`."""
        rows, tokens, _ = hidden.shape
        if not hidden.is_contiguous():
            hidden = hidden.contiguous()
        before = 0
        if layer > 1:
            memory = carry[KEY]
            if memory.stride() != (self._kept, 1):
                memory = self._widened(memory)
            before = memory.data_ptr()
        # As the hidden states are: to be told a type and a device costs four times as much.
        after = hidden.new_empty(rows, self._kept)
        order = state.lengths.new_empty(rows) if rows > 1 else None
        leaving = self._decide(
            self._pointer,
            layer,
            hidden.data_ptr(),
            rows,
            tokens,
            state.lengths.data_ptr() if state.padded else None,
            cut,
            before,
            after.data_ptr(),
            None if order is None else order.data_ptr(),
        )
        if leaving < 0:
            raise MemoryError(f"no memory for an exit decision on {rows} rows")
        carry[KEY] = after
        if not leaving:
            return NativeDecision(after, None)
        numbers = np.zeros(1, dtype=np.int64) if order is None else order.numpy()
        return NativeDecision(after, Parted(numbers[:leaving], numbers[leaving:]))

    def _widened(self, memory: Tensor) -> Tensor:
        """Memory that somebody else has kept, as the compiled function reads it."""
        return F.pad(memory, (0, self._kept - memory.shape[1])).contiguous()


@cache
def _function() -> Callable[..., int] | None:
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    arguments = (pointer, long, pointer, long, long, pointer, ctypes.c_float, *(pointer,) * 3)
    return function(SOURCE, "rl_exit_decide", arguments, long)
