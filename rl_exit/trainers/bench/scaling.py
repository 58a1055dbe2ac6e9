"""What leaves a process and what stays in it, and what grows with the number of instances and trajectories."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import cloudpickle

from rl_exit.envs.manifest import MANIFEST
from rl_exit.envs.state_store import StateStore
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.bench.anatomy import sampling_parts
from rl_exit.trainers.bench.data import random_store
from rl_exit.trainers.bench.processes import actor_pids, private_mb
from rl_exit.trainers.bench.setup import EPSILON, FOREVER, TRAJECTORIES, WIDTH, Effort, Size, algorithm, pg_config
from rl_exit.trainers.rllib.passes import arrays
from rl_exit.trainers.rllib.pool import idle_worker_megabytes
from rl_exit.trainers.rllib.remote import SamplerActor, SamplerSettings

NUMBERS_OF_TRAJECTORIES = (1, 2, 4, 8, 16, 32, 64)


def scaling(folder: Path, store: StateStore, size: Size, effort: Effort, tick: Callable[[], None]) -> dict[str, Any]:
    """Ten times the instances (another store is written in ``folder``), and any number of trajectories."""
    number = int(size.num_instances * 10**effort.growth)
    other = random_store(folder / "store-other", number, size.num_layers, size.hidden_size)
    small, large = (store, other) if effort.growth > 0 else (other, store)
    seconds = _epochs(small, large, effort.repetitions, tick)
    private = [private_mb_of_runner(one) for one in (small, large)]
    by_number = sampling_parts(store, effort, NUMBERS_OF_TRAJECTORIES)
    return {
        "num_layers": size.num_layers,
        "hidden_size": size.hidden_size,
        "num_instances": [small.num_instances, large.num_instances],
        "epoch_seconds": seconds,
        "epoch_ratio_10x": seconds[1] / seconds[0],
        "private_mb": private,
        "private_mb_growth_10x": private[1] - private[0],
        "policy_pass_seconds_by_k": {str(number): parts["policy_pass"] for number, parts in by_number.items()},
        "batch_seconds_by_k": {str(number): parts["batch"] for number, parts in by_number.items()},
    }


def bytes_per_trajectory(store: StateStore) -> dict[str, float]:
    """What a remote runner is told and what it answers, pickled, per trajectory; the policy's weights apart."""
    manifest = (store.path / MANIFEST).read_text(encoding="utf-8")
    actor = SamplerActor(SamplerSettings(str(store.path), manifest, "path", 0, TRAJECTORIES, "hardness", 0.05))
    blocks = pg_config(store).block_plan().blocks(0, 0)
    weights = arrays(PolicyHeads(store.num_layers, store.hidden_size, WIDTH))
    answer = actor.draw(weights, blocks, EPSILON)
    travels = len(cloudpickle.dumps(blocks)) + len(cloudpickle.dumps(answer))
    return {
        "bytes_per_trajectory": travels / (TRAJECTORIES * sum(len(block.rows) for block in blocks)),
        "weight_bytes_per_update": float(len(cloudpickle.dumps(weights))),
    }


def private_mb_of_runner(store: StateStore) -> float:
    """Private memory of a remote runner after some iterations, above that of a Ray worker that has done nothing."""
    idle = idle_worker_megabytes()
    before = actor_pids()
    ours = algorithm("pg", store, num_env_runners=1)
    try:
        for _ in range(2):
            ours.train()
        pids = actor_pids() - before
        if not pids:
            raise RuntimeError("no process of a remote runner was found")
        return max(private_mb(pid) for pid in pids) - idle
    finally:
        ours.stop()


def _epochs(small: StateStore, large: StateStore, repetitions: int, tick: Callable[[], None]) -> list[float]:
    """Seconds of an epoch of PG, sampling and learning; medians.

    A small epoch and a tenth of a large one take turns: as many updates, in as many iterations of RLlib.
    """
    both = [pg_config(small, updates_per_iteration=FOREVER).build_algo(), pg_config(large).build_algo()]
    runs: list[list[float]] = [[], []]
    try:
        for number in range(repetitions + 1):
            seconds = [0.0, 0.0]
            for _ in range(10):
                for index, ours in enumerate(both):
                    started = time.perf_counter()
                    ours.train()
                    seconds[index] += time.perf_counter() - started
            if number:
                runs[0].append(seconds[0] / 10)
                runs[1].append(seconds[1])
            tick()
    finally:
        for ours in both:
            ours.stop()
    return [statistics.median(times) for times in runs]
