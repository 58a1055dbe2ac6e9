"""``rl-exit bench sampling``: how fast trajectories are drawn and learnt from, against RLlib and against the limit.

A *step* is one layer visited by a trajectory, for every variant. All variants run on the same random store, one thread
each, in turn; a ratio is the quotient of two medians. Definitions and recorded results: benchmarks/README.md.
"""

from __future__ import annotations

import datetime
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rl_exit.envs.state_store import StateStore
from rl_exit.errors import UserError
from rl_exit.progress import Display
from rl_exit.trainers.bench import stock
from rl_exit.trainers.bench.anatomy import anatomy
from rl_exit.trainers.bench.compare import ppo, sampling_and_pg
from rl_exit.trainers.bench.data import random_store
from rl_exit.trainers.bench.scaling import bytes_per_trajectory, private_mb_of_runner, scaling
from rl_exit.trainers.bench.setup import (
    BATCH,
    ENVIRONMENTS,
    EPSILON,
    PPO_EPOCHS,
    QUICK,
    SIZES,
    TRAJECTORIES,
    WIDTH,
    Effort,
    Size,
)
from rl_exit.trainers.bench.surroundings import alone, machine, versions

TARGETS: dict[str, tuple[str, float]] = {
    "runner_vs_rllib": ("at least", 100.0),
    "runner_vs_bare": ("at least", 0.85),
    "pg_train_vs_bare": ("at least", 0.8),
    "ppo_train_vs_stock": ("at least", 25.0),
    "bytes_per_trajectory": ("at most", 16.0),
    "private_mb_per_runner": ("at most", 100.0),
}


def run(quick: bool, display: Display, sizes: Sequence[Size] = SIZES, effort: Effort | None = None) -> dict[str, Any]:
    """Measure.

    Args:
        quick: Shorter repetitions, a quarter of RLlib's PPO batch, and a smaller store for the scaling.
        display: Where progress is shown.
        sizes: What to measure on.
        effort: In place of what ``quick`` chooses.

    Returns:
        A JSON-able tree: ``sizes`` (one entry per size, with ratios and raw ``rates``), ``scaling``, ``targets``,
        ``settings``, ``machine``, ``versions``, ``command``, ``date``, ``seconds``.

    Raises:
        UserError: No room for the stores; not on Linux.
    """
    effort = effort or (QUICK if quick else Effort())
    started = time.perf_counter()
    _check_room(Path(tempfile.gettempdir()), sizes, effort)
    # Rounds of runner and PPO for each size, then the scaling.
    total = 2 * len(sizes) * (effort.repetitions + 1) + effort.repetitions + 1
    with alone() as folder, display.step("bench sampling", total) as progress:
        done = 0

        def tick(note: str) -> None:
            nonlocal done
            done += 1
            progress.update(done, note)

        measured = []
        for number, size in enumerate(sizes):
            store = random_store(folder / f"store-{number}", size.num_instances, size.num_layers, size.hidden_size)
            note = f"N={size.num_instances}, L={size.num_layers}, H={size.hidden_size}"
            measured.append(_measure(store, size, effort, partial(tick, note)))
        grown = scaling(folder, store, sizes[-1], effort, partial(tick, "10 times the instances"))
    return {
        "benchmark": "sampling",
        "command": f"rl-exit bench sampling{' --quick' if quick else ''}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "seconds": round(time.perf_counter() - started, 1),
        "sizes": measured,
        "scaling": grown,
        "targets": {name: {"bound": bound, "value": value} for name, (bound, value) in TARGETS.items()},
        "settings": {
            "batch_size": BATCH,
            "trajectories": TRAJECTORIES,
            "policy_width": WIDTH,
            "epsilon": EPSILON,
            "environments": ENVIRONMENTS,
            "ppo_epochs": PPO_EPOCHS,
            "step": "one layer visited by a trajectory",
            **asdict(effort),
        },
        "machine": machine(),
        "versions": versions(),
    }


def _check_room(folder: Path, sizes: Sequence[Size], effort: Effort) -> None:
    need = sum(size.num_bytes for size in sizes) + int(10**effort.growth * sizes[-1].num_bytes)
    free = shutil.disk_usage(folder).free
    if free < 1.1 * need:
        raise UserError(
            f"{folder}: the benchmark writes {need / 1e9:.1f} GB there and {free / 1e9:.1f} GB are free; "
            "set TMPDIR to another folder"
        )


def _measure(store: StateStore, size: Size, effort: Effort, tick: Callable[[], None]) -> dict[str, Any]:
    """One size: all rates, the ratios, and what leaves a process or stays in it."""
    rates = sampling_and_pg(store, effort, tick) | ppo(store, size, effort, tick)
    medians = {name: rate["steps_per_second"] for name, rate in rates.items()}
    return {
        **asdict(size),
        "store_mb": round(size.num_bytes / 1e6, 1),
        "runner_vs_rllib": medians["runner"] / max(medians[f"rllib_runner_{kind}"] for kind in stock.VECTORISATIONS),
        "runner_vs_bare": medians["runner"] / medians["bare_sampling"],
        "pg_train_vs_bare": medians["pg_train"] / medians["bare_training"],
        "ppo_train_vs_stock": medians["ppo_train"] / medians["ppo_stock"],
        **bytes_per_trajectory(store),
        "private_mb_per_runner": private_mb_of_runner(store),
        **anatomy(store, effort, TRAJECTORIES),
        "rates": rates,
    }
