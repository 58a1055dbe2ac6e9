"""Which rule a caller wants: the policy at a threshold, a criterion, a saved point, or a place on the dial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_exit.criteria import Criterion
from rl_exit.criteria.registry import load_criterion
from rl_exit.dial import load_dial
from rl_exit.errors import ConfigError, nearest
from rl_exit.inference import choose_criterion

if TYPE_CHECKING:
    from rl_exit.models.early_exit import EarlyExitModel


def chosen_rule(
    model: EarlyExitModel,
    threshold: float | None = None,
    criterion: Criterion | None = None,
    operating_point: str | None = None,
    speed: float | None = None,
) -> Criterion:
    """The rule that a caller asked for; without a wish the policy at the model's own threshold.

    Args:
        model: The model.
        threshold: Of the policy.
        criterion: Any criterion.
        operating_point: Name of a point that ``rl-exit calibrate`` has saved.
        speed: Place on the dial, 0 (full depth) to 1, where ``rl-exit dial`` has trained one.

    Raises:
        ConfigError: More than one wish, an unknown operating point, or a value out of range.
        UserError: The model has no dial, or its learned criteria are not where it was loaded from.
    """
    given = {"threshold": threshold, "criterion": criterion, "operating_point": operating_point, "speed": speed}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1 and names != ["threshold", "criterion"]:
        raise ConfigError(f"{' and '.join(names)}: give one of them")
    if operating_point is not None:
        return point_rule(model, operating_point)
    if speed is not None:
        if isinstance(speed, bool) or not isinstance(speed, (int, float)) or not 0.0 <= speed <= 1.0:
            raise ConfigError(f"speed = {speed!r}; accepted: a number from 0 (full depth) to 1")
        return load_dial(Path(model.config.name_or_path or "."), model.num_layers, float(speed))
    return choose_criterion(criterion, threshold, model.config.threshold)


def point_rule(model: EarlyExitModel, name: str) -> Criterion:
    """The criterion of a saved operating point.

    Raises:
        ConfigError: No point of that name.
        RunError: What it learned is not where the model was loaded from.
    """
    points: Mapping[str, Any] = model.config.operating_points or {}
    if name not in points:
        there = ", ".join(points) or "none; 'rl-exit calibrate' makes them"
        raise ConfigError(f"operating point '{name}' is unknown; accepted: {there}.{nearest(str(name), points)}")
    point = points[name]
    return saved_criterion(model, point["criterion"], point["params"])


def saved_criterion(model: EarlyExitModel, word: str, params: Mapping[str, Any]) -> Criterion:
    """A criterion with what it learned, from ``criteria/`` in the folder that the model was loaded from.

    Raises:
        RunError: It learned something that is not there.
    """
    return load_criterion(Path(model.config.name_or_path or ".") / "criteria", word, **params)
