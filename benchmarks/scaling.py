"""What an update of the policy phase costs with 1 to 1000 runners: a model, its constants measured, and a simulation.

python benchmarks/scaling.py [--measure] [--nodes-of 16] [--bandwidth 1.25e9]

Weak scaling: every runner has the same number of instances in a batch (256), so the batch grows with the runners. The
constants of a batch (draw, learn, bytes) are those of benchmarks/results/sampling.json; those of an order to an actor
(latency, the driver's time for an order and its answer, their spread) are measured with --measure and kept in
benchmarks/results/scaling.json beside the simulated table. The network's bandwidth cannot be measured on one machine
and is an assumption. See docs/scaling.md for the model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
RUNNERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
LEARNERS = (1, 8, 64)
UPDATES = 400
TRAJECTORIES = 8
BATCH = 256  # instances per runner in an update


@dataclass(frozen=True)
class Constants:
    """Seconds and bytes, for batches of 256 instances with 8 trajectories each (L=12, H=768).

    Attributes:
        sample: A runner draws a batch.
        spread: Standard deviation of its logarithm.
        learn: A learner learns a batch (PG).
        latency: An order to an actor that has nothing to do, and its answer.
        order: The driver's own time for an order.
        answer: The driver's own time for an answer.
        put: Putting the weights into the object store.
        answer_bytes: Of a batch, both ways.
        weight_bytes: Of the policy.
        gradient_bytes: What learners exchange in an update.
    """

    sample: float
    spread: float
    learn: float
    latency: float
    order: float
    answer: float
    put: float
    answer_bytes: float
    weight_bytes: float
    gradient_bytes: float


@dataclass(frozen=True)
class Machines:
    """Assumptions about the cluster: runners per node, bytes per second of a node's network."""

    runners_per_node: int = 16
    bandwidth: float = 1.25e9


def simulate(c: Constants, machines: Machines, runners: int, learners: int, seed: int = 0) -> dict[str, float]:
    """Mean seconds of an update and of its parts, over ``UPDATES`` simulated ones.

    The driver sends orders one after another and takes answers one after another; a runner starts when its order and
    the weights are there; the learners begin when all answers are in (strict) or while the next batch is drawn
    (overlap).
    """
    rng = np.random.default_rng(seed)
    nodes = math.ceil(runners / machines.runners_per_node)
    # Ray copies an object from node to node: every node that has it can hand it on, so copies double.
    weights = c.put + math.ceil(math.log2(nodes + 1)) * c.weight_bytes / machines.bandwidth
    noise = rng.lognormal(-(c.spread**2) / 2, c.spread, (UPDATES, runners)) if c.spread else np.ones((UPDATES, runners))
    wire = c.answer_bytes / machines.bandwidth
    sent = (np.arange(runners) + 1) * c.order
    arrived = np.sort(weights + sent + c.latency + wire + c.sample * noise, axis=1)
    # Answers queue at the driver: t_i = max(t_(i-1), arrival_i) + answer.
    steps = np.arange(runners)
    taken = np.maximum.accumulate(arrived - steps * c.answer, axis=1)[:, -1] + runners * c.answer
    share = runners / learners
    exchange = 0.0 if learners == 1 else 2 * (learners - 1) / learners * c.gradient_bytes / machines.bandwidth
    learn = share * c.learn + exchange + (c.latency if learners > 1 else 0.0)
    drawing = float(taken.mean())
    slowest = float((weights + sent[-1] + c.latency + wire + c.sample * noise.max(axis=1)).mean())
    return {
        "draw": drawing,
        "barrier": slowest - (weights + float(sent[-1]) + c.latency + wire + c.sample),
        "driver": runners * (c.order + c.answer),
        "weights": weights,
        "learn": learn,
        "strict": drawing + learn,
        "overlap": max(drawing, learn),
    }


def table(c: Constants, machines: Machines) -> list[dict[str, float]]:
    """One row for each number of runners and learners that makes sense."""
    return [
        {"runners": runners, "learners": learners, **simulate(c, machines, runners, learners)}
        for runners in RUNNERS
        for learners in LEARNERS
        if learners <= runners
    ]


def limits(c: Constants, machines: Machines, learners: int) -> dict[str, int | None]:
    """Runners from which on, up to 1000, learning takes longer than drawing, or the driver's calls than both.

    Looked for from as many runners as there are learners; None: at 1000 it does not.
    """
    counts = [number for number in range(learners, 1001) if number < 20 or number % 10 == 0]
    parts = [simulate(c, machines, runners, learners) for runners in counts]
    return {
        "learner": _from_on(counts, [at["learn"] > at["draw"] for at in parts]),
        "driver": _from_on(counts, [at["driver"] > max(c.sample, at["learn"]) for at in parts]),
    }


def _from_on(counts: list[int], holds: list[bool]) -> int | None:
    """The first number from which on something holds to the end; None: it does not at the end."""
    first = len(holds)
    while first and holds[first - 1]:
        first -= 1
    return counts[first] if first < len(counts) else None


def sampling_constants() -> dict[str, float]:
    """What the recorded benchmark of sampling says about a batch, larger size."""
    size = json.loads((RESULTS / "sampling.json").read_text())["sizes"][0]
    parts = size["milliseconds_per_batch"]
    return {
        "sample": (parts["gather"] + parts["policy_pass"] + parts["draw"]) / 1e3,
        "learn": parts["pg_learning"] / 1e3,
        "answer_bytes": size["bytes_per_trajectory"] * TRAJECTORIES * BATCH,
        "weight_bytes": size["weight_bytes_per_update"],
        "gradient_bytes": size["weight_bytes_per_update"],
    }


def measure(weight_bytes: int, answer_bytes: int) -> dict[str, float]:
    """Constants of Ray on this machine: actors that do nothing but answer with as many bytes as a batch."""
    import ray

    from rl_exit.trainers.local_ray import start_local

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    start_local(4, logging_level="ERROR")

    @ray.remote(num_cpus=1)
    class Idle:
        def answer(self, weights: Any, blocks: Any) -> bytes:
            return b"x" * answer_bytes

        def work(self) -> list[float]:
            """Seconds of the same piece of numpy work, again and again."""
            states = np.ones((256, 768), dtype=np.float32)
            matrix = np.ones((768, 64), dtype=np.float32)
            seconds = []
            for _ in range(300):
                begun = time.perf_counter()
                for _ in range(12):
                    states @ matrix
                seconds.append(time.perf_counter() - begun)
            return seconds

    actors = [Idle.remote() for _ in range(4)]
    blocks = np.arange(BATCH)
    weights = ray.put(np.ones(weight_bytes, dtype=np.uint8))
    ray.get([actor.answer.remote(weights, blocks) for actor in actors])

    def least(repetitions: int, once: Any) -> float:
        return min(once() for _ in range(repetitions))

    def latency() -> float:
        begun = time.perf_counter()
        ray.get(actors[0].answer.remote(weights, blocks))
        return time.perf_counter() - begun

    def put() -> float:
        data = np.ones(weight_bytes, dtype=np.uint8)
        begun = time.perf_counter()
        ray.put(data)
        return time.perf_counter() - begun

    orders, answers = [], []
    for _ in range(20):
        begun = time.perf_counter()
        references = [actors[k % 4].answer.remote(weights, blocks) for k in range(200)]
        orders.append((time.perf_counter() - begun) / 200)
        ray.wait(references, num_returns=len(references))
        begun = time.perf_counter()
        for reference in references:
            ray.get(reference)
        answers.append((time.perf_counter() - begun) / 200)
    seconds = np.array(ray.get(actors[0].work.remote()))
    seconds = seconds[seconds < np.quantile(seconds, 0.99)]  # what other work of this machine did is not the runner's
    found = {
        "latency": statistics.median(latency() for _ in range(200)),
        "order": min(orders),
        "answer": min(answers),
        "put": least(30, put),
        "spread": float(np.log(seconds).std()),
    }
    ray.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure Ray's constants anew and record everything")
    parser.add_argument("--nodes-of", type=int, default=16, help="runners on a node")
    parser.add_argument("--bandwidth", type=float, default=1.25e9, help="bytes per second of a node's network")
    args = parser.parse_args()
    machines = Machines(args.nodes_of, args.bandwidth)
    given = sampling_constants()
    out = RESULTS / "scaling.json"
    if args.measure:
        own = measure(int(given["weight_bytes"]), int(given["answer_bytes"]))
    else:
        own = {k: v for k, v in json.loads(out.read_text())["constants"].items() if k not in given}
    constants = Constants(**given, **own)
    rows = table(constants, machines)
    tree = {
        "command": "python benchmarks/scaling.py --measure",
        "date": date.today().isoformat(),
        "load_average": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "constants": asdict(constants),
        "assumptions": asdict(machines),
        "limits": {str(number): limits(constants, machines, number) for number in LEARNERS},
        "rows": rows,
    }
    if args.measure:
        out.write_text(json.dumps(tree, indent=2) + "\n")
    for row in rows:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    print(json.dumps(tree["limits"]))


if __name__ == "__main__":
    main()
