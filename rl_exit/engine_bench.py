"""``rl-exit bench inference``: is a layer saved time saved, does a speed asked for come, does the guarantee hold?

Per model, on texts that nothing was trained on (dev and test of its task), cut at random into calibration and measured
texts. All variants of one batch size run on the same measured texts, a slice of each in turn (:mod:`rl_exit.turns`);
figures are medians over the rounds of the ratio within a round. One thread.

* ``full``: the same engine at full depth, no exit and no policy computed below L;
* ``exits``: the policy at the threshold that ``--speedup 2`` chooses on the calibration texts, survivors pooled, as
  ``rl-exit predict --file`` and ``predict`` of many texts run;
* ``alone``: the same, each batch for itself to its end, as single requests would run (at batch size 1 the same);
* ``never``: exits and policy computed at every layer, and nobody leaves;
* ``plain``: the base model's own ``forward`` of transformers with the last exit on it, same batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rl_exit.config import load_config
from rl_exit.criteria import ConsistentEE, Criterion, Fixed, criterion
from rl_exit.criteria.calibration import careful_first, fewest_for
from rl_exit.data.batching import length_sorted_batches
from rl_exit.data.instances import Instances
from rl_exit.data.tasks import TextSplit, load_task, tokenise
from rl_exit.deployment import model_folder
from rl_exit.errors import DataError
from rl_exit.inference import evaluating, run_instances
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.models.exits import pool
from rl_exit.models.native_exits import SOURCE
from rl_exit.native import library
from rl_exit.operating import Clocked, Evidence, engine_pass, exits_of, gather, grid, point_by_speed, settling
from rl_exit.profiling import profile, surroundings
from rl_exit.progress import Display, Progress
from rl_exit.turns import in_turn, ratio

BATCH_SIZES = (1, 8, 32, 128)
TEXTS = 1000
"""Texts that are timed, at most: fewer would leave the share of early exits to chance (the speed-up of 48 texts strays
by 6 %, that of 450 by 2 %)."""
ROUNDS = 7
SPLITS = 200
SPEEDUP = 2.0
MAX_LOSS, CONFIDENCE = 0.01, 0.95
TARGETS = {
    "time_per_layer_speedup": {1: 0.95, 8: 0.90, 32: 0.90, 128: 0.90},
    "no_exit_overhead": 0.03,
    "requested": 0.05,
}


def run(
    targets: Sequence[Path],
    display: Display,
    quick: bool = False,
    batch_sizes: Sequence[int] = (),
    speedup: float = SPEEDUP,
) -> dict[str, Any]:
    """Measure models.

    Args:
        targets: Run directories or model folders that know their task.
        display: Where progress is shown.
        quick: Fewer rounds.
        batch_sizes: In place of 1, 8, 32 and 128.
        speedup: What is asked for.

    Returns:
        ``models`` by name, each with ``time_per_layer_speedup`` by batch size (against ``full`` and ``plain``),
        ``no_exit_overhead``, ``requested`` and ``guarantee``; ``where``, ``command``, ``date``, ``load_average``
        (of the last minute, before and after) and ``seconds``.

    Raises:
        UserError: A model or its data cannot be read.
    """
    started, load = time.perf_counter(), os.getloadavg()[0]
    with _one_thread():
        found = {}
        for target in targets:
            folder = model_folder(target)
            name = target.resolve().name
            found[name] = _measure(name, folder, display, 3 if quick else ROUNDS, batch_sizes or BATCH_SIZES, speedup)
        where = found[next(iter(found))].pop("where") if found else {}
    for each in found.values():
        each.pop("where", None)
    return {
        "command": " ".join(["rl-exit bench inference", *found, *(["--quick"] if quick else []), "--json"]),
        "date": date.today().isoformat(),
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        "seconds": round(time.perf_counter() - started, 1),
        "rounds": 3 if quick else ROUNDS,
        "where": where,
        "targets": _plain(TARGETS),
        "models": found,
    }


def _measure(
    name: str, folder: Path, display: Display, rounds: int, sizes: Sequence[int], speedup: float
) -> dict[str, Any]:
    model = EarlyExitModel.from_pretrained(folder)
    instances = tokenise(_unseen(folder), model.tokenizer, model.config.max_tokens)
    order = np.random.default_rng(0).permutation(len(instances))
    first, second = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    with display.step(f"{name}: every exit", len(instances)) as progress:
        evidence = gather(model, instances, progress=progress)
    with display.step(f"{name}: profile", 6) as progress:
        costs = profile(model, sizes, progress=progress)
    rows = {}
    with display.step(f"{name}: engine", len(sizes) * (1 + rounds)) as progress:
        for number, size in enumerate(sizes):
            clock = Clocked(model, instances.take(first), size)
            rule = criterion("consistentee")
            point = point_by_speed([rule], evidence.select(first), costs, speedup, size, clock)
            threshold = float(point.params["threshold"])
            measured = instances.take(_spread(second, TEXTS))
            row = measure_engine(model, measured, threshold, size, rounds, progress, number * (1 + rounds))
            at = costs.batch_sizes.index(size), len(costs.lengths) // 2
            tokens = size * costs.lengths[at[1]]
            rows[str(size)] = row | {
                "expected_speedup": point.speedup,
                "clocked": point.clocked,
                "layer_microseconds_per_token": 1e6 * float(np.median(costs.layers[at])) / tokens,
            }
    with display.step(f"{name}: guarantee", SPLITS) as progress:
        promise = _guarantee(evidence, progress)
    return {
        "num_layers": model.num_layers,
        "asked_for": speedup,
        "texts": len(instances),
        "time_per_layer_speedup": {size: row["time_per_layer_speedup"] for size, row in rows.items()},
        "time_per_layer_speedup_by_tokens": {
            size: row["speedup"] / row["layer_speedup_by_tokens"] for size, row in rows.items()
        },
        "time_per_layer_speedup_plain": {size: row["time_per_layer_speedup_plain"] for size, row in rows.items()},
        "time_per_layer_speedup_alone": {size: row["time_per_layer_speedup_alone"] for size, row in rows.items()},
        "no_exit_overhead": {size: row["no_exit_overhead"] for size, row in rows.items()},
        "requested": {size: row["speedup"] / speedup for size, row in rows.items()},
        "guarantee": promise,
        "engine": rows,
        "where": surroundings(model) | {"compiled_decisions": library(SOURCE) is not None},
    }


def measure_engine(
    model: EarlyExitModel, instances: Instances, threshold: float, size: int, rounds: int, progress: Progress, done: int
) -> dict[str, Any]:
    """Time all variants at one batch size; ``progress`` is told ``done`` and the number of rounds since."""
    rule, full, never = ConsistentEE(threshold), Fixed(model.num_layers), ConsistentEE(1.0)
    passes = {
        "full": engine_pass(model, instances, full, size),
        "exits": engine_pass(model, instances, rule, size),
        "never": engine_pass(model, instances, never, size),
        "plain": lambda: _plain_transformers(model, instances, size),
    }
    if size > 1:  # single texts are never pooled
        passes["alone"] = engine_pass(model, instances, rule, size, pooled=False)
    with evaluating(model), torch.inference_mode():
        took = in_turn(
            passes,
            rounds,
            after_round=lambda number: progress.update(done + number),
            settle=settling(model.device),
        )
    left = run_instances(model, instances, rule, size).exit_layer.double().numpy()
    in_layers = model.num_layers / float(left.mean())
    # Where longer texts leave later, layers per text promise more than there is: what counts is layers per token.
    tokens = np.asarray(instances.lengths, dtype=np.float64)
    in_tokens = model.num_layers * float(tokens.sum()) / float((left * tokens).sum())
    return {
        "texts": len(instances),
        "threshold": threshold,
        "layer_speedup": in_layers,
        "layer_speedup_by_tokens": in_tokens,
    } | {
        **_ratios(took.wall, in_layers),
        "seconds": {name: float(np.median(each.sum(1))) for name, each in took.wall.items()},
        "by_processor_time": _ratios(took.processor, in_layers),
    }


def _ratios(times: Mapping[str, npt.NDArray[np.float64]], in_layers: float) -> dict[str, float]:
    speedup = ratio(times["full"], times["exits"])
    return {
        "speedup": speedup,
        "time_per_layer_speedup": speedup / in_layers,
        "time_per_layer_speedup_plain": ratio(times["plain"], times["exits"]) / in_layers,
        "time_per_layer_speedup_alone": ratio(times["full"], times.get("alone", times["exits"])) / in_layers,
        "no_exit_overhead": ratio(times["never"], times["full"]) - 1.0,
        "full_against_plain": ratio(times["plain"], times["full"]),
    }


def _plain_transformers(model: EarlyExitModel, instances: Instances, size: int) -> Iterator[None]:
    """The base model's own forward pass with the last exit as its classifier; the same batches."""
    answers = torch.empty((len(instances), model.config.num_labels))
    for rows in length_sorted_batches(instances.lengths, size):
        batch = {key: value.to(model.device) for key, value in instances.batch(rows).items()}
        states = model.backbone.model(**batch).last_hidden_state
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        pooled = pool(states, mask, model.config.pooling)
        answers[torch.from_numpy(rows)] = model.exits.at(model.num_layers, pooled).float().cpu()
        yield


def _guarantee(evidence: Evidence, progress: Progress) -> dict[str, Any]:
    """How often the bound is broken: calibrated on one random half, measured on the other; and of a known whole."""
    split, level = evidence.split, 1.0 - CONFIDENCE
    count = split.num_instances
    rule: Criterion = criterion("consistentee")
    assert split.exit_logits is not None
    settings = list(grid(rule, split.num_layers, split.num_classes))
    lost = np.stack([evidence.losses(rule, exits_of(setting, split.exit_logits)) for setting in settings])  # [S, N]
    layers = np.stack([exits_of(setting, split.exit_logits) for setting in settings])
    rng = np.random.default_rng(0)
    halves, drawn, refused, saved = [], [], 0, []
    for number in range(SPLITS):
        order = rng.permutation(count)
        mine, rest = order[: count // 2], order[count // 2 :]
        passed, _ = careful_first((row[mine] for row in lost), MAX_LOSS, level)
        refused += passed is None
        halves.append(passed is not None and float(lost[passed, rest].mean()) > MAX_LOSS)
        saved.append(0.0 if passed is None else 1.0 - float(layers[passed, rest].mean()) / split.num_layers)
        # These texts as the whole: what is drawn from it with replacement is independent, and its loss is known.
        draw = rng.integers(0, count, count)
        passed, _ = careful_first((row[draw] for row in lost), MAX_LOSS, level)
        drawn.append(passed is not None and float(lost[passed].mean()) > MAX_LOSS)
        progress.update(number + 1)
    return {
        "max_loss": MAX_LOSS,
        "confidence": CONFIDENCE,
        "splits": SPLITS,
        "calibration_texts": count // 2,
        "fewest": fewest_for(MAX_LOSS, level),
        "broken_on_the_other_half": float(np.mean(halves)),
        "broken_of_a_known_whole": float(np.mean(drawn)),
        "refused": refused / SPLITS,
        "saved_layers": float(np.mean(saved)),
    }


def _unseen(folder: Path) -> TextSplit:
    """Dev and test of the model's task."""
    file = folder / "training.yaml"
    if not file.is_file():
        raise DataError(f"{folder}: the model does not say what it was trained on, so its unseen texts are not known")
    config = load_config(file)
    splits = load_task(config.task, config.seed).splits
    parts = [splits[name] for name in ("dev", "test") if name in splits]
    pairs = None if parts[0].pairs is None else [text for part in parts for text in part.pairs or ()]
    texts = [text for part in parts for text in part.texts]
    return TextSplit(np.arange(len(texts)), texts, pairs, np.concatenate([part.labels for part in parts]))


def _spread(rows: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """At most so many of the rows, evenly spread."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


@contextmanager
def _one_thread():  # type: ignore[no-untyped-def]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _plain(tree: Any) -> Any:
    return {str(key): _plain(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
