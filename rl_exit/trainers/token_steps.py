"""Steps of a decoder's run that differ from those of a classifier: data, policy phase in blocks, evaluation on dev.

The rest is shared: the alternation (:mod:`rl_exit.trainers.alternation`), the Train job of initialisation and task
step, the policy phase and its algorithms.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rl_exit.config import RunConfig
from rl_exit.criteria import ConsistentEE
from rl_exit.data.examples import load_examples, tokenise_examples
from rl_exit.data.instances import Instances
from rl_exit.errors import ConfigError
from rl_exit.evaluation import CurvePoint, SplitResult, choose_threshold, evaluate
from rl_exit.files import write_json
from rl_exit.method.rewards import memorized_layer
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.models.scratch import WORD, make_decoder
from rl_exit.progress import Display, Progress
from rl_exit.seeding import derive_seed
from rl_exit.token_measurement import TokenTable, operating_points, tabulate
from rl_exit.trainers.hold_out import hold_out
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, PolicyProgress, train_policy
from rl_exit.trainers.run_directory import MetricLog, RunDirectory
from rl_exit.trainers.token_store import build_block, plan_blocks, tokens_of

CURVE_POINTS = 12
DEV_BATCH = 16


def prepare_examples(run: RunDirectory, display: Display) -> dict[str, Any]:
    """The data step: examples tokenised, the decoder with fresh exits."""
    c = run.config
    display.say(f"task {c.task.name}, backbone {c.model.backbone}")
    task = load_examples(c.task, c.seed)
    backbone = c.model.backbone
    if backbone == "minilm":
        raise ConfigError("model.backbone = 'minilm' is an encoder; for generation: scratch, a hub id or a folder")
    if backbone == WORD:
        made = run.path / "init" / "backbone"
        shutil.rmtree(made, ignore_errors=True)
        texts = (a + b for a, b in zip(task.splits["train"].prompts, task.splits["train"].responses, strict=True))
        sizes = c.model.scratch.model_dump()
        make_decoder(made, texts, **sizes, max_length=c.model.max_length, seed=derive_seed(c.seed, "backbone"))
        backbone = str(made)
    model = EarlyExitCausalModel.from_backbone(
        backbone,
        exit_every=c.model.exit_every,
        exit_rank=c.model.adapter,
        policy_width=c.model.policy_width,
        policy_inputs=c.policy.inputs,
        policy_shared=c.policy.shared,
        max_length=c.model.max_length,
        task=task.name,
        seed=derive_seed(c.seed, "heads"),
    )
    if c.model.backbone == WORD:
        model.config.backbone_name = WORD
    counts: dict[str, int] = {}
    notes = []
    for split, examples in task.splits.items():
        instances, left_out = tokenise_examples(examples, model.tokenizer, c.model.max_length)
        if left_out:
            notes.append(
                f"{split}: {left_out} of {len(examples)} prompts leave no room for a response and are left out"
            )
        if split == "train" and c.policy.holdout:
            fitted, held = hold_out(len(instances), c.policy.holdout, derive_seed(c.seed, "holdout"))
            instances.take(held).save(run.instances("held"))
            if c.policy.instances == "all":
                instances.save(run.instances("all"))
            counts["held"] = len(held)
            instances = instances.take(fitted)
        instances.save(run.instances(split))
        counts[split] = len(instances)
        if split != "train":
            _save_references(run, split, examples, instances)
    for note in notes:
        display.say(note)
    write_json(
        run.path / "data" / "task.json",
        {
            "name": task.name,
            "kind": "generation",
            "label_names": [],
            "metric": "accuracy",
            "description": " ".join([task.description, *(f"{note}." for note in notes)]),
            "sizes": counts,
        },
    )
    model.save_pretrained(run.path / "init" / "start")
    return {"sizes": counts, "num_layers": model.num_layers}


def _save_references(run: RunDirectory, split: str, examples: Any, instances: Instances) -> None:
    """Prompts and responses of the examples that are generated for at the end of the run."""
    most = run.config.generation.samples
    order = np.random.default_rng(derive_seed(run.config.seed, "samples", split)).permutation(len(instances))
    rows = np.sort(order[:most])
    place = {int(number): row for row, number in enumerate(examples.ids.tolist())}
    chosen = [place[int(instances.ids[row])] for row in rows]
    write_json(
        run.path / "data" / f"{split}-references.json",
        {
            "rows": rows.tolist(),
            "prompts": [examples.prompts[row] for row in chosen],
            "responses": [examples.responses[row] for row in chosen],
        },
    )


def train_on_blocks(
    run: RunDirectory, display: Display, number: int, model_path: Path, settings: PolicyPhaseSettings, log: MetricLog
) -> dict[str, Any]:
    """The policy phase of a round, on one block of token states after the other; writes the round's model.

    In the first round tokens see earlier ones as at full depth; afterwards as they present themselves under the policy
    of the round before. The learning rate and epsilon fall over all blocks together.
    """
    c = run.config
    model: EarlyExitCausalModel = EarlyExitCausalModel.from_pretrained(model_path)
    source = run.instances(c.policy.instances if c.policy.holdout else "train")
    instances = Instances.open(source)
    store = run.path / "rounds" / str(number) / "store-train"
    seed = derive_seed(c.seed, "blocks", number)
    width = model.policy.hidden_size
    plan = plan_blocks(instances, model.num_exits, width, c.store.dtype, c.store.max_gib, seed)
    weights = {name: value.detach().clone() for name, value in model.policy.state_dict().items()}
    rule = None if number == 1 else ConsistentEE(0.5)
    warnings: list[str] = []
    updates = 0
    for index, rows in enumerate(plan):
        some = instances.take(rows)
        where = f"round {number}" + (f", block {index + 1} of {len(plan)}" if len(plan) > 1 else "")
        with display.step(f"{where}: token states", int(tokens_of(some).sum())) as progress:
            build_block(
                model,
                some,
                store,
                c.store.dtype,
                c.store.shard_size,
                min(c.store.batch_size, DEV_BATCH),
                rule,
                agreement=c.reward.name == "agreement",
                on_done=progress.update,
            )
        with display.step(f"{where}: policy ({c.algorithm})", c.policy.epochs) as progress:
            before = updates

            def report(at: PolicyProgress, progress: Any = progress, index: int = index, before: int = before) -> None:
                shown = f"return {at.metrics['return']:.3f}, exit {at.metrics['mean_exit_layer']:.2f}"
                progress.update(at.epoch, shown)
                log.log(before + at.step, index * c.policy.epochs + at.epoch, at.metrics)

            outcome = train_policy(store, weights, block_settings(settings, index, len(plan)), report)
        updates += int(outcome.rows[-1]["step"]) if outcome.rows else 0
        weights = outcome.weights
        warnings = list(outcome.warnings)
        if index + 1 < len(plan):
            shutil.rmtree(store, ignore_errors=True)
    for warning in warnings:
        display.say(f"warning: {warning}")
    model.policy.load_state_dict(weights)
    model.save_pretrained(run.path / "rounds" / str(number) / "model")
    return {"warnings": warnings, "blocks": len(plan), "tokens": int(tokens_of(instances).sum())}


def block_settings(settings: PolicyPhaseSettings, index: int, count: int) -> PolicyPhaseSettings:
    """The settings of one of several blocks: its part of the linear schedules, and a seed of its own."""
    if count == 1:
        return settings
    final = settings.lr if settings.lr_final is None else settings.lr_final

    def at(first: float, last: float, share: float) -> float:
        return first + (last - first) * share

    begin, end = index / count, (index + 1) / count
    return replace(
        settings,
        lr=max(at(settings.lr, final, begin), 1e-12),
        lr_final=at(settings.lr, final, end),
        epsilon=at(settings.epsilon, settings.epsilon_final, begin),
        epsilon_final=at(settings.epsilon, settings.epsilon_final, end),
        seed=derive_seed(settings.seed, "block", index),
    )


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
