"""``rl-exit compare``: finished runs of one task, every criterion on their exits, as JSON and as a page."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rl_exit.comparison import REPLICATES, Group, compare
from rl_exit.comparison.evidence import FINAL
from rl_exit.criteria import CRITERIA
from rl_exit.errors import UserError, nearest
from rl_exit.files import write_json
from rl_exit.progress import Display
from rl_exit.report_compare import write_compare_page
from rl_exit.trainers.compare_evidence import run_evidence
from rl_exit.trainers.compare_groups import open_runs
from rl_exit.trainers.run_directory import RunDirectory, versions

NUMBERS_ONLY = ("pabee_regression",)  # Criteria of tasks whose answer is a number.


@dataclass(frozen=True)
class Outputs:
    """Files of a comparison.

    Attributes:
        json: The tree.
        page: The same for people.
    """

    json: Path
    page: Path


def compare_runs(
    paths: Sequence[Path],
    display: Display,
    *,
    split: str | None = None,
    methods: Sequence[str] = (),
    replicates: int = REPLICATES,
    seed: int = 0,
    command: str = "",
    cost: Literal["layers", "latency"] = "layers",
) -> dict[str, Any]:
    """Hold every criterion on every run's exits against the others.

    Args:
        paths: Run directories of one task, the recipe that is judged first.
        display: Where progress is shown.
        split: ``test`` or ``dev``; None: test where it is labelled.
        methods: Criteria; none: all that fit the task.
        replicates: Of the bootstrap.
        seed: Of the bootstrap.
        command: What was typed, for the record.
        cost: What a saved layer counts: the same everywhere, or its measured time on this machine.

    Returns:
        The tree of docs/compare.md.

    Raises:
        UserError: Runs that cannot be compared, a split or a criterion that is not there.
    """
    words = check_methods(methods)
    groups, task = open_runs(paths)
    name = split or ("test" if "test" in task.splits else "dev")
    if name not in task.splits:
        raise UserError(f"--split {name}: labelled splits of task '{task.name}': {', '.join(task.splits)}")
    started = time.perf_counter()
    found = []
    with ExitStack() as locks:
        for group in groups:
            for run in group.runs:
                locks.enter_context(RunDirectory.locked(run.path))
        for group in groups:
            evidence = [run_evidence(run, name, words, display, cost == "latency") for run in group.runs]
            found.append(Group(group.name, evidence, group.settings))
    gathered = time.perf_counter()
    with display.step(
        "comparison", sum(len(one.scores) for g in found for r in g.runs for one in r.sets.values())
    ) as bar:
        try:
            tree = compare(found, task.metric, replicates, seed, lambda done, total: bar.update(done))
        except ValueError as error:  # runs of one seed on other instances
            raise UserError(str(error)) from error
    return {
        "task": task.name,
        "split": name,
        "cost": cost,
        "layer_costs": [run.sets[FINAL].split.depths.tolist() for run in found[0].runs],
        **tree,
        "seconds": {"evidence": gathered - started, "comparison": time.perf_counter() - gathered},
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
    }


def check_methods(words: Sequence[str]) -> list[str]:
    """The criteria to compare, in the order of the library.

    Raises:
        UserError: An unknown word.
    """
    for word in words:
        if word not in CRITERIA:
            raise UserError(
                f"--methods: criterion '{word}' is unknown; accepted: {', '.join(CRITERIA)}.{nearest(word, CRITERIA)}"
            )
    chosen = words or [word for word in CRITERIA if word not in NUMBERS_ONLY]
    return [word for word in CRITERIA if word in chosen]


def outputs(paths: Sequence[Path], output: Path | None) -> Outputs:
    """Where a comparison is written.

    Args:
        paths: The runs.
        output: A file ending in ``.json`` or ``.html`` (the other lies beside it) or a folder; None: ``compare/`` of
            the first run.
    """
    if output is not None and output.suffix in (".json", ".html"):
        return Outputs(output.with_suffix(".json"), output.with_suffix(".html"))
    folder = paths[0] / "compare" if output is None else output
    return Outputs(folder / "compare.json", folder / "index.html")


def write_comparison(tree: dict[str, Any], where: Outputs) -> None:
    """Write JSON and page.

    Raises:
        UserError: No space left, or a folder that cannot be written.
    """
    write_json(where.json, tree)
    write_compare_page(tree, where.page)
