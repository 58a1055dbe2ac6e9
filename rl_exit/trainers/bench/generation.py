"""``rl-exit bench generation``: what leaving early is worth by the clock when text is generated.

A decoder of random weights, its cache filled with a random context, writes tokens at full depth and with exit layers
that are drawn from a fixed distribution, in turn. If a skipped layer cost nothing, and a layer in proportion to the
tokens that run through it, tokens per second would grow as the mean exit layer falls; the figure is the share of that
which the clock shows.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from rl_exit import __version__
from rl_exit.criteria import Carry, LayerView
from rl_exit.generation.engine import Engine
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.progress import Display
from rl_exit.trainers.bench.surroundings import machine

TARGET = 0.85
LAYERS = 12
SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "vocab_size": 4096}
# Share of tokens that leave at layers 1..12: many after a third of the way, some at the very end. Mean 5.8.
EXITS = (0.0, 0.05, 0.10, 0.20, 0.20, 0.15, 0.10, 0.06, 0.04, 0.03, 0.02, 0.05)
CASES = ((1, 64), (1, 1024), (1, 4096), (8, 64), (8, 1024), (8, 2048), (8, 4096))
STEPS = 16


@dataclass(frozen=True)
class Drawn:
    """Tokens leave at exits drawn from a fixed distribution; it reads nothing, so that it costs next to nothing.

    Attributes:
        shares: Probability of each exit, [E].
        generator: Of the draws.
        seen: Exits drawn so far, one entry per token.
    """

    shares: Tensor
    generator: torch.Generator
    seen: list[int]
    name = "drawn"

    def start(self, batch_size: int, device: torch.device) -> Carry:
        """Draw an exit for each row."""
        drawn = torch.multinomial(self.shares, batch_size, replacement=True, generator=self.generator) + 1
        self.seen.extend(drawn.tolist())
        return {"exit": drawn.to(device)}

    def leave(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Criterion.leave`."""
        return carry["exit"] == layer


def run(quick: bool, display: Display) -> dict[str, Any]:
    """Measure all cases, on one thread.

    Args:
        quick: Short contexts and few repetitions.
        display: Where progress is shown.

    Returns:
        Figures for JSON; see benchmarks/README.md.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = [case for case in CASES if not quick or case[1] <= 64]
    try:
        with threadpool_limits(1):
            config = LlamaConfig(num_hidden_layers=LAYERS, max_position_embeddings=8192, **SIZES)
            library = LlamaForCausalLM(config).eval()
            model = EarlyExitCausalModel.from_model(library, None)
            found = []
            with display.step("bench generation", len(cases)) as bar:
                for number, (batch, context) in enumerate(cases):
                    found.append(measure(model, library, batch, context, 2 if quick else 6))
                    bar.update(number + 1, f"batch {batch}, context {context}: {found[-1]['share']:.2f}")
    finally:
        torch.set_num_threads(threads)
    return {
        "benchmark": "generation",
        "command": f"rl-exit bench generation{' --quick' if quick else ''}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {
            "rl-exit": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
        "model": {"family": "Llama", "num_layers": LAYERS, **SIZES, "dtype": "float32"},
        "exit_shares": EXITS,
        "target": TARGET,
        "cases": found,
    }


def measure(
    model: EarlyExitCausalModel, library: LlamaForCausalLM, batch: int, context: int, repetitions: int
) -> dict[str, Any]:
    """One case: tokens per second at full depth, with exits, and of the library's own model; all rounds in turn."""
    rule = Drawn(torch.tensor(EXITS), torch.Generator().manual_seed(1), [])
    engine = filled(model, batch, context)

    def full() -> int:
        return decode(engine, batch, context, None)

    def leaving() -> int:
        return decode(engine, batch, context, rule)

    variants: dict[str, Callable[[], int]] = {
        "full_depth": full,
        "exits": leaving,
        "transformers": lambda: decode_library(library, engine, batch, context),
    }
    runs = in_turn(variants, repetitions)
    rates = {name: statistics.median(cpu for cpu, _ in rounds) for name, rounds in runs.items()}
    mean = sum(rule.seen) / len(rule.seen)
    speedup = rates["exits"] / rates["full_depth"]
    return {
        "batch": batch,
        "context": context,
        "tokens_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "runs": {name: [round(cpu, 2) for cpu, _ in rounds] for name, rounds in runs.items()},
        "runs_wall": {name: [round(wall, 2) for _, wall in rounds] for name, rounds in runs.items()},
        "mean_exit_layer": round(mean, 3),
        "layer_speedup": round(LAYERS / mean, 3),
        "speedup": round(speedup, 3),
        "share": round(speedup * mean / LAYERS, 3),
        "deepest_of_batch": round(deepest(batch), 2),
    }


def in_turn(variants: Mapping[str, Callable[[], int]], repetitions: int) -> dict[str, list[tuple[float, float]]]:
    """Tokens per second of each variant in every round, by CPU seconds of this thread and by the clock on the wall.

    One thread computes and waits for nothing, so on a machine that does nothing else the two are the same; where others
    run, the first leaves out the time that they had the processor.
    """
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for number in range(repetitions + 1):
        for name, variant in variants.items():
            cpu, wall = time.thread_time(), time.perf_counter()
            tokens = variant()
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            if number:  # the first round warms up
                runs[name].append((tokens / cpu, tokens / wall))
    return runs


def deepest(batch: int) -> float:
    """Mean deepest exit layer of a batch: the layers whose weights a step must read, however few tokens are left."""
    below, mean = 0.0, 0.0
    for layer, share in enumerate(EXITS, 1):
        mean += layer * ((below + share) ** batch - below**batch)
        below += share
    return mean


@torch.inference_mode()
def filled(model: EarlyExitCausalModel, batch: int, context: int) -> Engine:
    """An engine whose rows hold a random context: what tokens cost does not depend on what they mean."""
    engine = Engine(model, batch, context + STEPS)
    for index in range(LAYERS):
        engine.cache.keys[index][:, :, :context].normal_()
        engine.cache.values[index][:, :, :context].normal_()
        engine.cache.mark(index, range(batch), [context] * batch)
    return engine


@torch.inference_mode()
def decode(engine: Engine, batch: int, context: int, rule: Drawn | None) -> int:
    """Some greedy steps from the end of the context; returns the tokens made."""
    for row in range(batch):
        engine.cut(row, context)
    rows, tokens = list(range(batch)), [1] * batch
    for _ in range(STEPS):
        tokens = engine.step(rows, tokens, rule).logits.argmax(-1).tolist()
    return STEPS * batch


@torch.inference_mode()
def decode_library(library: LlamaForCausalLM, engine: Engine, batch: int, context: int) -> int:
    """The same by the library's model with its own cache, whose making is not what is measured much: see README."""
    cache = DynamicCache()
    for index in range(LAYERS):
        keys, values = engine.cache.keys[index][:, :, :context], engine.cache.values[index][:, :, :context]
        cache.update(keys.contiguous(), values.contiguous(), index)
    tokens = torch.ones((batch, 1), dtype=torch.int64)
    for _ in range(STEPS):
        tokens = library(tokens, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
    return STEPS * batch
