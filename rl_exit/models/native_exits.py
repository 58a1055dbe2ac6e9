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
from typing import Any

import torch
from torch import Tensor

from rl_exit.criteria.base import Parted
from rl_exit.models.answer_heads import AnswerHeads
from rl_exit.models.backbones import StepState
from rl_exit.models.decision import CompiledExits, Decision
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


class NativeExits(CompiledExits):
    """In C, on the CPU; weights and hidden states are float32.

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

    @classmethod
    def of(
        cls, exits: ExitHeads, heads: AnswerHeads | None, policy: PolicyHeads | None, pooling: str, dtype: torch.dtype
    ) -> NativeExits | None:
        """The compiled form; None where there is none on this machine, or something is not float32 on the CPU."""
        decide = _function()
        weights = None if decide is None else HeadWeights(exits, heads, policy)
        if decide is None or weights is None or not weights.readable("cpu") or dtype != torch.float32:
            return None
        return cls(weights, pooling, decide)

    def decide(self, layer: int, hidden: Tensor, state: StepState, carry: dict[str, Tensor], cut: float) -> Decision:
        """Decide for all rows; see :meth:`CompiledExits.decide`."""
        rows, tokens, _ = hidden.shape
        if not hidden.is_contiguous():
            hidden = hidden.contiguous()
        before = 0
        if layer > 1:
            memory = carry[KEY]
            if not memory.is_contiguous():
                memory = memory.contiguous()
            before = memory.data_ptr()
        like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        after, answers = torch.empty((rows, self._kept), **like), torch.empty((rows, self._classes), **like)
        odds, order = torch.empty(rows, **like), torch.empty(rows, dtype=torch.int64, device="cpu")
        leaving = self._decide(
            self._pointer,
            layer,
            hidden.data_ptr(),
            rows,
            tokens,
            state.lengths.data_ptr() if state.padded else 0,
            cut,
            before,
            after.data_ptr(),
            answers.data_ptr(),
            odds.data_ptr(),
            order.data_ptr(),
        )
        if leaving < 0:
            raise MemoryError(f"no memory for an exit decision on {rows} rows")
        carry[KEY] = after
        if not leaving:
            return Decision(answers, odds, None)
        numbers = order.numpy()
        return Decision(answers, odds, Parted(numbers[:leaving], numbers[leaving:]))


@cache
def _function() -> Callable[..., int] | None:
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    arguments = (pointer, long, pointer, long, long, pointer, ctypes.c_float, *(pointer,) * 5)
    return function(SOURCE, "rl_exit_decide", arguments, long)
