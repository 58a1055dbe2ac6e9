"""What a decision in compiled code reads of the modules: where it lies, and whether it still lies there."""

from __future__ import annotations

from typing import Any

import torch

from rl_exit.models.answer_heads import AnswerHeads
from rl_exit.models.exits import ExitHeads
from rl_exit.models.policy import PolicyHeads

POOLING = {"cls": 0, "mean": 1, "last": 2}


class HeadWeights:
    """Weights of exits, own answers and policy, float32 and contiguous on one device.

    The modules' own memory is meant, so weights that change in place are followed.

    Attributes:
        exits: The exits.
        heads: What the policy answers; None: what the exits do.
        policy: Heads that read the answers alone; None: the probability of what would be answered is pi.
        tensors: Weight and bias of the exits; scale, weight and bias in, weight and bias out of the answers; weight and
            bias in, weight and bias out of the policy.
        device: Where the first of them is.
        whole: Whether the modules have them all where modules keep them.
    """

    def __init__(self, exits: ExitHeads, heads: AnswerHeads | None, policy: PolicyHeads | None) -> None:
        self.exits, self.heads, self.policy = exits, heads, policy
        own = () if heads is None else ("scale", "weight_in", "bias_in", "weight_out", "bias_out")
        decides = () if policy is None else ("weight_in", "bias_in", "weight_out", "bias_out")
        parts = ((exits, ("weight", "bias")), (heads, own), (policy, decides))
        self._places: list[tuple[Any, str]] = [
            (part._parameters if name in part._parameters else part._buffers, name)
            for part, names in parts
            if part is not None
            for name in names
        ]
        found = [place.get(name) for place, name in self._places]
        # Storage of their own name: an address says nothing where what lay there may have been freed.
        self.tensors = [weight.detach() for weight in found if weight is not None]
        self.whole = len(self.tensors) == len(found)
        self.device = self.tensors[0].device if self.tensors else torch.device("meta")
        self._addresses = [weight.data_ptr() for weight in self.tensors]

    def readable(self, kind: str) -> bool:
        """Whether all are where modules keep them (not so in a replica or under a parametrisation), and as promised.

        Args:
            kind: Of the one device, ``"cpu"`` or ``"cuda"``.
        """
        return (
            self.whole
            and self.device.type == kind
            and all(w.dtype == torch.float32 and w.device == self.device and w.is_contiguous() for w in self.tensors)
        )

    def serves(self, exits: ExitHeads, heads: AnswerHeads | None, policy: PolicyHeads | None) -> bool:
        """Whether they are the weights of these modules, where these have them now."""
        if self.exits is not exits or self.heads is not heads or self.policy is not policy:
            return False
        found = [place.get(name) for place, name in self._places]
        return all(a is not None and a.data_ptr() == b for a, b in zip(found, self._addresses, strict=True))

    @property
    def answer_width(self) -> int:
        """A, 0 where the exits answer."""
        return 0 if self.heads is None else self.heads.bias_in.shape[1]

    @property
    def policy_width(self) -> int:
        """W, 0 where the probability of the answer is pi."""
        return 0 if self.policy is None else self.policy.width

    @property
    def shared(self) -> bool:
        """Whether all policy heads have the same weights."""
        return self.policy is not None and self.policy.shared
