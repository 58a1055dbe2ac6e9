"""What the best order of layer calls could make of a batch that writes: bounds for `rl-exit bench generation`.

A layer of a small batch costs little less than one of a large batch, because its weights must be read either way. So
the clock shows a token's saved layers only as far as layer calls are saved, and those depend on the order in which rows
run. Measured here is what a call of a layer costs by the number of its rows; from it follow, for the exit shares of
`rl-exit bench generation` and nothing beside the layers (no asking, no copied states, no head):

steps       the engine's order: all rows begin a token together, each layer runs on those that are left;
best        the best of all orders in which any layer that rows wait for may run next, on all who wait there, rows ahead
            of each other by any number of tokens (continuous batching by depth). Exits are not known beforehand. The
            states are the counts of rows by layer, C(B + L - 1, L - 1) of them; the cost per token of the best order is
            found by value iteration.

    python benchmarks/generation_order.py OUT.json [--batch 8] [--contexts 64 1024]
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from rl_exit.files import write_json
from rl_exit.generation.engine import Engine, Flat
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.trainers.bench.generation import EXITS, LAYERS, SIZES, filled
from rl_exit.trainers.bench.surroundings import machine

Floats = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--contexts", type=int, nargs="+", default=[64])
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=LAYERS, max_position_embeddings=8192, **SIZES)
    model = EarlyExitCausalModel.from_model(LlamaForCausalLM(config).eval(), None)
    orders = Orders(given.batch, EXITS)
    mean = sum(layer * share for layer, share in enumerate(EXITS, 1))
    cases = [bound("calls alone", np.array([0.0] + [1.0] * given.batch), orders, mean)]
    for context in given.contexts:
        cost = layer_cost(filled(model, given.batch, context), context, given.batch, given.rounds)
        cases.append(bound(f"context {context}", cost, orders, mean))
        print(cases[-1], flush=True)
    write_json(
        given.out,
        {
            "benchmark": "generation order",
            "command": shlex.join(["python", "benchmarks/generation_order.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "batch": given.batch,
            "exit_shares": EXITS,
            "layer_speedup": round(LAYERS / mean, 3),
            "cases": cases,
        },
    )


@torch.inference_mode()
def layer_cost(engine: Engine, context: int, batch: int, rounds: int) -> Floats:
    """Milliseconds of CPU time of one layer on 0..batch rows, median of rounds; never less for more rows."""
    found: dict[int, list[float]] = {count: [] for count in range(1, batch + 1)}
    for _ in range(rounds):
        for count, times in found.items():
            flat = Flat.of(list(range(count)), [context] * count, [1] * count, engine.device)
            for index in range(LAYERS):
                engine.cache.mark(index, range(batch), [context] * batch)
            hidden = torch.randn(count, SIZES["hidden_size"])
            started = time.thread_time()
            for index in range(LAYERS):
                hidden = engine._run(index, hidden, flat)
            times.append(1000 * (time.thread_time() - started) / LAYERS)
    return np.maximum.accumulate(np.array([0.0] + [statistics.median(found[n]) for n in range(1, batch + 1)]))


def bound(name: str, cost: Floats, orders: Orders, mean: float) -> dict[str, Any]:
    """One row of the table."""
    full = float(cost[orders.batch]) * LAYERS / orders.batch
    found: dict[str, Any] = {"name": name, "cost": [round(float(one), 4) for one in cost[1:]]}
    for order, per_token in (("steps", orders.steps(cost)), ("best", orders.best(cost))):
        speedup = full / per_token
        found[order] = {"speedup": round(float(speedup), 3), "share": round(float(speedup) * mean / LAYERS, 3)}
    return found


class Orders:
    """Orders of layer calls for B rows whose tokens leave at layers 1..L with given shares.

    Args:
        batch: B.
        shares: Of tokens that leave at each layer, [L].
    """

    def __init__(self, batch: int, shares: tuple[float, ...]) -> None:
        self.batch = batch
        layers = len(shares)
        self.reach = np.cumsum(np.array(shares)[::-1])[::-1]  # that a token comes to a layer
        hazard = np.array(shares) / self.reach
        # All ways to put B rows before L layers.
        bars = np.array(list(combinations(range(batch + layers - 1), layers - 1)), dtype=np.int64)
        ends = np.full((len(bars), 1), -1), np.full((len(bars), 1), batch + layers - 1)
        counts = np.diff(np.concatenate([ends[0], bars, ends[1]], 1), axis=1) - 1
        weights = (batch + 1) ** np.arange(layers, dtype=np.int64)
        keys = counts @ weights
        order = np.argsort(keys)
        self.size = len(keys)
        # Calls: the states in which it is possible, its rows, the states that may follow, how likely, tokens written.
        self.calls: list[tuple[NDArray[np.int64], int, NDArray[np.int64], Floats, float]] = []
        for layer in range(layers):
            for rows in range(1, batch + 1):
                here = np.nonzero(counts[:, layer] == rows)[0]
                leaves = float(hazard[layer]) if layer < layers - 1 else 1.0
                likely = [comb(rows, j) * leaves**j * (1 - leaves) ** (rows - j) for j in range(rows + 1)]
                numbers = [j for j in range(rows + 1) if likely[j] > 0]
                deeper = weights[min(layer + 1, layers - 1)]
                after = [keys[here] - rows * weights[layer] + j * weights[0] + (rows - j) * deeper for j in numbers]
                follow = np.array([order[np.searchsorted(keys[order], one)] for one in after])
                self.calls.append((here, rows, follow, np.array([likely[j] for j in numbers]), rows * leaves))

    def steps(self, cost: Floats) -> float:
        """Cost of a token where all rows begin it together."""
        total = 0.0
        for reach in self.reach:
            for rows in range(1, self.batch + 1):
                total += comb(self.batch, rows) * reach**rows * (1 - reach) ** (self.batch - rows) * float(cost[rows])
        return total / self.batch

    def best(self, cost: Floats, tolerance: float = 1e-3) -> float:
        """Cost of a token in the best order, within a relative tolerance."""
        price = self.steps(cost)  # of a token: the best order earns just nothing at it
        value = np.zeros(self.size)
        for _ in range(60):
            for _ in range(60):
                after = np.full(self.size, np.inf)
                for here, rows, follow, likely, tokens in self.calls:
                    after[here] = np.minimum(after[here], cost[rows] - price * tokens + likely @ value[follow])
                change = 0.5 * (after - value)  # half a step each time: orders have a period
                value = value + change
                value -= value[0]
            gain, spread = float(change.max() + change.min()), 2 * float(np.ptp(change))
            if max(abs(gain), spread) < tolerance * price:
                return price
            price += gain
        raise SystemExit("the best order was not found within the iterations")


if __name__ == "__main__":
    main()
