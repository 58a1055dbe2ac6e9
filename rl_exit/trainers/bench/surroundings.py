"""Where a benchmark runs: one thread, a Ray session and a folder of its own; and what is recorded of the machine."""

from __future__ import annotations

import logging
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from rl_exit import __version__
from rl_exit.trainers.local_ray import start_local


@contextmanager
def alone() -> Iterator[Path]:
    """One thread, a Ray session of its own if there is none, and a folder that is removed afterwards."""
    from rl_exit.trainers.rllib.logs import quiet_rllib

    quiet_rllib()
    threads = torch.get_num_threads()
    starts = not ray.is_initialized()
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1), tempfile.TemporaryDirectory(prefix="rl-exit-bench-") as folder:
            if starts:
                start_local(2, logging_level=logging.ERROR)
            yield Path(folder)
    finally:
        if starts:
            ray.shutdown()
        torch.set_num_threads(threads)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def machine() -> dict[str, Any]:
    """Processor, memory, threads, system and the load of the last minute."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "threads": 1,
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of what decides the figures."""
    names = ("torch", "ray", "numpy", "gymnasium", "pyarrow")
    return {"rl-exit": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}
