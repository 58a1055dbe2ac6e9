"""Memorized layer (Eq. 7), the paper's two rewards (Eq. 3 and 4), and rewards of being right."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

REWARDS = ("hardness", "vanilla", "correctness", "fidelity")


def memorized_layer(correct: npt.ArrayLike) -> IntArray:
    """First layer from which the instance is right at every layer up to L (Eq. 7).

    Args:
        correct: [N, L], whether exit l predicts the label.

    Returns:
        [N] in 1..L; an instance that is wrong at layer L has m = L.
    """
    flags = np.asarray(correct, dtype=bool)
    if flags.ndim != 2 or flags.shape[1] == 0:
        raise ValueError(f"correct must be [N, L], got shape {flags.shape}")
    # Length of the unbroken run of True that ends at layer L.
    run = np.cumprod(flags[:, ::-1], axis=1, dtype=np.int64).sum(axis=1)
    layers = flags.shape[1]
    return np.where(run == 0, layers, layers - run + 1).astype(np.int64)


def layer_cost(num_layers: int) -> FloatArray:
    """The paper's cost of exiting at layer l, which is l. [L], unit: layers."""
    return np.arange(1, num_layers + 1, dtype=np.float32)


def rewards(
    losses: npt.ArrayLike,
    memorized: npt.ArrayLike | None,
    alpha: float,
    kind: str = "hardness",
    cost: npt.ArrayLike | None = None,
    correct: npt.ArrayLike | None = None,
) -> FloatArray:
    """Reward of exiting at each layer.

    Args:
        losses: CE[i, l], [N, L], nats.
        memorized: m[i], [N] in 1..L; only the hardness-guided reward reads it.
        alpha: Price of a layer, in the unit of the first term: nats, or right answers.
        kind: ``"vanilla"`` is ``-CE - alpha*cost`` (Eq. 3); ``"hardness"`` is ``-CE - alpha*(1 - m/L)*cost`` (Eq. 4);
            ``"correctness"`` is ``[exit l is right] - alpha*cost``: the accuracy itself, whose price is plain to read
            (0.01: a layer must bring one right answer more in a hundred), and which no confident mistake dominates.
            ``"fidelity"`` is ``[exit l is right] - CE - alpha*cost``, for tokens: being right alone leaves the
            likelihood of the text aside, and the likelihood alone what is written.
        cost: [L], cost of exiting at l; default the layer number.
        correct: [N, L], whether exit l is right; only the rewards of being right read it.

    Returns:
        [N, L].

    Raises:
        ValueError: Shapes do not fit, the kind is unknown, or what it reads is missing or outside 1..L.
    """
    ce = np.asarray(losses, dtype=np.float32)
    if ce.ndim != 2:
        raise ValueError(f"losses must be [N, L], got shape {ce.shape}")
    count, layers = ce.shape
    price = layer_cost(layers) if cost is None else np.asarray(cost, dtype=np.float32)
    if price.shape != (layers,):
        raise ValueError(f"cost must be [{layers}], got shape {price.shape}")
    if kind == "vanilla":
        return -ce - np.float32(alpha) * price
    if kind in ("correctness", "fidelity"):
        right = None if correct is None else np.asarray(correct, dtype=np.float32)
        if right is None or right.shape != ce.shape:
            raise ValueError(f"the reward of being right needs correct, [{count}, {layers}]")
        gain = right if kind == "correctness" else right - ce
        return gain - np.float32(alpha) * price
    if kind != "hardness":
        raise ValueError(f"reward '{kind}' is unknown; accepted: {', '.join(REWARDS)}")
    if memorized is None:
        raise ValueError("the hardness-guided reward needs the memorized layers")
    m = np.asarray(memorized)
    if m.shape != (count,) or (count and (m.min() < 1 or m.max() > layers)):
        raise ValueError(f"memorized must be [{count}] within 1..{layers}")
    ease = (1.0 - m.astype(np.float32) / np.float32(layers))[:, None]
    return (-ce - np.float32(alpha) * ease * price).astype(np.float32)
