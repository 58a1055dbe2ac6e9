"""``python benchmarks/serving.py load``: what pooled, plain and full depth answer at rising loads, and at equal p95."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any

import numpy as np
from serving_desk import WITHIN, Server, Texts, poisson, serving

# Over the best plain batching; without lines, as plain batching's, a request is a call of Ray's.
RATIOS = {"pooled_vs_plain": "pooled", "through_ray_vs_plain": "pooled-through-ray"}


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Pooled, straight, through Ray and with goals, plain and full depth in turn at rising loads, until overloaded."""
    pooled = ["--batching=pooled", f"--batch-size={args.batch_size}"]
    servers = {"pooled": [*pooled, "--deadline-ms=0"]}
    if args.through_ray:
        servers["pooled-through-ray"] = [*servers["pooled"], "--no-lines"]
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
    ratios: dict[str, dict[str, float | None]] = {name: {} for name in (*RATIOS, "goal_vs_plain")}
    for limit, found in answered.items():
        plain = max((rate or 0.0 for kind, rate in found.items() if kind.startswith("plain")), default=0.0)
        for name, kind in (*RATIOS.items(), ("goal_vs_plain", goal_kind(limit))):
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
