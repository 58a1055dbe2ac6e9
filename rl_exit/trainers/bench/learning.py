"""``rl-exit bench learning``: how much of the best reachable return each algorithm reaches, by trajectories drawn.

The yardstick is exact, not sampled: ``J`` is the expected return over all instances of the store, in closed form, of
the stochastic policy and of the greedy one (leave at the first ``pi > 0.5``). Returns are negative, so a share is
counted from the uniform policy (every exit layer equally likely):

    share = (J(policy) - J(uniform)) / (J* - J(uniform))

``J*`` is what the same network reaches when trained to convergence by the exact gradient: the best of several long
runs of a bare loop with decaying learning rate. The best exit of every instance (``oracle``) is higher, and out of
reach for a policy that sees states and not losses.
"""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_exit.envs.state_store import StateStore
from rl_exit.method import expected_return, rewards, threshold_exit
from rl_exit.models.policy import PolicyHeads
from rl_exit.progress import Display
from rl_exit.trainers.bench.surroundings import alone, machine, versions
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, build_algorithm

BLOCK = 2048
MARKS = (1, 2, 4, 8, 16, 40, 80, 160, 320, 480, 640, 800)
"""Trajectories per instance at which the policies are compared."""
SEEDS = (0, 1, 2)
WIDTH = 64
QUICK = 0.05


@dataclass(frozen=True)
class Plan:
    """How an algorithm is run and judged.

    Attributes:
        per_instance: Trajectories per instance in all (epochs times K).
        target: Share to reach.
        judged: The policy that the algorithm is about: ``stochastic``, or ``greedy`` where it optimises that one.
        settings: Of the policy phase, where they differ from its defaults.
    """

    per_instance: int
    target: float
    judged: str = "stochastic"
    settings: Mapping[str, Any] = field(default_factory=dict)


PLANS: dict[str, Plan] = {
    "exact": Plan(800, 0.99, settings={"lr": 3e-3, "epsilon": 0.0}),
    "pg": Plan(800, 0.99, settings={"lr": 3e-3, "epsilon": 0.0}),
    "ppo": Plan(800, 0.99, settings={"lr": 2e-3, "lr_final": 0.0, "epsilon": 0.0}),
    "appo": Plan(160, 0.95, settings={"lr": 3e-3, "epsilon": 0.3, "epsilon_final": 0.0}),
    "impala": Plan(160, 0.95, settings={"lr": 3e-3, "epsilon": 0.1, "epsilon_final": 0.0}),
    "dqn": Plan(160, 0.95, "greedy", {"lr": 3e-3, "epsilon": 0.5, "epsilon_final": 0.1}),
}


@dataclass(frozen=True)
class Optimum:
    """One long run of the exact gradient; Adam, learning rate down to 0 along a cosine."""

    epochs: int
    batch_size: int
    lr: float
    seed: int


OPTIMA = (Optimum(300, 256, 3e-3, 0), Optimum(300, 256, 3e-3, 1))


class Yardstick:
    """Exact returns of policies on a store.

    Args:
        store: N instances.
        reward: Kind of the reward.
        alpha: Price of a layer, nats.
    """

    def __init__(self, store: StateStore, reward: str, alpha: float) -> None:
        self.store = store
        self.table = torch.from_numpy(rewards(store.losses, store.memorized(), alpha, reward))

    @property
    def uniform(self) -> float:
        """J of leaving at every layer with the same chance."""
        return float(self.table.mean(dtype=torch.float64))

    @property
    def oracle(self) -> float:
        """Mean of the best reward of every instance."""
        return float(self.table.max(1).values.mean(dtype=torch.float64))

    @torch.no_grad()
    def returns(self, policy: PolicyHeads) -> dict[str, float]:
        """J of the policy as it stands, and of its greedy form."""
        sums = np.zeros(2)
        for start in range(0, len(self.table), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(self.table)))
            reward = self.table[rows]
            logits = policy(self.store.states(rows))
            greedy = reward.gather(1, threshold_exit(logits.sigmoid()).unsqueeze(1) - 1)
            sums += (float(expected_return(logits, reward).double().sum()), float(greedy.double().sum()))
        stochastic, greedy_return = (sums / len(self.table)).tolist()
        return {"stochastic": stochastic, "greedy": greedy_return}


def initial_policy(store: StateStore, seed: int) -> PolicyHeads:
    """Fresh heads; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PolicyHeads(store.num_layers, store.hidden_size, WIDTH)


def train_optimum(yardstick: Yardstick, run: Optimum, tick: Callable[[float], None]) -> dict[str, float]:
    """Train one policy to convergence."""
    store = yardstick.store
    policy = initial_policy(store, run.seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=run.lr, fused=True)
    order = np.random.default_rng(run.seed)
    count = len(yardstick.table)
    batches = max(1, count // run.batch_size)
    for epoch in range(run.epochs):
        for number, rows in enumerate(np.array_split(order.permutation(count), batches)):
            done = (epoch + number / batches) / run.epochs
            optimizer.param_groups[0]["lr"] = run.lr * 0.5 * (1 + math.cos(math.pi * done))
            loss: Tensor = -expected_return(policy(store.states(rows)), yardstick.table[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        tick(1 / run.epochs)
    return yardstick.returns(policy)


def train(
    yardstick: Yardstick, name: str, plan: Plan, seed: int, settings: Mapping[str, Any], tick: Callable[[float], None]
) -> dict[str, Any]:
    """Run an algorithm once.

    Args:
        yardstick: Judges it.
        name: The algorithm.
        plan: How long.
        seed: Of initialisation and draws.
        settings: Of the policy phase.
        tick: Told the part of the run that is done since the last call.

    Returns:
        ``seed``, ``seconds`` (of training alone) and ``curve``: ``trajectories`` and J at every mark.
    """
    policy = initial_policy(yardstick.store, seed)
    algorithm = build_algorithm(yardstick.store.path, PolicyPhaseSettings(**{**settings, "seed": seed}))
    marks = [mark for mark in MARKS if mark < plan.per_instance]
    curve = [{"trajectories": 0.0, **yardstick.returns(policy)}]
    seconds, told = 0.0, 0.0
    try:
        algorithm.load_policy(policy.state_dict())
        while not algorithm.finished:
            started = time.perf_counter()
            algorithm.train()
            seconds += time.perf_counter() - started
            share = algorithm.epochs_done / settings["epochs"]
            tick(share - told)
            told = share
            if algorithm.finished or (marks and share * plan.per_instance >= marks[0]):
                marks = [mark for mark in marks if mark > share * plan.per_instance]
                policy.load_state_dict(algorithm.policy_weights())
                drawn = algorithm.epochs_done * settings["trajectories"] * len(yardstick.table)
                curve.append({"trajectories": drawn, **yardstick.returns(policy)})
    finally:
        algorithm.stop()
    return {"seed": seed, "seconds": round(seconds, 1), "curve": curve}


def run(
    store: str | Path,
    display: Display,
    *,
    algorithms: Sequence[str] = tuple(PLANS),
    seeds: Sequence[int] = SEEDS,
    quick: bool = False,
    reward: str = "hardness",
    alpha: float = 0.1,
    previous: Mapping[str, Any] | None = None,
    on_result: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure.

    Args:
        store: State store of a training set; frozen, as it is.
        display: Where progress is shown.
        algorithms: Which, by name.
        seeds: One run each.
        quick: A twentieth of the trajectories and of the optimum's epochs: no figures to compare with others.
        reward: Kind of the reward.
        alpha: Price of a layer, nats.
        previous: Results of an earlier call on the same store and reward, whose other algorithms and optimum are kept.
        on_result: Given the results so far after each run, to save them.

    Returns:
        A JSON-able tree: ``uniform``, ``oracle``, ``optimum``, ``algorithms`` (settings, runs, shares) and origin.

    Raises:
        RunError: No such store.
    """
    opened = StateStore.open(store)
    yardstick = Yardstick(opened, reward, alpha)
    results = _frame(opened, yardstick, reward, alpha, quick)
    same = previous is not None and all(previous[key] == results[key] for key in ("store", "reward", "alpha", "quick"))
    planned = [_planned(one, quick) for one in OPTIMA]
    best: list[dict[str, Any]] = []
    if previous is not None and same:
        results["algorithms"] = dict(previous["algorithms"])
        best = [
            run for run in previous["optimum"]["runs"] if any(asdict(one).items() <= run.items() for one in planned)
        ]
    missing = [one for one in planned if not any(asdict(one).items() <= run.items() for run in best)]
    total = len(algorithms) * len(seeds) + len(missing)
    with ExitStack() as stack:
        stack.enter_context(alone())
        progress = stack.enter_context(display.step("bench learning", total))
        done = 0.0

        def tick(note: str) -> Callable[[float], None]:
            def advance(part: float) -> None:
                nonlocal done
                done += part
                progress.update(min(done, total), note)

            return advance

        for one in missing:
            best.append({**asdict(one), **train_optimum(yardstick, one, tick(f"optimum, {one.epochs} epochs"))})
        results["optimum"] = {"return": max(run["stochastic"] for run in best), "runs": best}
        for name, kept in results["algorithms"].items():  # the yardstick may have changed
            results["algorithms"][name] = {**kept, **shares(results, kept)}
        on_result(results)
        for name in algorithms:
            plan = scaled(PLANS[name], quick)
            settings = phase_settings(name, plan, reward, alpha)
            entry: dict[str, Any] = {
                "settings": settings,
                "per_instance": plan.per_instance,
                "target": plan.target,
                "judged": plan.judged,
                "runs": [],
            }
            for seed in seeds:
                entry["runs"].append(train(yardstick, name, plan, seed, settings, tick(f"{name}, seed {seed}")))
                results["algorithms"] = {**results["algorithms"], name: {**entry, **shares(results, entry)}}
                on_result(results)
    results["algorithms"] = {name: results["algorithms"][name] for name in PLANS if name in results["algorithms"]}
    return results


def scaled(plan: Plan, quick: bool) -> Plan:
    """The plan, or a twentieth of it."""
    if not quick:
        return plan
    return Plan(max(8, int(QUICK * plan.per_instance)), plan.target, plan.judged, plan.settings)


def phase_settings(name: str, plan: Plan, reward: str, alpha: float) -> dict[str, Any]:
    """Settings of the policy phase that say all that matters."""
    chosen: dict[str, Any] = {"trajectories": 8, "batch_size": 256, "epsilon_final": 0.0, **plan.settings}
    epochs = max(1, plan.per_instance // chosen["trajectories"])
    return {"algorithm": name, "epochs": epochs, "width": WIDTH, "reward": reward, "alpha": alpha, **chosen}


def shares(results: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of the optimum at the end of the runs, and the mean over the runs at every mark.

    Args:
        results: With ``uniform`` and ``optimum``.
        entry: Of an algorithm, with its ``runs``.

    Returns:
        ``stochastic`` and ``greedy``: mean, min and max at the end; ``curve``: mean, min and max of what is judged.
    """

    def share(value: float) -> float:
        return (value - results["uniform"]) / (results["optimum"]["return"] - results["uniform"])

    def summary(values: Iterable[float]) -> dict[str, float]:
        found = [share(value) for value in values]
        return {"mean": statistics.fmean(found), "min": min(found), "max": max(found)}

    runs = [each["curve"] for each in entry["runs"]]
    points = zip(*runs, strict=True)
    return {
        **{kind: summary(run[-1][kind] for run in runs) for kind in ("stochastic", "greedy")},
        "curve": [
            {
                "trajectories": statistics.fmean(point["trajectories"] for point in at),
                **summary(point[entry["judged"]] for point in at),
            }
            for at in points
        ],
    }


def _planned(one: Optimum, quick: bool) -> Optimum:
    return replace(one, epochs=max(5, int(QUICK * one.epochs))) if quick else one


def _frame(store: StateStore, yardstick: Yardstick, reward: str, alpha: float, quick: bool) -> dict[str, Any]:
    sizes = {"num_instances": store.num_instances, "num_layers": store.num_layers, "hidden_size": store.hidden_size}
    return {
        "benchmark": "learning",
        "command": f"rl-exit bench learning STORE{' --quick' if quick else ''}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "store": {**sizes, "instances": store.instances_fingerprint},
        "reward": reward,
        "alpha": alpha,
        "uniform": yardstick.uniform,
        "oracle": yardstick.oracle,
        "optimum": None,
        "algorithms": {},
        "machine": machine(),
        "versions": versions(),
    }
