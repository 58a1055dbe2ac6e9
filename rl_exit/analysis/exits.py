"""Figure 2: loss and accuracy of each exit, over all instances and over those that leave there."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ExitFigures:
    """What each exit achieves.

    Attributes:
        loss: [L], mean cross-entropy over all instances, nats.
        accuracy: [L], share of all instances that the exit predicts correctly.
        leaving: [L], how many instances leave there.
        loss_leaving: [L], mean cross-entropy over those; None where none leaves.
        accuracy_leaving: [L], share of those that is right; None where none leaves.
        loss_at_exit: Mean cross-entropy, each instance at the layer where it leaves.
        accuracy_at_exit: Share of the instances that is right there.
    """

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    leaving: tuple[int, ...]
    loss_leaving: tuple[float | None, ...]
    accuracy_leaving: tuple[float | None, ...]
    loss_at_exit: float
    accuracy_at_exit: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def exit_figures(losses: npt.ArrayLike, correct: npt.ArrayLike, exit_layer: npt.ArrayLike) -> ExitFigures:
    """Measure the exits.

    Args:
        losses: [N, L], nats.
        correct: [N, L] bool.
        exit_layer: [N] in 1..L, where each instance leaves; given, so that the exits of two objectives can be measured
            on the same instances.

    Raises:
        ValueError: Shapes do not fit, or a layer is outside 1..L.
    """
    loss, right = np.asarray(losses, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    layer = np.asarray(exit_layer, dtype=np.int64)
    if loss.ndim != 2 or not loss.size or loss.shape != right.shape or layer.shape != loss.shape[:1]:
        raise ValueError(f"losses {loss.shape}, correct {right.shape} and exit_layer {layer.shape} do not fit")
    if layer.min() < 1 or layer.max() > loss.shape[1]:
        raise ValueError(f"exit layers must be within 1..{loss.shape[1]}")
    here = layer[:, None] == np.arange(1, loss.shape[1] + 1)
    leaving = here.sum(0)
    return ExitFigures(
        loss=tuple(loss.mean(0).tolist()),
        accuracy=tuple(right.mean(0).tolist()),
        leaving=tuple(leaving.tolist()),
        loss_leaving=_means(loss, here, leaving),
        accuracy_leaving=_means(right, here, leaving),
        loss_at_exit=float(loss[here].mean()),
        accuracy_at_exit=float(right[here].mean()),
    )


def _means(
    values: npt.NDArray[np.float64], here: npt.NDArray[np.bool_], leaving: npt.NDArray[np.int64]
) -> tuple[float | None, ...]:
    sums = np.where(here, values, 0.0).sum(0)
    return tuple(float(s / n) if n else None for s, n in zip(sums, leaving, strict=True))
