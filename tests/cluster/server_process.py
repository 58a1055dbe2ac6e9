"""``rl-exit serve`` in a process of its own, for tests."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


REPLICA = "ServeReplica:rl-exit:model"
FRONT = "ServeReplica:rl-exit:front"
MODEL = "rl_exit.serving.model_worker"  # of a classifier: beside its replica


class Server:
    """The command in a process of its own."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.port = free_port()
        self.log = log
        command = [sys.executable, "-c", "from rl_exit.cli import main; main()", "serve", str(folder)]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, f"--port={self.port}", "--replicas=2"], stdout=out, stderr=subprocess.STDOUT
            )

    def wait(self, seconds: float = 240.0) -> None:
        until = time.monotonic() + seconds
        while not any(line.startswith("serving ") for line in self.log.read_text().splitlines()):
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.1)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=100) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            return str(response.read().decode())

    def processes(self, word: str) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in children if word in _command(one)]

    def wait_for(self, word: str, number: int, seconds: float = 60.0) -> list[psutil.Process]:
        until = time.monotonic() + seconds
        while len(found := self.processes(word)) < number:
            assert time.monotonic() < until, f"{len(found)} of {number} {word} after {seconds} s"
            time.sleep(0.2)
        return found

    def retries(self) -> float:
        lines = self.get("/metrics").splitlines()
        return float(next(line for line in lines if line.startswith("rl_exit_retries_total")).split()[1])


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):  # gone since it was listed
        return ""
