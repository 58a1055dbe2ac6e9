"""What the benchmarks of ``rl-exit serve`` share: a running server, texts to ask, and a load."""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

WITHIN = (100, 150, 200, 300, 500, 1000)  # milliseconds: bounds of p95, and of the share that is answered within


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


class Server:
    """A running ``rl-exit serve``."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process = process
        self.address = address

    def processes(self, word: str) -> list[psutil.Process]:
        """Its processes whose title holds a word."""
        found = []
        for one in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if word in " ".join(one.cmdline()):
                    found.append(one)
        return found

    @contextmanager
    def alone(self, others: Sequence[Server]) -> Iterator[None]:
        """Stop the processes of other servers for a while: an idle Ray takes a sixth of a core."""
        stopped = [
            one
            for other in others
            if other is not self
            for one in (psutil.Process(other.process.pid), *other.processes(""))
        ]
        try:
            _send(stopped, signal.SIGSTOP)
            yield
        finally:
            _send(reversed(stopped), signal.SIGCONT)


def _send(processes: Iterable[psutil.Process], what: signal.Signals) -> None:
    for one in processes:
        with suppress(psutil.Error):
            one.send_signal(what)


@contextmanager
def serving(model: str, *words: str) -> Iterator[Server]:
    """Serve a model on a free port for a while."""
    port = free_port()
    log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - lives as long as the server
    command = [sys.executable, "-c", "from rl_exit.cli import main; main()", "serve", model, f"--port={port}", *words]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 280
        while "serving " not in Path(log.name).read_text():
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start: {Path(log.name).read_text()}")
            time.sleep(0.2)
        yield Server(process, f"http://127.0.0.1:{port}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)
        log.close()


@dataclass(frozen=True)
class Texts:
    """What requests are made of: texts of a task that no part of the model was trained on.

    Attributes:
        task: Its name.
        path: Folder of its files; None: the built-in task, or the hub.
        joined: How many of them make one text of a request, drawn: mixed lengths beyond the task's own.
    """

    task: str = "docstrings"
    path: str | None = None
    joined: tuple[int, ...] = (1, 1, 1, 1, 2, 2, 4, 8)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Texts:
        """As the command line says."""
        return cls(args.task, args.task_path, tuple(args.joined))

    def requests(self, count: int, seed: int, sizes: list[int]) -> list[list[str]]:
        """Requests of mixed sizes with texts of mixed lengths."""
        rng, known = random.Random(seed), _texts_of(self.task, self.path)
        return [
            [" ".join(rng.choices(known, k=rng.choice(self.joined))) for _ in range(rng.choice(sizes))]
            for _ in range(count)
        ]


@cache
def _texts_of(task: str, path: str | None) -> list[str]:
    """Texts of the test split, or of dev where the task has none."""
    from rl_exit.config import TaskConfig
    from rl_exit.data.tasks import load_task

    splits = load_task(TaskConfig(name=task, path=path), 0).splits
    return splits["test" if "test" in splits else "dev"].texts


async def poisson(
    address: str,
    rate: float,
    seconds: float,
    seed: int,
    extra: dict[str, Any] | None = None,
    sizes: list[int] | None = None,
    texts: Texts | None = None,
    warm: float = 0.0,
    within: Iterable[float] = WITHIN,
) -> dict[str, Any]:
    """Open loop: requests come when a Poisson process says so, whatever the server does with those before.

    A request's time counts from when it was due, so a client that falls behind cannot hide it. Requests of the first
    ``warm`` seconds are no part of the figures, but for their faults. ``within_N_ms`` is the share of all requests
    that was answered within N milliseconds.
    """
    rng = np.random.default_rng(seed)
    seconds += warm
    due = np.cumsum(rng.exponential(1 / rate, int(rate * seconds * 1.2) + 20))
    due = due[due < seconds]
    requests = (texts or Texts()).requests(len(due), seed, sizes or [1])
    took: list[float] = []
    layers: list[int] = []
    faults: Counter[str] = Counter()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:
        started = time.perf_counter()

        async def ask(at: float, some: list[str]) -> None:
            try:
                body = {"texts": some, **(extra or {})}
                async with session.post(f"{address}/v1/predict/batch", json=body) as response:
                    found = await response.json()
                    if response.status != 200:
                        faults[str(response.status)] += 1
                        return
                if at < warm:
                    return
                took.append(time.perf_counter() - started - at)
                layers.extend(answer["exit_layer"] for answer in found["predictions"])
            except (aiohttp.ClientError, TimeoutError) as error:
                faults[type(error).__name__] += 1

        tasks = []
        for at, some in zip(due.tolist(), requests, strict=True):
            wait = at - (time.perf_counter() - started)
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(ask(at, some)))
        await asyncio.gather(*tasks)
        wall = time.perf_counter() - started - warm
    quantiles = np.percentile(took, [50, 95, 99]) if took else [float("nan")] * 3
    return {
        "offered_per_s": rate,
        "requests": int((due >= warm).sum()),
        "answered": len(took),
        "faults": dict(faults),
        "answered_per_s": len(took) / wall,
        "texts_per_s": len(layers) / wall,
        "p50_ms": 1000 * float(quantiles[0]),
        "p95_ms": 1000 * float(quantiles[1]),
        "p99_ms": 1000 * float(quantiles[2]),
        **{
            f"within_{limit:g}_ms": sum(one <= limit / 1000 for one in took) / max(int((due >= warm).sum()), 1)
            for limit in within
        },
        "mean_exit_layer": float(np.mean(layers)) if layers else None,
    }
