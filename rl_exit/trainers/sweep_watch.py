"""What a sweep hears of its trials from Ray Tune. Imported when one starts, since it needs Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

from rl_exit.progress import Display, Progress


class Watch(tune.Callback):
    """Shows and notes each job as it ends.

    Tune serialises its callbacks with the experiment; nothing of this one goes along, since no experiment is restored.

    Args:
        display: Where messages go.
        progress: Told the number of jobs that have ended.
        total: Number of jobs.
        failed: Label -> message, filled with the jobs that failed.
        on_change: Called after each job.
    """

    def __init__(
        self, display: Display, progress: Progress, total: int, failed: dict[str, str], on_change: Callable[[], object]
    ) -> None:
        self._display = display
        self._progress = progress
        self._total = total
        self._failed = failed
        self._on_change = on_change
        self._done = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A job has returned; its result may say that it failed."""
        self._ended(trial.config["job"]["name"], (trial.last_result or {}).get("failed"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A job has raised, or its process has ended."""
        self._ended(trial.config["job"]["name"], last_line(trial.error_file))

    def _ended(self, name: str, failed: str | None) -> None:
        self._done += 1
        if failed is None:
            self._display.say(f"{name}: done ({self._done} of {self._total})")
        else:
            self._failed[name] = failed
            self._display.say(f"{name}: failed: {failed}")
        self._progress.update(self._done)
        self._on_change()


def last_line(file: str | None) -> str:
    """What the error of a trial says, without its traceback."""
    lines: list[str] = []
    if file is not None and Path(file).is_file():
        lines = Path(file).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it ended without a message; see its log in .logs"
