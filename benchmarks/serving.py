"""Load, engine alone, chaos, soak and fuzz of ``rl-exit serve``, over loopback; see benchmarks/README.md, "serving".

python benchmarks/serving.py load MODEL --sizes 1 > load.json && mv load.json benchmarks/results/serving-load.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from rl_exit.trainers.bench.surroundings import machine, versions

JSON_TYPE = {"content-type": "application/json"}
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


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Pooled, pooled with goals, plain (by batch size) and full depth in turn at rising loads, until overloaded."""
    pooled = ["--batching=pooled", f"--batch-size={args.batch_size}"]
    servers = {"pooled": [*pooled, "--deadline-ms=0"]}
    goals = {goal_kind(goal): goal for goal in args.goal_ms}
    servers.update({name: [*pooled, f"--goal-ms={goal:g}"] for name, goal in goals.items()})
    for size, wait in product(args.plain_batch_size, args.plain_deadline_ms):
        name = f"plain-{size}" + (f"-{wait:g}-ms" if len(args.plain_deadline_ms) > 1 else "")
        servers[name] = ["--batching=plain", f"--batch-size={size}", f"--deadline-ms={wait:g}"]
    rows: dict[str, list[dict[str, Any]]] = {}
    texts = Texts.of(args)
    limits = sorted({*WITHIN, *args.goal_ms})
    with ExitStack() as stack:
        running = [stack.enter_context(serving(args.model, *words)) for words in servers.values()]
        kinds: dict[str, tuple[Server, dict[str, Any]]] = {
            name: (server, {}) for name, server in zip(servers, running, strict=True)
        }
        if args.full_depth:
            kinds["full_depth"] = (running[-1], {"operating_point": "full-depth"})
        for server, extra in kinds.values():
            asyncio.run(poisson(server.address, 10, 2, 99, extra, args.sizes, texts))  # warm
        over: set[str] = set()
        for rate in args.rates:
            turns: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds if kind not in over}
            if not turns:
                break
            for turn in range(args.repeats):
                first = turn % len(turns)
                for kind in (*list(turns)[first:], *list(turns)[:first]):
                    server, extra = kinds[kind]
                    asked = args.seconds, 1000 * turn + int(rate), extra, args.sizes, texts, args.warm, limits
                    with server.alone(running):
                        turns[kind].append(asyncio.run(poisson(server.address, rate, *asked)))
            for kind, each in turns.items():
                row = middle(each)
                rows.setdefault(kind, []).append(row)
                print(kind, json.dumps(row), file=sys.stderr)
                # With a goal a p95 far beyond it says no more than one just beyond it.
                if not row["p95_ms"] <= min(args.most_p95_ms, 2 * goals.get(kind, args.most_p95_ms)):
                    over.add(kind)
    return {
        "settings": servers,
        "repeats": args.repeats,
        "texts_per_request": args.sizes,
        "task": texts.task,
        "joined": texts.joined,
        "rows": rows,
        **at_equal_p95(rows, limits),
    }


def goal_kind(goal: float | str) -> str:
    """The name of pooling with a goal, of so many milliseconds."""
    return f"pooled-goal-{float(goal):g}-ms"


def at_equal_p95(rows: dict[str, list[dict[str, Any]]], limits: Sequence[float]) -> dict[str, Any]:
    """What each kind answers within bounds of p95; pooled, and pooled with that bound as its goal, over the best plain
    batching. Of pooling with a goal nothing is told beyond it, as it was not offered more."""
    goals = {goal_kind(limit): limit for limit in limits}
    answered = {
        f"{limit:g}": {
            kind: sustained(found, limit) if limit <= goals.get(kind, limit) else None for kind, found in rows.items()
        }
        for limit in limits
    }
    ratios: dict[str, dict[str, float | None]] = {"pooled_vs_plain": {}, "goal_vs_plain": {}}
    for limit, found in answered.items():
        plain = max((rate or 0.0 for kind, rate in found.items() if kind.startswith("plain")), default=0.0)
        for name, kind in (("pooled_vs_plain", "pooled"), ("goal_vs_plain", goal_kind(limit))):
            rate = found.get(kind)
            ratios[name][limit] = rate / plain if rate and plain else None
    return {"throughput_at_p95_ms": answered, **ratios}


def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over repetitions of the same load, with every p95; counts are summed up."""
    summed = {name: sum(row[name] for row in rows) for name in ("requests", "answered")}
    faults = sum((Counter(row["faults"]) for row in rows), Counter())
    rest = [name for name in rows[0] if name not in (*summed, "faults")]
    medians = {name: float(np.median([row[name] for row in rows])) for name in rest}
    return {**medians, **summed, "faults": dict(faults), "every_p95_ms": [row["p95_ms"] for row in rows]}


def sustained(rows: list[dict[str, Any]], limit: float) -> float | None:
    """Requests answered a second at the greatest load whose p95 stays under a limit, between measured loads in line
    with the logarithm of p95; of loads that answer less than a smaller one, as much as the smaller one.

    p95 rises with the load, so what falls is chance: the rising curve nearest to the medians is read (least squares of
    their logarithms).
    """
    from sklearn.isotonic import IsotonicRegression

    loads = [row["offered_per_s"] for row in rows]
    answered = np.maximum.accumulate([row["answered_per_s"] for row in rows])
    risen = np.exp(IsotonicRegression().fit_transform(loads, np.log([row["p95_ms"] for row in rows])))
    within = int((risen <= limit).sum())
    if within == 0:
        return None
    if within == len(rows):
        return float(answered[-1])
    share = np.log(limit / risen[within - 1]) / np.log(risen[within] / risen[within - 1])
    return float(answered[within - 1] + share * (answered[within] - answered[within - 1]))


def chaos(args: argparse.Namespace) -> dict[str, Any]:
    """SIGKILL to a replica of the model, several times, under load."""

    async def run(server: Server) -> dict[str, Any]:
        killed = []

        async def kill() -> None:
            for _ in range(args.kills):
                await asyncio.sleep(args.seconds / (args.kills + 1))
                victims = server.processes("ServeReplica:rl-exit:model")
                if victims:
                    killed.append(victims[0].pid)
                    victims[0].send_signal(signal.SIGKILL)

        found, _ = await asyncio.gather(poisson(server.address, args.rate, args.seconds, 1, None, args.sizes), kill())
        return {**found, "killed": len(killed)}

    with serving(args.model, f"--replicas={args.replicas}") as server:
        found = asyncio.run(run(server))
    return {
        "replicas": args.replicas,
        "texts_per_request": args.sizes,
        **found,
        "lost": found["requests"] - found["answered"],
    }


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Resident memory of every process under a steady load."""
    words = {
        "model": "serving.model_worker",
        "replica": "ServeReplica:rl-exit:model",
        "front": "ServeReplica:rl-exit:front",
    }
    samples: list[dict[str, float]] = []
    parts = []
    with serving(args.model) as server:
        asyncio.run(poisson(server.address, args.rate, 10, 0))
        until = time.monotonic() + 60 * args.minutes
        turn = 0
        while time.monotonic() < until:
            samples.append(
                {name: sum(p.memory_info().rss for p in server.processes(word)) / 1e6 for name, word in words.items()}
            )
            turn += 1
            parts.append(asyncio.run(poisson(server.address, args.rate, 20, turn)))
    half = len(samples) // 2
    growth = {
        name: float(np.median([s[name] for s in samples[half:]]) - np.median([s[name] for s in samples[:half]]))
        for name in words
    }
    return {
        "minutes": args.minutes,
        "offered_per_s": args.rate,
        "requests": sum(part["requests"] for part in parts),
        "answered": sum(part["answered"] for part in parts),
        "p95_ms_first_and_last": [parts[0]["p95_ms"], parts[-1]["p95_ms"]],
        "resident_mb": samples,
        "growth_mb_second_half_over_first": growth,
    }


def engine(args: argparse.Namespace) -> dict[str, Any]:
    """Texts a second of the model alone, all there from the start, without HTTP: what each part of pooling brings."""
    import math
    from dataclasses import replace

    import torch

    from rl_exit import EarlyExitModel
    from rl_exit.serving.engine import PooledEngine, measure_rules
    from rl_exit.serving.schema import Wish
    from rl_exit.serving.service import ModelService, run_together

    torch.set_num_threads(1)
    model = EarlyExitModel.from_pretrained(args.model).eval()
    rules = measure_rules(model, args.batch_size, 0.0)
    service = ModelService(model, rules)
    drawn = Texts.of(args).requests(args.texts, args.seed, [1])
    texts = service.texts.tokenised([request[0] for request in drawn], None)
    rule = service.rule_for(Wish())

    def pooled(**changes: Any) -> None:
        one = PooledEngine(model, replace(rules, **changes))
        one.submit(texts, rule).result()
        one.close()

    def plain(size: int) -> None:
        for start in range(0, args.texts, size):
            run_together(model, [(texts.take(range(start, min(start + size, args.texts))), rule)])

    kinds: dict[str, Any] = {
        "pooled": pooled,
        "pooled by depth alone, texts of any length": lambda: pooled(overhead=math.inf, batch_tokens=10**9),
        **{f"plain, batch size {size}": (lambda size=size: plain(size)) for size in (1, 4, 8, 32)},
    }
    runs: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(3):
        for kind, work in kinds.items():
            started = time.perf_counter()
            work()
            runs[kind].append(args.texts / (time.perf_counter() - started))
    service.close()
    return {
        "task": args.task,
        "joined": args.joined,
        "texts": args.texts,
        "overhead_tokens": rules.overhead,
        "batch_tokens": rules.batch_tokens,
        "texts_per_s": {kind: float(np.median(found)) for kind, found in runs.items()},
        "runs": runs,
    }


def fuzz(args: argparse.Namespace) -> dict[str, Any]:
    """Random requests, right and wrong, against every path of the schema; counts statuses."""
    rng = random.Random(args.seed)
    statuses: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []

    async def run(server: Server) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
            async with session.get(f"{server.address}/openapi.json") as response:
                tree = await response.json()
            for _ in range(args.requests):
                path, method, body, headers = fuzzed(tree, rng)
                async with session.request(method, server.address + path, data=body, headers=headers) as response:
                    text = await response.text()
                    declared = str(response.status) in tree["paths"].get(path, {}).get(method.lower(), {}).get(
                        "responses", {str(response.status): None}
                    )
                    statuses[str(response.status)] += 1
                    problem = response.status >= 400 and "message" not in text
                    if response.status >= 500 or problem or not declared:
                        faults.append({"path": path, "status": response.status, "body": repr(body)[:200]})
            async with session.post(f"{server.address}/v1/predict", json={"text": "goes on"}) as response:
                assert response.status == 200, "the service must go on"

    with serving(args.model) as server:
        asyncio.run(run(server))
    return {
        "requests": args.requests,
        "seed": args.seed,
        "statuses": dict(sorted(statuses.items())),
        "server_errors": sum(count for status, count in statuses.items() if status.startswith("5")),
        "undeclared_or_without_message": len(faults),
        "faults": faults[:20],
    }


ODD = (
    None,
    True,
    False,
    0,
    -1,
    1e308,
    "",
    " ",
    "\x00",
    "a" * 30_000,
    "\ud800",
    "😀" * 50,
    [],
    [[]],
    {},
    {"text": {}},
    [None],
)


def fuzzed(tree: dict[str, Any], rng: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """A request drawn from the schema, then spoilt in up to three places."""
    posts = [path for path, methods in tree["paths"].items() if "post" in methods]
    path = rng.choice(posts)
    reference = tree["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    shape = tree["components"]["schemas"][reference.rsplit("/", 1)[1]]
    body: Any = {
        name: drawn(part, rng)
        for name, part in shape["properties"].items()
        if name in shape.get("required", ()) or rng.random() < 0.3
    }
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        kind = rng.randrange(4)
        if kind == 0 and body:
            body[rng.choice(sorted(body))] = rng.choice(ODD)
        elif kind == 1 and body:
            del body[rng.choice(sorted(body))]
        elif kind == 2:
            body[rng.choice(("txt", "", "text ", "__class__", "\ud800"))] = rng.choice(ODD)
        else:
            body = {**body, "texts": ["a"] * rng.choice((0, 1, 300))}
    if rng.random() < 0.03:
        body = rng.choice(ODD)
    raw = json.dumps(body).encode()
    if rng.random() < 0.15:  # bytes that are no JSON any more
        cut = bytearray(raw)
        for _ in range(rng.randint(1, 6)):
            cut[rng.randrange(len(cut))] = rng.randrange(256)
        raw = bytes(cut[: rng.randint(0, len(cut))])
    if rng.random() < 0.02:
        raw = b'{"text": "' + b"a" * 1_100_000 + b'"}'
    headers = JSON_TYPE if rng.random() < 0.95 else {"content-type": rng.choice(("text/plain", "", "application/xml"))}
    method = "POST" if rng.random() < 0.95 else rng.choice(("PUT", "DELETE", "PATCH"))
    if rng.random() < 0.03:
        path = rng.choice(("/v2/predict", "/v1/predict/", "/..", "/v1/%00", "/v1/model"))
    return path, method, raw, headers


def drawn(part: dict[str, Any], rng: random.Random) -> Any:
    """A value that the schema allows."""
    if "anyOf" in part:
        return drawn(rng.choice(part["anyOf"]), rng)
    if part["type"] == "array":
        return [drawn(part["items"], rng) for _ in range(rng.randint(1, 5))]
    if part["type"] == "number":
        return rng.uniform(part.get("minimum", 0), part.get("maximum", 1))
    if part["type"] == "string":
        return "".join(rng.choice('ab éß漢😀\n\t"\\') for _ in range(rng.randint(part.get("minLength", 0), 60)))
    return None


def main() -> None:
    """Run one of the five and print its record."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the servers end with those who started them
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, work in (("load", load), ("chaos", chaos), ("soak", soak), ("fuzz", fuzz), ("engine", engine)):
        sub = commands.add_parser(name)
        sub.set_defaults(work=work)
        sub.add_argument("model")
        sub.add_argument("--seconds", type=float, default=10.0 if name == "load" else 40.0)
        sub.add_argument("--warm", type=float, default=2.0, help="Seconds of each load that are not counted (load).")
        sub.add_argument("--rate", type=float, default=20.0)
        sub.add_argument("--rates", type=float, nargs="+", default=[5, 10, 15, 20, 25, 30, 40])
        sub.add_argument("--most-p95-ms", type=float, default=1500.0)
        sub.add_argument("--batch-size", type=int, default=32)
        sub.add_argument("--plain-batch-size", type=int, nargs="+", default=[32], help="Requests; the best counts.")
        sub.add_argument("--plain-deadline-ms", type=float, nargs="+", default=[5, 25, 60], help="Of a batch.")
        sub.add_argument("--full-depth", action=argparse.BooleanOptionalAction, default=True, help="Ask for it (load).")
        sub.add_argument("--goal-ms", type=float, nargs="*", default=[], help="Of pooling, one server each (load).")
        sub.add_argument("--repeats", type=int, default=3, help="Of each load; medians count.")
        sub.add_argument("--sizes", type=int, nargs="+", default=[1, 1, 2, 4, 8], help="Texts per request, drawn.")
        sub.add_argument("--task", default="docstrings", help="Whose texts are asked (load, engine).")
        sub.add_argument("--task-path", help="Folder of its files.")
        sub.add_argument("--joined", type=int, nargs="+", default=list(Texts.joined), help="How many in one, drawn.")
        sub.add_argument("--replicas", type=int, default=2)
        sub.add_argument("--kills", type=int, default=2)
        sub.add_argument("--minutes", type=float, default=10.0)
        sub.add_argument("--requests", type=int, default=2500)
        sub.add_argument("--texts", type=int, default=160)
        sub.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started = time.monotonic()
    found = args.work(args)
    words = shlex.join(sys.argv[1:])
    if args.task_path:
        words = words.replace(args.task_path, "DATA")
    record = {
        "command": "python benchmarks/serving.py " + words.replace(args.model, "MODEL"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "seconds": time.monotonic() - started,
        **found,
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
