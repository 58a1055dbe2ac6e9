"""Steps of a decoder's run: every token of a response is an instance; stores are built and learnt in blocks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rl_exit.config import AGREEING
from rl_exit.criteria import ConsistentEE
from rl_exit.data.examples import load_examples, tokenise_examples
from rl_exit.data.instances import Instances
from rl_exit.errors import ConfigError
from rl_exit.evaluation import SplitResult
from rl_exit.files import write_json
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.models.scratch import WORD, make_decoder
from rl_exit.progress import Display
from rl_exit.seeding import derive_seed
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, PolicyProgress, train_policy
from rl_exit.trainers.run_directory import MetricLog, RunDirectory
from rl_exit.trainers.steps import policy_settings, policy_source, save_split
from rl_exit.trainers.token_evaluation import CURVE_POINTS, DEV_BATCH, measure_split
from rl_exit.trainers.token_finish import finish_generation
from rl_exit.trainers.token_store import build_block, plan_blocks, tokens_of


class TokenSteps:
    """See :class:`rl_exit.trainers.steps.Steps`.

    Args:
        run: The run.
        display: Where progress is shown.

    Raises:
        ConfigError: The configuration asks for what only a classifier has.
    """

    builds_store = False

    def __init__(self, run: RunDirectory, display: Display) -> None:
        self.run = run
        self.display = display
        if run.config.reward.cost == "latency":
            raise ConfigError("reward.cost = latency: for classifiers; a decoder that writes text is trained by layers")

    def prepare(self) -> dict[str, Any]:
        """Tokenise the examples; a decoder from scratch gets its vocabulary from them."""
        run = self.run
        c = run.config
        self.display.say(f"task {c.task.name}, backbone {c.model.backbone}")
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
            save_split(run, split, instances, counts)
            if split != "train":
                _save_references(run, split, examples, instances)
        for note in notes:
            self.display.say(note)
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

    def store(self, number: int, model_path: Path) -> None:
        """Nothing: token states are built and learnt in blocks, within the policy phase."""

    def policy(self, number: int, model_path: Path, log: MetricLog) -> dict[str, Any]:
        """Learn on one block of token states after the other.

        In the first round tokens see earlier ones as at full depth; afterwards as they present themselves under the
        policy of the round before. The learning rate and epsilon fall over all blocks together.
        """
        run = self.run
        c = run.config
        settings = policy_settings(c, derive_seed(c.seed, "policy", number))
        model: EarlyExitCausalModel = EarlyExitCausalModel.from_pretrained(model_path)
        instances = Instances.open(policy_source(run))
        store = run.path / "rounds" / str(number) / "store-train"
        if c.keep_rounds != "all":  # two rounds' blocks would take twice what the run was given
            for earlier in (run.path / "rounds").glob("*/store-train"):
                shutil.rmtree(earlier, ignore_errors=True)
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
            with self.display.step(f"{where}: token states", int(tokens_of(some).sum())) as progress:
                build_block(
                    model,
                    some,
                    store,
                    c.store.dtype,
                    c.store.shard_size,
                    min(c.store.batch_size, DEV_BATCH),
                    rule,
                    agreement=c.reward.name in AGREEING,
                    on_done=progress.update,
                )
            with self.display.step(f"{where}: policy ({c.algorithm})", c.policy.epochs) as progress:
                before = updates

                def report(
                    at: PolicyProgress, progress: Any = progress, index: int = index, before: int = before
                ) -> None:
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
            self.display.say(f"warning: {warning}")
        model.policy.load_state_dict(weights)
        model.save_pretrained(run.path / "rounds" / str(number) / "model")
        return {"warnings": warnings, "blocks": len(plan), "tokens": int(tokens_of(instances).sum())}

    def measure_dev(self, number: int, floor: float) -> SplitResult:
        """See :func:`rl_exit.trainers.token_evaluation.measure_split`."""
        model: EarlyExitCausalModel = EarlyExitCausalModel.from_pretrained(
            self.run.path / "rounds" / str(number) / "model"
        )
        instances = Instances.open(self.run.instances("dev"))
        total = int(tokens_of(instances).sum()) * (CURVE_POINTS + 1)
        with self.display.step(f"round {number}: tokens of dev", total) as progress:
            return measure_split(model, instances, self.run.config, floor, progress)

    def finish(self, best: dict[str, Any]) -> dict[str, Any]:
        """See :func:`rl_exit.trainers.token_finish.finish_generation`."""
        return finish_generation(self.run, self.display, best)


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
