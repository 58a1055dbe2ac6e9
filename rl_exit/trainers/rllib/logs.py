"""RLlib's own log lines, none of which is for the user of a run."""

from __future__ import annotations

import logging
import warnings


def quiet_rllib() -> None:
    """Let only errors through: RLlib warns about its own deprecated parts on every start, in every process.

    Called by whatever starts RLlib parts in a process; lasts for the process.
    """
    import ray.rllib  # noqa: F401  (sets its log levels when imported, so it must come first)

    for name in ("ray.rllib", "ray.tune", "ray.train", "ray._common.deprecation"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")
