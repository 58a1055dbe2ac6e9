"""Evaluation of a finished run or model on labelled data, by really leaving early."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl_exit.config import RunConfig, TaskConfig, load_config
from rl_exit.criteria import parameters
from rl_exit.data.tasks import load_task, tokenise
from rl_exit.errors import RunError, UserError
from rl_exit.measurement import headline, measure, time_exits
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.prediction import chosen_criterion
from rl_exit.trainers.run_directory import versions


def evaluate_model(
    target: Path,
    overrides: Sequence[str],
    split: str | None,
    threshold: float | None,
    batch_size: int,
    word: str | None = None,
    params: Sequence[str] = (),
) -> dict[str, Any]:
    """Score a model against its own full depth.

    Args:
        target: Run directory or model folder.
        overrides: ``task.key=value`` words that name other data.
        split: ``dev`` or ``test``; None: both where labelled.
        threshold: Exit threshold; None: the model's.
        batch_size: Texts per batch.
        word: Exit criterion in place of the policy; learned ones are read from ``criteria/`` in the model's folder.
        params: Its parameters, ``key=value``.

    Returns:
        The same form as results.json; with a criterion also ``criterion``, its word and parameters.

    Raises:
        UserError: Unknown split, data that does not fit the model, no model.
    """
    folder = target / "model" if (target / "model" / "config.json").is_file() else target
    if (target / "config.yaml").is_file() and folder == target:
        raise RunError(f"{target}: this run has no model yet; finish it with --resume")
    rule = chosen_criterion(word, params, folder)
    if rule is not None and threshold is not None:
        raise UserError("--threshold belongs to the policy; the criterion's own is --param threshold=...")
    model = EarlyExitModel.from_pretrained(folder)
    config = _task_config(folder, overrides)
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise UserError(f"--threshold {threshold}: a value between 0 and 1 is accepted")
    at = model.config.threshold if threshold is None else threshold
    task = load_task(config.task, config.seed)
    known = [model.config.id2label[number] for number in range(model.config.num_labels)]
    if list(task.label_names) != known:
        raise UserError(
            f"the data has the classes {list(task.label_names)[:8]}, the model knows {known[:8]}; "
            "name the data's classes in the model's order with task.labels=[...]"
        )
    names = [name for name in ("dev", "test") if name in task.splits]
    if split is not None:
        if split not in names:
            raise UserError(f"--split {split}: this task has {' and '.join(names)}")
        names = [split]
    results: dict[str, Any] = {
        "run_name": target.resolve().name,
        "task": task.name,
        "metric": task.metric,
        "num_layers": model.num_layers,
        "threshold": at,
        **({} if rule is None else {"criterion": {"word": rule.name, **parameters(rule)}}),
        "versions": versions(),
        "dev": None,
        "test": None,
        "timing": {},
    }
    for name in names:
        instances = tokenise(task.splits[name], model.tokenizer, model.config.max_tokens)
        results[name] = headline(measure(model, instances, task.metric, at, batch_size, rule=rule))
        results["timing"][name] = time_exits(model, instances, at, batch_size, rule)
    return results


def _task_config(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration the model was trained with, under the overrides."""
    for word in overrides:
        if not word.startswith("task."):
            raise UserError(f"'{word}': only task.key=value can be changed in an evaluation")
    given = load_config(None, overrides).task.model_dump(exclude_unset=True)
    file = folder / "training.yaml"
    if not file.is_file():
        if not given:
            raise UserError(f"{folder}: the model does not say what it was trained on; name the data: task.name=...")
        return load_config(None, overrides)
    trained = load_config(file)
    kept = trained.task.model_dump() if given.get("name", trained.task.name) == trained.task.name else {}
    return trained.model_copy(update={"task": TaskConfig(**(kept | given))})
