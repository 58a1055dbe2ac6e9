"""Jobs and runs for the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from rl_exit.progress import clock

_STYLES = {
    "SUCCEEDED": "green",
    "finished": "green",
    "FAILED": "red",
    "failed": "red",
    "RUNNING": "bold",
    "running": "bold",
}


def jobs_table(jobs: Iterable[Any]) -> Table:
    """One row per :class:`rl_exit.cluster.jobs.Job`."""
    table = _table("jobs", "job", "run", "state", "started", "time", "message")
    for job in jobs:
        table.add_row(
            Text(job.name, style="bold"),
            job.run or "",
            Text(job.state, style=_STYLES.get(job.state, "")),
            _when(job.started),
            clock(job.seconds) if job.seconds is not None else "",
            Text(job.message[:120]),
        )
    return table


def runs_table(runs: Iterable[Any]) -> Table:
    """One row per :class:`rl_exit.cluster.runs.Run`."""
    table = _table("runs", "run", "state", "last step", "started", "score", "full depth", "saved layers", "place")
    for run in runs:
        found = run.result or {}
        shown = [
            f"{100 * found[key]:.2f}" if found.get(key) is not None else "" for key in ("score", "full_depth_score")
        ]
        saved = found.get("saved_layers")
        table.add_row(
            Text(run.name, style="bold"),
            Text(run.state, style=_STYLES.get(run.state, "")),
            run.step or "",
            _when(run.started),
            *shown,
            f"{100 * saved:.1f} %" if saved is not None else "",
            run.place + (f" (job {run.job})" if run.job else ""),
        )
    return table


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold", no_wrap=header in ("state", "started", "time"))
    return table


def _when(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
