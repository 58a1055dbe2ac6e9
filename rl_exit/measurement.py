"""A model measured on labelled instances: every exit in one full pass, then leaving early for real."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from rl_exit.criteria import Criterion, criterion
from rl_exit.data.batching import length_sorted_batches
from rl_exit.data.instances import Instances
from rl_exit.evaluation import SplitResult, evaluate, score
from rl_exit.inference import run_instances
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.progress import Progress

FULL_BATCH = 64
TIMED_INSTANCES = 512
TIMED_RUNS = 3


def every_exit(
    model: EarlyExitModel, instances: Instances, progress: Progress | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Run all layers: logits of every exit [N, L, C], log-odds of Exit [N, L-1] and the policy's answers [N, L, C]."""
    count, layers, classes = len(instances), model.num_layers, model.config.num_labels
    logits = np.empty((count, layers, classes), dtype=np.float32)
    exit_logits = np.empty((count, layers - 1), dtype=np.float32)
    answers = np.empty_like(logits)
    done = 0
    for rows in length_sorted_batches(instances.lengths, FULL_BATCH):
        with torch.inference_mode():
            out = model.all_exits(**instances.batch(rows))
            logits[rows] = out.logits.float().numpy()
            answers[rows] = model.answers(out.states, out.logits).float().numpy()
            exit_logits[rows] = model.exit_logits(out.states, out.logits).float().numpy()
        done += len(rows)
        if progress is not None:
            progress.update(done)
    return logits, exit_logits, answers


def measure(
    model: EarlyExitModel,
    instances: Instances,
    metric: str,
    threshold: float,
    batch_size: int,
    progress: Progress | None = None,
    rule: Criterion | None = None,
) -> SplitResult:
    """Score a model with exits against its own full depth.

    Curve, histograms and bounds come from one full pass; score, mean exit layer and exit histogram are those of the
    engine that really skips layers.

    Args:
        model: The model; left in evaluation mode.
        instances: N labelled instances.
        metric: ``accuracy``, ``f1`` or ``mcc``.
        threshold: Leave where pi is above it.
        batch_size: Instances per batch of the engine.
        progress: Told the number of instances done, up to 2N.
        rule: Criterion that the engine runs in place of the policy; curve and bounds are unaffected.
    """
    model.eval()
    logits, exit_logits, answers = every_exit(model, instances, progress)
    losses = losses_of(logits, instances.labels)
    stored = evaluate(instances.labels, logits, losses, exit_logits, metric, threshold, answers)
    used = rule or criterion("consistentee", threshold=threshold)
    live = run_instances(model, instances, used, batch_size=batch_size)
    layers = live.exit_layer.numpy()
    if progress is not None:
        progress.update(2 * len(instances))
    mean = float(layers.mean())
    return replace(
        stored,
        score=score(metric, instances.labels, live.logits.argmax(-1).numpy()),
        mean_exit_layer=mean,
        saved_layers=1.0 - mean / stored.num_layers,
        exit_histogram=tuple(np.bincount(layers - 1, minlength=stored.num_layers).tolist()),
    )


def time_exits(
    model: EarlyExitModel, instances: Instances, threshold: float, batch_size: int, rule: Criterion | None = None
) -> dict[str, float]:
    """Seconds for up to 512 instances at full depth and with exits: medians of 3 runs in turn after a warm-up.

    Both run in the same engine, on the same batches; at full depth no exit or policy is computed below L.
    """
    some = instances.take(np.arange(min(len(instances), TIMED_INSTANCES)))
    rules = {
        "full_depth_seconds": criterion("fixed", depth=model.num_layers),
        "seconds": rule or criterion("consistentee", threshold=threshold),
    }
    times: dict[str, list[float]] = {name: [] for name in rules}
    for _ in range(1 + TIMED_RUNS):
        for name, rule in rules.items():
            started = time.perf_counter()
            run_instances(model, some, rule, batch_size=batch_size)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {**medians, "speedup": medians["full_depth_seconds"] / medians["seconds"], "batch_size": batch_size}


def headline(result: SplitResult) -> dict[str, float]:
    """The figures of a split that results.json carries."""
    names = (
        "full_depth_score",
        "score",
        "mean_exit_layer",
        "saved_layers",
        "oracle_score",
        "oracle_mean_exit_layer",
        "num_instances",
    )
    return {name: getattr(result, name) for name in names}


def losses_of(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Cross-entropy of every exit in nats: logits [N, L, C], labels [N] -> [N, L]."""
    log_p = F.log_softmax(torch.tensor(logits), -1)  # a copy: what is mapped from a file is read-only
    index = torch.tensor(labels)[:, None, None].expand(-1, logits.shape[1], 1)
    return -log_p.gather(-1, index)[..., 0].numpy()
