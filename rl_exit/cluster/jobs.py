"""The jobs of a cluster: list, look at, follow, stop."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from rl_exit.cluster.address import Target
from rl_exit.cluster.client import connect, telling
from rl_exit.cluster.submit import METADATA
from rl_exit.errors import UserError

STOP_SECONDS = 60.0
_NO_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]")
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """A job as people see it.

    Attributes:
        name: Submission id.
        state: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        run: Name of the run, None for a job of something else.
        place: Where the run keeps what it writes.
        message: What Ray says about the state.
        started: Seconds since 1970, None before.
        ended: The same of its end.
        metadata: All of it.
    """

    name: str
    state: str
    run: str | None
    place: str | None
    message: str
    started: float | None
    ended: float | None
    metadata: dict[str, str]

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ENDED

    @property
    def seconds(self) -> float | None:
        """How long it has run."""
        return None if self.started is None else (self.ended or time.time()) - self.started

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {**self.__dict__, "seconds": self.seconds}


class Jobs:
    """The jobs of one cluster.

    Args:
        target: The cluster.

    Raises:
        UserError: It cannot be reached, or lets nobody in.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._client = connect(target)

    def list(self, everything: bool = False) -> list[Job]:
        """Jobs, the newest first; ``everything``: also those that are no runs of rl-exit."""
        with telling(self.target):
            found = [_job(item) for item in self._client.list_jobs() if item.submission_id]
        kept = [job for job in found if everything or job.run is not None]
        return sorted(kept, key=lambda job: -(job.started or time.time()))

    def get(self, name: str) -> Job:
        """One job.

        Raises:
            UserError: There is none of that name.
        """
        with telling(self.target, name):
            return _job(self._client.get_job_info(_checked(name)))

    def logs(self, name: str) -> str:
        """All that a job has printed so far."""
        with telling(self.target, name):
            return str(self._client.get_job_logs(_checked(name)))

    def follow(self, name: str) -> Iterator[str]:
        """What a job prints, as it does, until it is over. Leaving off does nothing to the job."""
        self.get(name)
        loop = asyncio.new_event_loop()
        stream: AsyncIterator[str] = self._client.tail_job_logs(name)
        waiting: asyncio.Task[str | None] | None = None
        try:
            while True:
                with telling(self.target, name):
                    waiting = loop.create_task(_next(stream))
                    part = loop.run_until_complete(waiting)
                    if part is None:
                        return
                yield part
        finally:
            if waiting is not None and not waiting.done():  # Ctrl-C came while it waited
                waiting.cancel()
                loop.run_until_complete(asyncio.wait([waiting]))
            loop.run_until_complete(_close(stream))
            loop.close()

    def stop(self, name: str, wait: float = STOP_SECONDS) -> Job:
        """End a job and wait until it has ended; one that is over is left as it is.

        Raises:
            UserError: No such job, or it does not end.
        """
        with telling(self.target, name):
            self._client.stop_job(_checked(name))
        until = time.monotonic() + wait
        while not (job := self.get(name)).is_over:
            if time.monotonic() > until:
                raise UserError(f"job '{name}' was told to stop and is still {job.state} after {wait:.0f} s")
            time.sleep(0.5)
        return job


async def _next(stream: AsyncIterator[str]) -> str | None:
    return await anext(stream, None)


def plain(text: str) -> str:
    """Text without control characters (and without colours), for any terminal or file."""
    return _NO_CONTROL.sub("", text)


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.\-]+", name):
        raise UserError(f"'{name}' is no name of a job; 'rl-exit jobs list' shows them")
    return name


def _job(details: Any) -> Job:
    metadata = {str(key): str(value) for key, value in (details.metadata or {}).items()}
    lines = [line.strip() for line in (details.message or "").splitlines() if line.strip()]
    return Job(
        name=details.submission_id or details.job_id or "",
        state=str(getattr(details.status, "value", details.status)),
        run=metadata.get(f"{METADATA}run"),
        place=metadata.get(f"{METADATA}place"),
        message=plain(lines[0]) if lines else "",
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        metadata=metadata,
    )


async def _close(stream: Any) -> None:
    await stream.aclose()
