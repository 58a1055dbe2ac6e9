"""Load, engine alone, chaos, soak and fuzz of ``rl-exit serve``, over loopback; see benchmarks/README.md, "serving".

python benchmarks/serving.py load MODEL --sizes 1 > load.json && mv load.json benchmarks/results/serving-load.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import sys
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
from serving_desk import Server, Texts, poisson, serving
from serving_fuzz import fuzz
from serving_load import load

from rl_exit.trainers.bench.surroundings import machine, versions


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
        sub.add_argument("--through-ray", action="store_true", help="Of pooling: a server without lines too (load).")
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
