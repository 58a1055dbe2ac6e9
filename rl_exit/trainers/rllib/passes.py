"""The pass over blocks of states for sampler and learner of one process, with its gradient.

On the CPU both go through :mod:`rl_exit.models.policy_arrays`, which is what remote samplers run: a block's exit logits
are then the same to the last bit wherever they are computed. On an accelerator the heads run as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl_exit.models.policy import PolicyHeads
from rl_exit.models.policy_arrays import NAMES, Activations, Weights, backward, forward


class _Pass(torch.autograd.Function):
    """Outputs of sets of heads from states and their weights, flat; the states get no gradient."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        sets = _sets(weights)
        outputs, activations = forward(sets, states.numpy())
        ctx.save_for_backward(states, *weights)  # raises if a weight has changed before the backward pass
        ctx.kept = (activations.scale, activations.hidden)
        return tuple(torch.from_numpy(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, *weights = ctx.saved_tensors
        scale, hidden = ctx.kept
        inputs = states.numpy()[:, : scale.shape[0]].transpose(1, 0, 2)
        found = backward(_sets(weights), Activations(inputs, scale, hidden), [part.numpy() for part in gradients])
        return None, *(torch.from_numpy(one[name]) for one in found for name in NAMES)


def heads_pass(states: Tensor, *heads: PolicyHeads) -> tuple[Tensor, ...]:
    """Outputs of one or more sets of heads of equal width on the same states, each [B, L-1] with graph.

    Args:
        states: [B, L, H] or [B, L-1, H].
        *heads: The sets.
    """
    first = heads[0].weight_in
    if first.device.type != "cpu" or first.dtype != torch.float32:
        return tuple(one(states) for one in heads)
    return _Pass.apply(states.to(first), *(getattr(one, name) for one in heads for name in NAMES))


def arrays(heads: PolicyHeads) -> Weights:
    """Weights as float32 arrays, views of the parameters on the CPU."""
    return {name: getattr(heads, name).detach().to("cpu", torch.float32).numpy() for name in NAMES}


def _sets(weights: Any) -> list[dict[str, Any]]:
    values = [weight.detach().numpy() for weight in weights]
    size = len(NAMES)
    return [dict(zip(NAMES, values[start : start + size], strict=True)) for start in range(0, len(values), size)]
