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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_exit.criteria.base import Parted
from rl_exit.models.answer_heads import AnswerHeads
from rl_exit.models.backbones import StepState
from rl_exit.models.exits import ExitHeads
from rl_exit.models.policy import PolicyHeads
from rl_exit.models.quick_policy import KEY
from rl_exit.native import function

SOURCE = Path(__file__).with_name("native_exits.c")
POOLING = {"cls": 0, "mean": 1, "last": 2}
_SIZES = ("layers", "hidden", "classes", "width", "answer_width", "pooling", "shared")
_ARRAYS = (
    *("exit_weight", "exit_bias", "scale", "answer_in", "answer_in_bias", "answer_out", "answer_out_bias"),
    *("policy_in", "policy_in_bias", "policy_out", "policy_out_bias"),
)


class _Heads(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in _SIZES), *((name, ctypes.c_void_p) for name in _ARRAYS)]


class Decision(NamedTuple):
    """One decision.

    Attributes:
        answers: float32 [B, C], logits of what each row would answer here.
        odds: float32 [B], log-odds of Exit.
        apart: Whose odds exceed the cut, and who stays; None: nobody's do.
    """

    answers: Tensor
    odds: Tensor
    apart: Parted | None


class NativeExits:
    """Exits, the policy's own answers, and a policy that reads answers, float32 on the CPU.

    The modules' own memory is read, so weights that change in place are followed; :meth:`serves` says whether they
    still are where they were.

    Args:
        exits: The exits.
        heads: What the policy answers; None: what the exits do.
        policy: Heads that read the answers alone; None: the probability of what would be answered is pi.
        pooling: ``"cls"``, ``"mean"`` or ``"last"``.
        decide: The compiled function.
    """

    def __init__(
        self,
        exits: ExitHeads,
        heads: AnswerHeads | None,
        policy: PolicyHeads | None,
        pooling: str,
        decide: Callable[..., int],
    ) -> None:
        self._decide = decide
        self._modules = exits, heads, policy
        self._places = _places(exits, heads, policy)
        # Storage of their own name: an address says nothing where what lay there may have been freed.
        self._weights = [place[name].detach() for place, name in self._places]
        self._addresses = [weight.data_ptr() for weight in self._weights]
        wide = 0 if heads is None else heads.bias_in.shape[1]
        width, shared = (0, 0) if policy is None else (policy.width, int(policy.shared))
        sizes = (exits.num_layers, exits.hidden_size, exits.num_classes, width, wide, POOLING[pooling], shared)
        arrays = self._addresses if heads is not None else [*self._addresses[:2], *(None,) * 5, *self._addresses[2:]]
        self._structure = _Heads(*sizes, *arrays, *(None,) * (len(_ARRAYS) - len(arrays)))
        self._pointer = ctypes.addressof(self._structure)
        self._classes = exits.num_classes
        self._kept = 3 * exits.num_classes + 3

    @classmethod
    def of(
        cls, exits: ExitHeads, heads: AnswerHeads | None, policy: PolicyHeads | None, pooling: str
    ) -> NativeExits | None:
        """The compiled form; None where there is none on this machine, or the weights are not float32 on the CPU."""
        decide = _function()
        if decide is None:
            return None
        places = _places(exits, heads, policy)
        if not all(name in place for place, name in places):  # a replica, or a parametrisation
            return None
        found = [place[name] for place, name in places]
        if not all(w.dtype == torch.float32 and w.device.type == "cpu" and w.is_contiguous() for w in found):
            return None
        return cls(exits, heads, policy, pooling, decide)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Addresses mean nothing to a copy of the model, which makes its own at its first decision."""
        return _nothing, ()

    def serves(self, exits: ExitHeads, heads: AnswerHeads | None, policy: PolicyHeads | None) -> bool:
        """Whether it reads the memory of these modules."""
        mine = self._modules
        if mine[0] is not exits or mine[1] is not heads or mine[2] is not policy:
            return False
        found = [place.get(name) for place, name in self._places]
        return all(a is not None and a.data_ptr() == b for a, b in zip(found, self._addresses, strict=True))

    def decide(self, layer: int, hidden: Tensor, state: StepState, carry: dict[str, Tensor], cut: float) -> Decision:
        """Decide for all rows.

        Args:
            layer: 1..L-1, asked in turn.
            hidden: float32 [B, T, H] on the CPU, what the exits pool.
            state: Its lengths.
            carry: Keeps the memory that :class:`rl_exit.models.quick_policy.QuickPolicy` keeps.
            cut: Log-odds above which a row leaves.
        """
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


def _places(exits: ExitHeads, heads: AnswerHeads | None, policy: PolicyHeads | None) -> list[tuple[Any, str]]:
    """Where the modules keep the tensors that are read, in the order of the structure."""
    own = () if heads is None else ("scale", "weight_in", "bias_in", "weight_out", "bias_out")
    decides = () if policy is None else ("weight_in", "bias_in", "weight_out", "bias_out")
    parts = ((exits, ("weight", "bias")), (heads, own), (policy, decides))
    return [
        (part._parameters if name in part._parameters else part._buffers, name)
        for part, names in parts
        if part is not None
        for name in names
    ]


def _nothing() -> None:
    return None


@cache
def _function() -> Callable[..., int] | None:
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    arguments = (pointer, long, pointer, long, long, pointer, ctypes.c_float, *(pointer,) * 5)
    return function(SOURCE, "rl_exit_decide", arguments, long)
