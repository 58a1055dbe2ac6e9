"""The exit policy on plain arrays: what a sampling process needs of :class:`~rl_exit.models.policy.PolicyHeads`.

numpy alone, because importing torch costs a process 130 MB of its own; and the batched product of numpy's BLAS takes
two thirds of torch's time at these sizes. A learner in the same process goes through the same functions
(:mod:`rl_exit.trainers.rllib.passes`), so that local and remote sampling agree to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Weights = Mapping[str, FloatArray]
"""State dict of :class:`~rl_exit.models.policy.PolicyHeads` as float32 arrays."""

NAMES = ("weight_in", "bias_in", "weight_out", "bias_out")


@dataclass(frozen=True)
class Activations:
    """What the backward pass needs; the W hidden units of several sets of heads lie side by side.

    Attributes:
        inputs: [L-1, B, H], a view of the states.
        scale: [L-1, B, 1], one over their root mean square.
        hidden: [L-1, B, sets*W], after tanh.
    """

    inputs: FloatArray
    scale: FloatArray
    hidden: FloatArray


def exit_logits(weights: Weights, states: FloatArray) -> FloatArray:
    """Exit logits of all layers.

    Args:
        weights: Of one set of heads.
        states: [B, L, H] or [B, L-1, H] float32.

    Returns:
        [B, L-1] float32, equal to :meth:`PolicyHeads.forward <rl_exit.models.policy.PolicyHeads.forward>` but for
        rounding.
    """
    return forward([weights], states)[0][0]


def forward(sets: Sequence[Weights], states: FloatArray) -> tuple[list[FloatArray], Activations]:
    """One pass of one or more sets of heads of equal width over the same states, which are read once.

    Args:
        sets: Weights of each.
        states: [B, L, H] or [B, L-1, H] float32.

    Returns:
        (outputs [B, L-1] of each set, activations).

    Raises:
        ValueError: The shape does not fit.
    """
    heads, width = sets[0]["bias_in"].shape
    hidden_size = sets[0]["weight_in"].shape[1]
    if states.ndim != 3 or states.shape[1] not in (heads, heads + 1) or states.shape[2] != hidden_size:
        raise ValueError(
            f"exit_logits: states of shape {states.shape}; accepted: [B, {heads + 1} or {heads}, {hidden_size}]"
        )
    inputs = states[:, :heads].transpose(1, 0, 2)
    hidden = np.matmul(inputs, _joined(sets, "weight_in", 2))
    squares = np.matmul(inputs[:, :, None, :], inputs[:, :, :, None])[..., 0]
    scale = np.float32(math.sqrt(hidden_size)) / np.sqrt(np.maximum(squares, np.float32(1e-12)))
    # The division by the root mean square commutes with the product, so it is applied to width W and not to H.
    hidden *= scale
    hidden += _joined(sets, "bias_in", 1)[:, None]
    np.tanh(hidden, out=hidden)
    outputs = [
        (np.matmul(part, one["weight_out"][..., None])[..., 0] + one["bias_out"][:, None]).T
        for part, one in zip(_parts(hidden, width), sets, strict=True)
    ]
    return outputs, Activations(inputs, scale, hidden)


def backward(
    sets: Sequence[Weights], activations: Activations, gradients: Sequence[FloatArray]
) -> list[dict[str, FloatArray]]:
    """Gradients of the weights; those of shared weights are summed over the layers.

    Args:
        sets: As given to :func:`forward`.
        activations: From there.
        gradients: Of each output, [B, L-1].

    Returns:
        For each set the gradient of every weight.
    """
    inputs, hidden = activations.inputs, activations.hidden
    width = sets[0]["bias_in"].shape[1]
    slope = 1 - hidden * hidden
    found: list[dict[str, FloatArray]] = []
    for one, part, inner, gradient in zip(sets, _parts(hidden, width), _parts(slope, width), gradients, strict=True):
        by_layer = np.ascontiguousarray(gradient.T)
        inner *= by_layer[..., None]
        inner *= one["weight_out"][:, None]
        found.append(
            {
                "bias_in": inner.sum(1),
                "weight_out": _like(one["weight_out"], np.matmul(by_layer[:, None], part)[:, 0]),
                "bias_out": by_layer.sum(1),
            }
        )
    slope *= activations.scale
    product = np.matmul(inputs.transpose(0, 2, 1), slope)
    for one, part in zip(found, _parts(product, width), strict=True):
        one["weight_in"] = np.ascontiguousarray(part)
    return [
        one | {"weight_in": _like(given["weight_in"], one["weight_in"])} for given, one in zip(sets, found, strict=True)
    ]


def _like(weight: FloatArray, gradient: FloatArray) -> FloatArray:
    """The gradient by layer, summed where the weight is one for all layers."""
    return gradient if len(weight) == len(gradient) else gradient.sum(0, keepdims=True)


def _joined(sets: Sequence[Weights], name: str, axis: int) -> FloatArray:
    return sets[0][name] if len(sets) == 1 else np.concatenate([one[name] for one in sets], axis)


def _parts(array: FloatArray, width: int) -> list[FloatArray]:
    """The units of each set, as views."""
    return [array[..., start : start + width] for start in range(0, array.shape[-1], width)]
