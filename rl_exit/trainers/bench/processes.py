"""Private memory of Ray's worker processes, read from outside (Linux)."""

from __future__ import annotations

import os
from pathlib import Path

from rl_exit.errors import UserError


def private_mb(pid: int) -> float:
    """Anonymous resident memory of a process in MB (10^6 bytes): its own, without files it maps or shares.

    Raises:
        UserError: This system does not tell (anything but Linux).
    """
    try:
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise UserError(f"the private memory of process {pid} cannot be read from /proc: this benchmark needs Linux")


def actor_pids() -> set[int]:
    """Processes of Ray actors below this process; idle workers are left out."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            # The command's name, in brackets, may hold anything, hence the last bracket.
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # ended meanwhile
            continue

    def is_below(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == os.getpid():
                return True
        return False

    return {pid for pid, title in titles.items() if title.startswith("ray::") and "IDLE" not in title and is_below(pid)}
