"""Oracles: exit layers that need the labels or the last layer. Bounds for comparison, on stored arrays only."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rl_exit.method.rewards import IntArray, layer_cost, memorized_layer


def first_correct(correct: npt.ArrayLike) -> IntArray:
    """First layer whose exit is right; L where none is. The bound for any criterion on the same exits.

    Args:
        correct: [N, L] bool.

    Returns:
        [N] in 1..L.
    """
    flags = _layers(correct, "correct", 2).astype(bool)
    return np.where(flags.any(axis=1), flags.argmax(axis=1) + 1, flags.shape[1]).astype(np.int64)


def memorized(correct: npt.ArrayLike) -> IntArray:
    """Memorized layer (Eq. 7): first layer from which the exits stay right up to L.

    Args:
        correct: [N, L] bool.

    Returns:
        [N] in 1..L.
    """
    return memorized_layer(correct)


def first_agreeing(logits: npt.ArrayLike) -> IntArray:
    """First layer whose prediction is that of layer L: the same answers as full depth, at the least depth.

    Args:
        logits: [N, L, C]; of equal logits the first class counts.

    Returns:
        [N] in 1..L.
    """
    predicted = _layers(logits, "logits", 3).argmax(axis=-1)
    return (predicted == predicted[:, -1:]).argmax(axis=1).astype(np.int64) + 1


def cheapest(losses: npt.ArrayLike, price: float, cost: npt.ArrayLike | None = None) -> IntArray:
    """Layer of the least ``CE[i, l] + price * cost[l]``; the first of equals.

    Args:
        losses: [N, L], nats.
        price: Nats per unit of cost.
        cost: [L]; default the layer number.

    Returns:
        [N] in 1..L.
    """
    ce = _layers(losses, "losses", 2)
    each = layer_cost(ce.shape[1]) if cost is None else np.asarray(cost, dtype=np.float32)
    return (ce + price * each).argmin(axis=1).astype(np.int64) + 1


ORACLES = {"first_correct": first_correct, "memorized": memorized, "first_agreeing": first_agreeing}


def _layers(values: npt.ArrayLike, name: str, dimensions: int) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != dimensions or array.shape[1] == 0:
        raise ValueError(f"{name} must be {'[N, L]' if dimensions == 2 else '[N, L, C]'}, got shape {array.shape}")
    return array
