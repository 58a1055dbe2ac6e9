"""A Ray session of this machine alone."""

from __future__ import annotations

import logging
import os
import traceback
from typing import Any

from rl_exit.errors import UserError

ATTEMPTS = 2
SLOW = ("timed out", "failed to start gcs")  # what Ray says when its own processes are not there in time

# Nobody reads Ray's own metrics in a session without a dashboard, and the thread that sends them may outlive the
# session: when this process then ends, it ends with SIGSEGV (seen with Ray 2.60).
QUIET = {"enable_metrics_collection": False}

_log = logging.getLogger(__name__)


def start_local(num_cpus: int, **settings: Any) -> None:
    """Start a Ray session of this machine alone, a second time where the first try ran out of Ray's time.

    Ray gives its own processes 30 s to report themselves, which a busy machine may exceed; for most of them that time
    is a constant of Ray's.

    Args:
        num_cpus: What the session offers.
        settings: Others of ``ray.init``.

    Raises:
        UserError: Ray does not start.
    """
    import ray

    usual = {"include_dashboard": False, "logging_level": logging.WARNING, "log_to_driver": False}
    settings = usual | {"_system_config": QUIET} | settings
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init("local", num_cpus=num_cpus, **settings)  # never joins another Ray of this machine by chance
            return
        except Exception as error:
            if not any(said in str(error).lower() for said in SLOW):
                raise
            _end_what_was_started(error)
            if attempt == ATTEMPTS:
                folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
                said = str(error).rstrip(".")
                raise UserError(
                    f"Ray does not start on this machine ({attempt} attempts): {said}. Its own logs are in {folder}/ray"
                ) from None
            _log.warning("Ray did not start in its own time; once more")


def _end_what_was_started(error: Exception) -> None:
    """End the processes of a node whose start has failed.

    Ray itself ends those of a node that has started: this one was never handed to anybody, so its processes would go
    on until ours ends, and stand in the way of the next attempt.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        end = getattr(frame.f_locals.get("self"), "kill_all_processes", None)
        if end is not None:
            end(check_alive=False, allow_graceful=False)
            return
