"""Progress of long work: a bar with an estimate in a terminal, plain lines at intervals elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

LINE_SECONDS = 10.0


class Progress(Protocol):
    """What long work reports to."""

    def update(self, done: float, note: str = "") -> None:
        """Say that ``done`` of the total is done; ``note`` is a short text of current figures."""


class Display(Protocol):
    """Where a run shows itself: named steps with progress, and messages."""

    def step(self, title: str, total: float) -> AbstractContextManager[Progress]:
        """A context manager that yields a :class:`Progress`."""

    def say(self, message: str) -> None:
        """Show one message."""


class Silent:
    """Shows nothing."""

    @contextmanager
    def step(self, title: str, total: float) -> Iterator[Progress]:
        """A progress that is thrown away."""
        yield _Nothing()

    def say(self, message: str) -> None:
        """Nothing."""


class _Nothing:
    def update(self, done: float, note: str = "") -> None:
        return


class Terminal:
    """A bar with an estimate on a terminal; elsewhere a line every 10 s, without control characters."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def step(self, title: str, total: float) -> Iterator[Progress]:
        """A bar of one step; it stays on the screen with its time when the step is over."""
        started = time.monotonic()
        if self._console.is_terminal:
            with self._bar(title, total) as bar:
                yield bar
        else:
            yield _Lines(title, total)
        self.say(f"{title}: done in {clock(time.monotonic() - started)}")

    def say(self, message: str) -> None:
        """One line on standard error."""
        if self._console.is_terminal:
            self._console.print(message, markup=False)
        else:
            sys.stderr.write(message + "\n")

    @contextmanager
    def _bar(self, title: str, total: float) -> Iterator[Progress]:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self._console, transient=True) as rich_progress:
            task = rich_progress.add_task(title, total=total, note="")

            class Bar:
                def update(self, done: float, note: str = "") -> None:
                    rich_progress.update(task, completed=done, note=note)

            yield Bar()


@dataclass
class _Lines:
    title: str
    total: float
    started: float = field(default_factory=time.monotonic)
    shown: float = field(default_factory=time.monotonic)

    def update(self, done: float, note: str = "") -> None:
        now = time.monotonic()
        if now - self.shown < LINE_SECONDS:
            return
        self.shown = now
        left = (now - self.started) * (self.total / done - 1.0) if done > 0 else float("nan")
        share = 100.0 * done / self.total if self.total else 100.0
        sys.stderr.write(f"{self.title}: {share:.0f} %, {clock(left)} left{', ' + note if note else ''}\n")


def clock(seconds: float) -> str:
    """Seconds as people read them: ``4.2 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds != seconds:
        return "unknown time"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
