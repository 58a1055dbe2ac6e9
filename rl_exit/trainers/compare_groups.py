"""Runs sorted into groups: those that differ by seed alone are one recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from rl_exit.config import describe_keys
from rl_exit.errors import RunError, UserError
from rl_exit.files import read_json
from rl_exit.trainers.run_directory import FREE_KEYS, RunDirectory, refuse_generation

# Where the data or the initialised model lie, and how much is done at a time, says nothing about the recipe.
_IGNORED = {
    *FREE_KEYS,
    *("seed", "init.model", "task.path", "store.batch_size", "store.shard_size", "inference.batch_size"),
    *(key for key, _, _ in describe_keys() if key.startswith("cluster")),
}
_SEED = re.compile(r"[-_.,+ ]*(?:seed|s)?[-_=]?\d+$|[-_.,+ ]*seed[-_=]?\d+", flags=re.IGNORECASE)


@dataclass(frozen=True)
class RunGroup:
    """Runs of one recipe.

    Attributes:
        name: What they are called.
        runs: By seed.
        settings: Settings in which the group differs from others.
    """

    name: str
    runs: Sequence[RunDirectory]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskFacts:
    """What the runs have in common.

    Attributes:
        name: Task.
        metric: ``accuracy``, ``f1`` or ``mcc``.
        splits: Labelled splits.
    """

    name: str
    metric: str
    splits: tuple[str, ...]


def open_runs(paths: Sequence[Path]) -> tuple[list[RunGroup], TaskFacts]:
    """Open finished runs of one task and sort them into groups, in the order in which they are given.

    Raises:
        RunError: No run, an unfinished one, the same one twice, or two of one recipe and seed.
        UserError: Runs of different tasks, classes or metrics.
    """
    runs = [_open(path) for path in paths]
    places = [run.path.resolve() for run in runs]
    if len(set(places)) < len(places):
        raise RunError(f"{', '.join(map(str, paths))}: a run is given twice")
    facts = [_facts(run) for run in runs]
    for run, (task, labels) in zip(runs, facts, strict=True):
        first, known = facts[0]
        if (task.name, task.metric, labels) != (first.name, first.metric, known):
            raise UserError(
                f"{run.path}: task '{task.name}', {task.metric}, {len(labels)} classes; {runs[0].path}: "
                f"'{first.name}', {first.metric}, {len(known)} classes; runs of one task can be compared"
            )
    return _grouped(runs), facts[0][0]


def _open(path: Path) -> RunDirectory:
    run = RunDirectory.open(path)
    refuse_generation(path, "compare")
    if not (path / "results.json").is_file():
        raise RunError(f"{path}: no results.json; the run has not finished (continue it with rl-exit train --resume)")
    return run


def _facts(run: RunDirectory) -> tuple[TaskFacts, list[str]]:
    tree = read_json(run.path / "data" / "task.json")
    try:
        splits = tuple(split for split in ("dev", "test") if split in tree["sizes"])
        return TaskFacts(tree["name"], tree["metric"], splits), list(tree["label_names"])
    except (KeyError, TypeError):
        raise RunError(f"{run.path / 'data' / 'task.json'}: name, metric, sizes and label_names are expected") from None


def _grouped(runs: Sequence[RunDirectory]) -> list[RunGroup]:
    members: list[tuple[dict[str, Any], list[RunDirectory]]] = []
    for run in runs:
        settings = {
            key: reduce(getattr, key.split("."), run.config) for key, _, _ in describe_keys() if key not in _IGNORED
        }
        for known, group in members:
            if known == settings:
                group.append(run)
                break
        else:
            members.append((settings, [run]))
    for _, group in members:
        seeds = [run.config.seed for run in group]
        for number, run in enumerate(group):
            if run.config.seed in seeds[:number]:
                other = group[seeds.index(run.config.seed)]
                raise RunError(f"{run.path}: has the settings and the seed ({run.config.seed}) of {other.path}")
    differing = [
        key for key in members[0][0] if any(settings[key] != members[0][0][key] for settings, _ in members[1:])
    ]
    chosen = [{key: settings[key] for key in differing} for settings, _ in members]
    names = _names([group for _, group in members], chosen)
    return [
        RunGroup(name, sorted(group, key=lambda run: run.config.seed), settings)
        for name, (_, group), settings in zip(names, members, chosen, strict=True)
    ]


def _names(groups: Sequence[Sequence[RunDirectory]], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs' own name without the seed, where it tells the groups apart; else their settings."""
    stems = [{_SEED.sub("", run.path.resolve().name) or run.path.resolve().name for run in group} for group in groups]
    names = [next(iter(stem)) for stem in stems if len(stem) == 1]
    if len(set(names)) == len(groups):
        return names
    if len(groups) == 1:
        return [groups[0][0].config.run_name]
    return [", ".join(f"{key}={_short(value)}" for key, value in one.items()) for one in settings]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
