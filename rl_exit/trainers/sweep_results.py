"""What the runs of a sweep achieved: by run, and by setting over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rl_exit.errors import RunError
from rl_exit.files import read_json
from rl_exit.trainers.run_directory import versions
from rl_exit.trainers.sweep_plan import Initialisation, SweepPlan, Trial, short_keys

MEASURES = ("full_depth_score", "score", "mean_exit_layer", "saved_layers")


def is_initialised(start: Initialisation) -> bool:
    """Whether a shared initialisation is done."""
    return (start.config.run_dir / "steps" / "init.json").is_file()


def is_finished(trial: Trial) -> bool:
    """Whether a trial's run is done, its report included."""
    return (trial.config.run_dir / "steps" / "report.json").is_file()


def sweep_results(plan: SweepPlan, failed: Mapping[str, str]) -> dict[str, Any]:
    """The tree of ``sweep.json``.

    Args:
        plan: The sweep.
        failed: Label -> message of the trials and initialisations that failed in this session.
    """
    rows = [_row(trial, failed.get(trial.name)) for trial in plan.trials]
    return {
        "name": plan.folder.name,
        "keys": short_keys(plan.over),
        "over": {key: list(values) for key, values in plan.over.items()},
        "seeds": list(plan.seeds),
        "trials": rows,
        "settings": _pooled(plan, rows),
        "initialisations": [
            {
                "name": start.name,
                "directory": str(start.config.run_dir.relative_to(plan.folder)),
                "state": "finished" if is_initialised(start) else "failed" if start.label in failed else "open",
                "error": failed.get(start.label),
            }
            for start in plan.initialisations
        ],
        "versions": versions(),
    }


def _row(trial: Trial, failed: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": trial.name,
        "settings": trial.settings,
        "seed": trial.config.seed,
        "initialisation": None if trial.initialisation is None else trial.initialisation.name,
        "state": "open" if failed is None else "failed",
        "error": failed,
        "dev": None,
        "test": None,
        "seconds": None,
    }
    if not is_finished(trial):
        return row
    try:
        results = read_json(trial.config.run_dir / "results.json")
    except RunError as error:
        return {**row, "state": "failed", "error": str(error)}
    splits = {split: results[split] for split in ("dev", "test")}
    return {**row, **splits, "state": "finished", "error": None, "seconds": sum(results["seconds"].values())}


def _pooled(plan: SweepPlan, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each setting over its finished seeds: mean and standard deviation (None for a single one)."""
    pooled: list[dict[str, Any]] = []
    for start in range(0, len(rows), len(plan.seeds)):
        group = rows[start : start + len(plan.seeds)]
        done = [row for row in group if row["state"] == "finished"]
        entry: dict[str, Any] = {"settings": group[0]["settings"], "seeds": [row["seed"] for row in done]}
        for split in ("dev", "test"):
            found = [row[split] for row in done if row[split]]
            entry[split] = {name: _spread([one[name] for one in found]) for name in MEASURES} if found else None
        pooled.append(entry)
    return pooled


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
