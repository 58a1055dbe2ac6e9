"""A Ray session of this machine alone."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

from rl_exit.errors import UserError

ATTEMPTS = 2


def start_local(num_cpus: int, **settings: Any) -> None:
    """Start a Ray session of this machine alone, a second time where the first try ran out of Ray's time.

    Ray gives its own processes 30 s to report themselves, which cannot be set and which a busy machine may exceed.

    Args:
        num_cpus: What the session offers.
        settings: Others of ``ray.init``.

    Raises:
        UserError: Ray does not start.
    """
    import ray

    settings = {"include_dashboard": False, "logging_level": logging.WARNING, "log_to_driver": False, **settings}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init("local", num_cpus=num_cpus, **settings)  # never joins another Ray of this machine by chance
            return
        except Exception as error:
            ray.shutdown()
            if "timed out" not in str(error):
                raise
            if attempt == ATTEMPTS:
                raise UserError(
                    f"Ray does not start on this machine ({attempt} attempts): {error}. What it said is in "
                    f"{tempfile.gettempdir()}/ray/session_latest/logs"
                ) from None
