"""Timing a model's parts on this machine: each layer, exit and policy head, at several batch sizes and lengths."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rl_exit import __version__
from rl_exit.costs import CostModel
from rl_exit.errors import ConfigError
from rl_exit.inference import evaluating
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.pooling import limits, part_of
from rl_exit.progress import Progress

BATCH_SIZES = (1, 8, 32)
RUNS = 5
LONGEST_CELL = 2.0  # seconds that the passes of one size may take, beyond the fewest
FEWEST = 3


def profile(
    model: EarlyExitModel,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    lengths: Sequence[int] | None = None,
    runs: int = RUNS,
    progress: Progress | None = None,
) -> CostModel:
    """Time every part of a model; medians over passes, the sizes in turn.

    Args:
        model: The model, where it will run and in the precision it will run in.
        batch_sizes: Texts per batch, each at least 1; timed in the parts in which the engine runs them.
        lengths: Tokens per text; default: 8, a quarter of ``max_tokens``, and ``max_tokens``.
        runs: Passes at each size, after one that is not counted; at least 3.
        progress: Told the number of passes done.

    Raises:
        ConfigError: A size below 1, or a length above what the model takes.
    """
    sizes = tuple(sorted(set(batch_sizes)))
    most = model.config.max_tokens
    tokens = tuple(sorted(set(lengths or (min(8, most), max(most // 4, min(8, most)), most))))
    if not sizes or sizes[0] < 1 or tokens[0] < 1 or tokens[-1] > most:
        raise ConfigError(
            f"profile at batch sizes {list(sizes)} and lengths {list(tokens)}; accepted: from 1, lengths up to the "
            f"model's {most} tokens"
        )
    layers = model.num_layers
    found: dict[tuple[int, int], list[_Pass]] = {(size, length): [] for size in sizes for length in tokens}
    spent = dict.fromkeys(found, 0.0)
    generator = np.random.default_rng(0)
    table: Any = model.get_input_embeddings()
    vocabulary = table.weight.shape[0]
    with evaluating(model), torch.inference_mode():
        for number in range(1 + max(runs, FEWEST)):
            for cell, passes in found.items():
                if number > FEWEST and spent[cell] > LONGEST_CELL:
                    continue
                size, length = cell
                together = part_of(size, length, limits(model.device)[1])  # as the engine runs them
                ids = torch.from_numpy(generator.integers(0, vocabulary, (together, length))).to(model.device)
                taken = _timed(model, ids)
                spent[cell] += taken.embed + sum(taken.layers) + sum(taken.exits) + sum(taken.policy)
                if number:
                    passes.append(taken.times(size / together))
            if progress is not None:
                progress.update(number + 1)
    shape = (len(sizes), len(tokens))
    embed = np.array([[_median([p.embed for p in found[s, t]]) for t in tokens] for s in sizes])
    each = np.array([[_columns([p.layers for p in found[s, t]]) for t in tokens] for s in sizes])
    # Heads read one state per text, whatever its length (and run once a part, which is little beside its layers).
    exits = np.array([np.median([_columns([p.exits for p in found[s, t]]) for t in tokens], axis=0) for s in sizes])
    policy = np.array([np.median([_columns([p.policy for p in found[s, t]]) for t in tokens], axis=0) for s in sizes])
    return CostModel(
        sizes, tokens, embed.reshape(shape), each.reshape(*shape, layers), exits, policy, surroundings(model)
    )


def surroundings(model: EarlyExitModel) -> dict[str, Any]:
    """What measured times hold for."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    device = model.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(next(model.backbone.parameters()).dtype).removeprefix("torch."),
        "versions": {
            "rl-exit": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "date": date.today().isoformat(),
    }


class _Pass:
    """Seconds of one pass."""

    def __init__(self) -> None:
        self.embed = 0.0
        self.layers: list[float] = []
        self.exits: list[float] = []
        self.policy: list[float] = []

    def times(self, share: float) -> _Pass:
        """As many times the work."""
        self.embed *= share
        for each in (self.layers, self.exits, self.policy):
            each[:] = [share * seconds for seconds in each]
        return self


def _timed(model: EarlyExitModel, ids: torch.Tensor) -> _Pass:
    found, carry = _Pass(), dict[str, torch.Tensor]()
    clock = _clock(model.device)
    at = clock()
    state = model.backbone.begin(ids)
    found.embed, at = clock() - at, clock()
    for layer in range(1, model.num_layers + 1):
        state = model.backbone.step(layer, state)
        now = clock()
        found.layers.append(now - at)
        decision = 0.0
        if layer < model.num_layers:
            model.view(layer, state).exit_logit(carry)
            decision = clock() - now
            now = clock()
        _ = model.view(layer, state).logits
        at = clock()
        found.exits.append(at - now)
        if layer < model.num_layers:
            # A decision reads its exit: what it takes on top (nothing, where compiled code is quicker than the exit).
            found.policy.append(max(decision - found.exits[-1], 0.0))
    return found


def _clock(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _columns(rows: Sequence[Sequence[float]]) -> list[float]:
    return [float(value) for value in np.median(np.array(rows), axis=0)]
