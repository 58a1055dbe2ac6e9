"""An exit decision on a GPU in one launch (:func:`rl_exit.gpu_kernels.decide`), and one question: who leaves."""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_exit.criteria.base import Parted, parted
from rl_exit.gpu import kernels, on, power_of_two
from rl_exit.models.answer_heads import AnswerHeads
from rl_exit.models.backbones import StepState
from rl_exit.models.decision import CompiledExits
from rl_exit.models.exits import ExitHeads
from rl_exit.models.head_weights import POOLING, HeadWeights
from rl_exit.models.policy import PolicyHeads
from rl_exit.models.quick_policy import KEY

WIDEST = {"classes": 128, "answer_width": 256, "policy_width": 256}
"""A row's figures lie in the registers of one block of threads."""
CHUNK, BLOCK = 64, 16
_failed: set[tuple[Any, ...]] = set()  # constants for which the kernel could not be had


class GpuDecision(NamedTuple):
    """See :class:`rl_exit.models.decision.Decision`."""

    answers: Tensor
    odds: Tensor
    apart: Parted | None


class GpuExits(CompiledExits):
    """By Triton, on a GPU; weights are float32, the hidden states of any precision.

    Args:
        weights: Of the modules, float32.
        pooling: ``"cls"``, ``"mean"`` or ``"last"``.
        decide: The kernel.
        dtype: Of the hidden states, any float.
    """

    def __init__(self, weights: HeadWeights, pooling: str, decide: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weights, dtype)
        self._decide = decide
        exits, tensors = weights.exits, weights.tensors
        nothing = tensors[0]  # stands where nothing is read
        own = tensors[2:7] if weights.heads is not None else [nothing] * 5
        decides = tensors[-4:] if weights.policy is not None else [nothing] * 4
        self._arrays = (*tensors[:2], *own, *decides)
        self._log_classes = math.log(exits.num_classes)
        self._constants = {
            "LAYERS": exits.num_layers,
            "SIZE": exits.hidden_size,
            "CLASSES": exits.num_classes,
            "WIDE": weights.answer_width,
            "WIDTH": weights.policy_width,
            "POOLING": POOLING[pooling],
            "SHARED": weights.shared,
            "CHUNK": min(CHUNK, power_of_two(exits.hidden_size)),
            "BLOCK": BLOCK,
            "C2": power_of_two(exits.num_classes),
            "A2": power_of_two(max(weights.answer_width, 1)),
            "W2": power_of_two(max(weights.policy_width, 1)),
        }

    @classmethod
    def of(
        cls, exits: ExitHeads, heads: AnswerHeads | None, policy: PolicyHeads | None, pooling: str, dtype: torch.dtype
    ) -> GpuExits | None:
        """None where there is no kernel, or the weights are not float32 on a GPU, or too wide for it."""
        found = kernels()
        weights = None if found is None else HeadWeights(exits, heads, policy)
        if found is None or weights is None or not weights.readable("cuda"):
            return None
        sizes = {
            "classes": exits.num_classes,
            "answer_width": weights.answer_width,
            "policy_width": weights.policy_width,
        }
        if any(sizes[key] > WIDEST[key] for key in sizes):
            return None
        made = cls(weights, pooling, found.decide, dtype)
        if (shape := (*made._constants.values(), dtype)) in _failed:
            return None
        hidden = torch.zeros((1, 1, exits.hidden_size), device=weights.device, dtype=dtype)
        try:  # all that will be asked for: a text is not to be given up at its second layer
            for lengths in (None, torch.ones(1, dtype=torch.int64, device=weights.device)):
                carry: dict[str, Tensor] = {}
                for layer in (1, 2):
                    made._launch(min(layer, exits.num_layers - 1), hidden, lengths, carry, 0.0)
        except Exception as error:  # noqa: BLE001 - whatever a compiler may raise, torch computes the same
            _failed.add(shape)
            logging.getLogger(__name__).warning("no kernel for these exits: %s: %s", type(error).__name__, error)
            return None
        return made

    def decide(self, layer: int, hidden: Tensor, state: StepState, carry: dict[str, Tensor], cut: float) -> GpuDecision:
        """Decide for all rows; see :meth:`CompiledExits.decide`.

        With an infinite cut the device is asked nothing.
        """
        lengths = state.device_lengths if state.padded else None
        answers, odds, leaving = self._launch(layer, hidden.contiguous(), lengths, carry, cut)
        return GpuDecision(answers, odds, None if cut == math.inf else parted(leaving))

    def _launch(
        self, layer: int, hidden: Tensor, lengths: Tensor | None, carry: dict[str, Tensor], cut: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Answers [B, C], odds [B] and whether they exceed the cut, bool [B]."""
        rows, tokens, _ = hidden.shape
        like: dict[str, Any] = {"dtype": torch.float32, "device": hidden.device}
        after = torch.empty((rows, 3 * self._classes + 3), **like)
        answers = torch.empty((rows, self._classes), **like)
        odds, leaving = torch.empty(rows, **like), torch.empty(rows, dtype=torch.bool, device=hidden.device)
        with on(hidden.device):
            self._decide[(rows,)](
                hidden,
                answers if lengths is None else lengths,
                *self._arrays,
                carry[KEY].contiguous() if layer > 1 else after,
                after,
                answers,
                odds,
                leaving,
                tokens,
                layer,
                cut,
                self._log_classes,
                PADDED=lengths is not None,
                FIRST=layer == 1,
                **self._constants,
            )
        carry[KEY] = after
        return answers, odds, leaving
