"""Where the time of a batch goes: gather, policy pass, draw, learning, and RLlib's bookkeeping around them."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

from rl_exit.envs.sampler import BlockSampler, StateReader
from rl_exit.envs.state_store import StateStore
from rl_exit.trainers.bench.setup import BATCH, EPSILON, WIDTH, Effort, algorithm, pg_config


class Watch:
    """Seconds by name, spent inside functions that it wraps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, name: str, function: Any) -> Any:
        """The function, its time added up under a name."""

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return timed


class _TimedReader(StateReader):
    """A reader whose gathering is on the watch."""

    def __init__(self, store: StateStore, watch: Watch) -> None:
        super().__init__(store)
        self.gather = watch.wrap("gather", super().gather)  # type: ignore[method-assign]


def sampling_parts(store: StateStore, effort: Effort, numbers: tuple[int, ...]) -> dict[int, dict[str, float]]:
    """Medians over repetitions of the seconds of a batch, by number of trajectories and part.

    Args:
        store: N instances.
        effort: How long.
        numbers: Values of K.

    Returns:
        For each K: ``gather``, ``policy_pass``, ``draw`` (everything else), ``batch`` (all).
    """
    ours = algorithm("pg", store)
    policy, plan = ours.env_runner.policy, ours.plan
    batches = max(1, effort.batches // 4)
    runs: dict[int, list[dict[str, float]]] = {number: [] for number in numbers}
    for repetition in range(effort.repetitions + 1):
        for number in numbers:
            watch = Watch()
            sampler = pg_config(store, trajectories=number).open_sampler(_TimedReader(store, watch))
            timed_policy, draw = watch.wrap("policy_pass", policy), watch.wrap("batch", _draw)
            for update in range(batches):
                draw(sampler, timed_policy, plan.blocks(repetition, update % plan.updates))
            spent = {name: seconds / batches for name, seconds in watch.seconds.items()}
            spent["draw"] = spent["batch"] - spent["gather"] - spent["policy_pass"]
            if repetition:
                runs[number].append(spent)
    ours.stop()
    return {
        number: {name: statistics.median(run[name] for run in found) for name in found[0]}
        for number, found in runs.items()
    }


def _draw(sampler: BlockSampler, policy: Any, blocks: list[Any]) -> None:
    for block in blocks:
        sampler.draw(policy, block, EPSILON)


def pg_parts(store: StateStore, effort: Effort) -> dict[str, float]:
    """Medians of the milliseconds of an update of PG's ``train()``: sampling, learning, and RLlib around them."""
    ours = algorithm("pg", store)
    runs: list[dict[str, float]] = []
    for repetition in range(effort.repetitions + 1):
        parts: dict[str, float] = defaultdict(float)
        first = ours.updates_done
        while ours.updates_done < first + effort.batches:
            started = time.perf_counter()
            ours.train()
            metrics = ours.iteration_metrics
            inside, share = metrics["env_steps"] / metrics["env_steps_per_second"], metrics["sample_share"]
            parts["pg_sampling"] += inside * share
            parts["pg_learning"] += inside * (1 - share)
            parts["pg_rllib"] += time.perf_counter() - started - inside
        if repetition:
            runs.append({name: 1e3 * part / (ours.updates_done - first) for name, part in parts.items()})
    ours.stop()
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def anatomy(store: StateStore, effort: Effort, trajectories: int) -> dict[str, Any]:
    """Milliseconds of a batch by part, and how fast the policy pass computes."""
    parts = sampling_parts(store, effort, (trajectories,))[trajectories]
    operations = 2 * BATCH * (store.num_layers - 1) * store.hidden_size * WIDTH
    return {
        "milliseconds_per_batch": {
            **{name: 1e3 * parts[name] for name in ("gather", "policy_pass", "draw")},
            **pg_parts(store, effort),
        },
        "policy_pass_gflops": operations / parts["policy_pass"] / 1e9,
    }
