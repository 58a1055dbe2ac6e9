"""Rates of the variants, measured in turn: our runner and algorithms, RLlib's, and the bare loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rl_exit.envs.state_store import StateStore
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.bench import stock
from rl_exit.trainers.bench.bare import BareLoop
from rl_exit.trainers.bench.setup import (
    BATCH,
    ENVIRONMENTS,
    EPSILON,
    LEARNING_RATE,
    PPO_EPOCHS,
    TRAJECTORIES,
    WIDTH,
    Effort,
    Size,
    algorithm,
)
from rl_exit.trainers.bench.timing import interleaved

Rates = dict[str, dict[str, Any]]


def sampling_and_pg(store: StateStore, effort: Effort, tick: Callable[[], None]) -> Rates:
    """The runner against RLlib's and the bare loop; PG's ``train()`` against the bare loop with updates."""
    torch.manual_seed(0)
    bare = BareLoop(
        store,
        PolicyHeads(store.num_layers, store.hidden_size, WIDTH),
        batch_size=BATCH,
        trajectories=TRAJECTORIES,
        epsilon=EPSILON,
        lr=LEARNING_RATE,
    )
    pg = algorithm("pg", store)
    draw = Draws(pg)
    runners = {
        f"rllib_runner_{kind}": stock.CountingRunner(
            config=stock.config(str(store.path), ENVIRONMENTS, TRAJECTORIES, WIDTH, kind), worker_index=0, num_workers=0
        )
        for kind in stock.VECTORISATIONS
    }
    try:
        return interleaved(
            {
                "bare_sampling": lambda: bare.sample(effort.batches),
                "runner": lambda: draw(effort.batches),
                **{name: partial(_stock_sample, runner, effort.stock_steps) for name, runner in runners.items()},
                "bare_training": lambda: bare.train(effort.batches),
                "pg_train": lambda: train(pg, effort.batches),
            },
            effort.repetitions,
            tick,
        )
    finally:
        pg.stop()
        for runner in runners.values():
            runner.stop()


def ppo(store: StateStore, size: Size, effort: Effort, tick: Callable[[], None]) -> Rates:
    """Our PPO against RLlib's on the environment: as many trajectories in a batch, as many passes and minibatches."""
    ours = algorithm("ppo", store)
    rows = int(size.rows * effort.stock_share)
    # RLlib's faster way of stepping 64 environments, in every measurement of `sampling_and_pg` so far.
    theirs = stock.config(
        str(store.path),
        ENVIRONMENTS,
        TRAJECTORIES,
        WIDTH,
        "vector_entry_point",
        rows=rows,
        epochs=PPO_EPOCHS,
        lr=LEARNING_RATE,
    ).build_algo()

    def stock_train() -> int:
        before = theirs.env_runner.layers_visited
        theirs.train()
        return int(theirs.env_runner.layers_visited - before)

    try:
        return interleaved(
            {"ppo_train": lambda: train(ours, max(1, effort.batches // 4)), "ppo_stock": stock_train},
            effort.repetitions,
            tick,
        )
    finally:
        ours.stop()
        theirs.stop()


class Draws:
    """Batch after batch from the runner that an algorithm has in this process.

    Args:
        of: The algorithm.
    """

    def __init__(self, of: Any) -> None:
        self._plan, self._runner = of.plan, of.env_runner
        self._done = 0

    def __call__(self, batches: int) -> int:
        """Draw some batches; returns the steps."""
        steps = 0
        for _ in range(batches):
            blocks = self._plan.blocks(*divmod(self._done, self._plan.updates))
            steps += sum(part.num_steps for _, part in self._runner.sample(blocks=blocks, epsilon=EPSILON))
            self._done += 1
        return steps


def train(ours: Any, updates: int) -> int:
    """``train()`` until so many updates are done; returns the steps."""
    end, steps = ours.updates_done + updates, 0.0
    while ours.updates_done < end:
        ours.train()
        steps += ours.iteration_metrics["env_steps"]
    return round(steps)


def _stock_sample(runner: stock.CountingRunner, steps: int) -> int:
    before = runner.layers_visited
    runner.sample(num_timesteps=steps)
    return runner.layers_visited - before
