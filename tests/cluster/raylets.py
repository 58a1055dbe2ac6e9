"""Three raylets on this machine, as different machines as one can make them: own temporary folders, a token."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 180.0


@dataclass
class Raylets:
    """A running cluster.

    Attributes:
        url: Of the dashboard.
        token_path: File with the token.
        folder: Of all that belongs to it.
    """

    url: str
    token_path: Path
    folder: Path

    def ask(self, page: str) -> bytes:
        """A page of the dashboard."""
        headers = {"Authorization": f"Bearer {self.token_path.read_text()}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + page, headers=headers), timeout=5) as answer:
            return bytes(answer.read())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def three_raylets(cpus: int = 2) -> Iterator[Raylets]:
    """Start a head and two nodes; ends exactly those processes."""
    folder = Path(tempfile.mkdtemp(prefix="rx", dir="/tmp"))  # sockets lie in it, whose paths must be short
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    binaries = Path(sys.executable).parent
    env = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "OMP_NUM_THREADS": "1",
    }
    env.pop("PYTHONPATH", None)  # the job brings its own code
    port, board = free_port(), free_port()
    common = [f"--num-cpus={cpus}", "--object-store-memory=100000000", "--disable-usage-stats"]
    head = [f"--port={port}", f"--dashboard-port={board}", f"--ray-client-server-port={free_port()}"]
    raylets = Raylets(f"http://127.0.0.1:{board}", token, folder)
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *words: str) -> None:
        with (folder / f"{name}.log").open("wb") as log:
            command = [str(binaries / "ray"), "start", "--block", f"--temp-dir={folder / name}", *words, *common]
            started.append(
                subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder, start_new_session=True)
            )

    try:
        start("h", "--head", *head)
        _await(lambda: b"ray_version" in raylets.ask("/api/version"))
        for name in ("a", "b"):
            start(name, f"--address=127.0.0.1:{port}")
        _await(lambda: raylets.ask("/api/v0/nodes").count(b"ALIVE") >= 3)
        yield raylets
    finally:
        for process in reversed(started):
            with_children(process)
        shutil.rmtree(folder, ignore_errors=True)


def with_children(process: subprocess.Popen[bytes]) -> None:
    """End a `ray start --block` and what it has started (all in its session)."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _await(ready: object) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            if ready():  # type: ignore[operator]
                return
        except OSError:
            pass
        if time.monotonic() > until:
            raise TimeoutError("the test's cluster did not come up")
        time.sleep(0.3)
