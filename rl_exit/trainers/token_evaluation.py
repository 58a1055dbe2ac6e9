"""A decoder on a split of its task: a curve of which every point is a pass in which tokens really leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rl_exit.config import RunConfig
from rl_exit.criteria import ConsistentEE
from rl_exit.data.instances import Instances
from rl_exit.evaluation import CurvePoint, SplitResult, choose_threshold, evaluate
from rl_exit.method.rewards import memorized_layer
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.progress import Progress
from rl_exit.token_measurement import TokenTable, operating_points, tabulate

CURVE_POINTS = 12
DEV_BATCH = 16


def measure_split(
    model: EarlyExitCausalModel, instances: Instances, config: RunConfig, floor: float, progress: Progress
) -> SplitResult:
    """Score a decoder on a split: every point of the curve is a pass in which tokens really leave.

    Args:
        model: With its policy.
        instances: Tokenised examples.
        config: Threshold or ``auto``, tolerance.
        floor: Exits are held against the score at full depth, or this if it is higher.
        progress: Told the number of tokens done, in up to ``CURVE_POINTS + 1`` passes.

    Returns:
        Accuracy over tokens; ``exit_histogram`` and what is by memorized layer at the threshold that is chosen.
    """
    rule = ConsistentEE(0.5)
    done = 0

    def table(at: Any, scores: tuple[Any, ...] = ()) -> TokenTable:
        nonlocal done
        before = done

        def told(count: int) -> None:
            nonlocal done
            done = before + count
            progress.update(done)

        return tabulate(
            model, instances, at, scores=scores, batch_size=DEV_BATCH, horizon=config.generation.max_new_tokens,
            on_done=told,
        )  # fmt: skip

    full = table(None, (rule,))
    odds = full.scores[rule.name]
    fixed = config.inference.threshold
    rules = operating_points(rule, odds, CURVE_POINTS) if fixed == "auto" else [ConsistentEE(float(fixed))]
    passes = {one.threshold: table(one) for one in rules if isinstance(one, ConsistentEE)}
    scored = {at: (float(t.at_exit(t.correct).mean()), float(t.exits.mean())) for at, t in passes.items()}
    full_depth = float(full.correct[:, -1].mean())
    curve = [CurvePoint(at, *point) for at, point in sorted(scored.items())]
    curve.append(CurvePoint(1.0, full_depth, float(model.num_exits)))
    target = max(full_depth, floor)
    chosen = float(fixed) if fixed != "auto" else choose_threshold(curve, target, config.alternation.tolerance)
    return token_result(full, passes.get(chosen, full), odds, chosen, tuple(curve), model.exit_layers)


def token_result(
    full: TokenTable,
    leaving: TokenTable,
    odds: Any,
    threshold: float,
    curve: tuple[CurvePoint, ...],
    layers: Sequence[int],
) -> SplitResult:
    """A split's result out of two passes: bounds and exits from the full one, the rest from the one that leaves.

    To the figures exits are the layers, as to a criterion; ``saved_layers`` counts the real ones.
    """
    # Two classes, right and wrong: a score over them is the share of tokens that are predicted.
    answers = np.stack([full.correct, ~full.correct], -1).astype(np.float32)
    truth = np.zeros(len(full), dtype=np.int64)
    whole = evaluate(truth, answers, full.losses, odds, "accuracy", threshold)
    exits = whole.num_layers
    by_memorized = np.zeros((exits, exits), dtype=np.int64)
    np.add.at(by_memorized, (memorized_layer(full.correct) - 1, leaving.exits - 1), 1)
    histogram = np.bincount(leaving.exits - 1, minlength=exits)
    layer = np.asarray(layers)[leaving.exits - 1]
    return replace(
        whole,
        score=float(leaving.at_exit(leaving.correct).mean()),
        mean_exit_layer=float(leaving.exits.mean()),
        saved_layers=1.0 - float(layer.mean()) / layers[-1],
        exit_histogram=tuple(histogram.tolist()),
        histogram_by_memorized=tuple(tuple(row) for row in by_memorized.tolist()),
        histogram_by_class=(tuple(histogram.tolist()),),
        curve=curve,
    )
