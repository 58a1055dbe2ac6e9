"""Predictions for programs: a model, texts, rows of plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl_exit.criteria import Criterion
from rl_exit.criteria.registry import criterion_from_words
from rl_exit.errors import ConfigError, ModelError
from rl_exit.models.early_exit import EarlyExitModel


def predict_texts(
    model: str,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    threshold: float | None,
    batch_size: int,
    word: str | None = None,
    params: Sequence[str] = (),
    operating_point: str | None = None,
    speed: float | None = None,
) -> list[dict[str, Any]]:
    """Label texts with a saved model.

    Args:
        model: Model folder, run directory or hub id.
        texts: Texts.
        pairs: Second texts of sentence pairs.
        threshold: Leave where pi is above it; None: the model's own.
        batch_size: Texts per batch.
        word: Exit criterion in place of the policy; learned ones are read from ``criteria/`` in the model's folder.
        params: Its parameters, ``key=value``.
        operating_point: Name of a point saved with the model.
        speed: Place on the dial.

    Returns:
        One mapping per text: label, label_id, probabilities, exit_layer.

    Raises:
        ModelError: The model cannot be loaded, or its weights are not finite.
        UserError: The criterion cannot be made.
    """
    folder = model_folder(model)
    rule = chosen_criterion(word, params, Path(folder))
    loaded = EarlyExitModel.from_pretrained(folder)
    second = None if pairs is None else list(pairs)
    found = loaded.predict(
        list(texts),
        second,
        batch_size=batch_size,
        threshold=threshold,
        criterion=rule,
        operating_point=operating_point,
        speed=speed,
    )
    if not all(math.isfinite(max(prediction.probabilities)) for prediction in found):
        raise ModelError(f"model '{model}': its answers are not finite numbers, so its weights are damaged")
    return [prediction.to_dict() for prediction in found]


def model_folder(model: str) -> str:
    """The model's folder where a run directory is given; anything else as it is."""
    inside = Path(model) / "model"
    is_run = (inside / "config.json").is_file() and not (Path(model) / "config.json").exists()
    return str(inside) if is_run else model


def chosen_criterion(word: str | None, params: Sequence[str], folder: Path) -> Criterion | None:
    """The criterion that a command names, None where it names none.

    Raises:
        ConfigError: Parameters without a criterion.
        UserError: The criterion cannot be made.
    """
    if word is None:
        if params:
            raise ConfigError(f"--param {params[0]}: belongs to a criterion; name one with --criterion")
        return None
    return criterion_from_words(word, params, folder / "criteria")
