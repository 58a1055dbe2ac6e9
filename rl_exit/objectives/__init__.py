"""Training objectives: how backbone and exits are trained before (or without) a policy. No Ray.

An objective has one word (``init.objective``). To add one, write a function ``(shape, epochs, options) -> Objective``
and enter it in ``OBJECTIVES``.
"""

from __future__ import annotations

from collections.abc import Callable

from rl_exit.errors import ConfigError, nearest
from rl_exit.objectives.base import Loss, Objective, ObjectiveOptions, Phase, Shape
from rl_exit.objectives.joint import alternate, distilled, pondernet, uniform, weighted
from rl_exit.objectives.losses import exit_losses
from rl_exit.objectives.staged import cat, jei, self_distillation, two_stage
from rl_exit.objectives.task_step import DRAWS, PolicyWeights, task_step

OBJECTIVES: dict[str, Callable[[Shape, int, ObjectiveOptions], Objective]] = {
    "weighted": weighted,
    "uniform": uniform,
    "distilled": distilled,
    "two_stage": two_stage,
    "alternate": alternate,
    "self_distillation": self_distillation,
    "cat": cat,
    "pondernet": pondernet,
    "jei": jei,
}


def objective(word: str, shape: Shape, epochs: int, options: ObjectiveOptions | None = None) -> Objective:
    """Make an objective by its word.

    Heads draw their weights from torch's default generator.

    Args:
        word: One of ``OBJECTIVES``.
        shape: Sizes of the model.
        epochs: Passes over the training set in the first phase.
        options: Settings; default: those of :class:`ObjectiveOptions`.

    Raises:
        ConfigError: Unknown word.
    """
    if word not in OBJECTIVES:
        raise ConfigError(
            f"init.objective = '{word}' is unknown; accepted: {', '.join(OBJECTIVES)}.{nearest(word, OBJECTIVES)}"
        )
    return OBJECTIVES[word](shape, epochs, options or ObjectiveOptions())


__all__ = [
    "DRAWS",
    "OBJECTIVES",
    "Loss",
    "Objective",
    "ObjectiveOptions",
    "Phase",
    "PolicyWeights",
    "Shape",
    "exit_losses",
    "objective",
    "task_step",
]
