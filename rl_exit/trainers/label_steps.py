"""Steps of a classifier's run: texts with labels, state stores of all layers, a policy learnt on them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl_exit.costs import read_costs, write_costs
from rl_exit.data.instances import Instances
from rl_exit.data.tasks import load_task, tokenise
from rl_exit.envs.state_store import StateStore
from rl_exit.evaluation import SplitResult, check_metric, choose_threshold
from rl_exit.files import read_json, write_json
from rl_exit.models.answer_heads import FITTING_PASSES
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.profiling import FEWEST, profile
from rl_exit.progress import Display, Progress
from rl_exit.seeding import derive_seed
from rl_exit.trainers.finish import finish
from rl_exit.trainers.policy_phase import PolicyProgress, train_policy
from rl_exit.trainers.policy_store import Answers, answer_ids, fit_answers, policy_store
from rl_exit.trainers.run_clock import policy_in_words
from rl_exit.trainers.run_directory import MetricLog, RunDirectory
from rl_exit.trainers.safe_policy import FOLDS, PolicyTrial, try_policy
from rl_exit.trainers.steps import policy_settings, policy_source, save_split
from rl_exit.trainers.store_evaluation import answers_of, deciding_logits, evaluate_store
from rl_exit.trainers.store_phase import build_store
from rl_exit.trainers.workers import Workers


class LabelSteps:
    """See :class:`rl_exit.trainers.steps.Steps`.

    Args:
        run: The run.
        display: Where progress is shown.
        workers: Groups of workers that stay between their turns.
    """

    builds_store = True

    def __init__(self, run: RunDirectory, display: Display, workers: Workers) -> None:
        self.run = run
        self.display = display
        self.workers = workers
        self.config = run.config

    def prepare(self) -> dict[str, Any]:
        """Tokenise the task."""
        c = self.config
        self.display.say(f"task {c.task.name}, backbone {c.model.backbone}")
        task = load_task(c.task, c.seed)
        check_metric(task.metric, len(task.label_names))
        model = EarlyExitModel.from_backbone(
            c.model.backbone,
            task.label_names,
            pooling=c.model.pooling,
            policy_width=c.model.policy_width,
            policy_inputs=c.policy.inputs,
            policy_shared=c.policy.shared,
            policy_answer=c.policy.answer,
            dropout=c.model.dropout,
            max_length=c.model.max_length,
            seed=derive_seed(c.seed, "heads"),
        )
        sizes: dict[str, int] = {}
        for split, texts in task.splits.items():
            instances = tokenise(texts, model.tokenizer, c.model.max_length)
            save_split(self.run, split, instances, sizes)
        write_json(
            self.run.path / "data" / "task.json",
            {
                "name": task.name,
                "label_names": list(task.label_names),
                "metric": task.metric,
                "description": task.description,
                "sizes": sizes,
            },
        )
        model.save_pretrained(self.run.path / "init" / "start")
        return {"sizes": sizes, "num_layers": model.num_layers}

    def store(self, number: int, model_path: Path) -> None:
        """States, logits and losses of every layer, of what the policy learns on and of dev."""
        c = self.config
        model = EarlyExitModel.from_pretrained(model_path)
        if c.store.use_gpu and not c.store.num_workers:
            model.to("cuda" if torch.cuda.is_available() else "cpu")
        for split in ("train", "dev"):
            source = policy_source(self.run) if split == "train" else self.run.instances(split)
            instances = Instances.open(source)
            title = f"round {number}: states of {split}"
            with self.display.step(title, len(instances)) as progress, self.workers.store() as crew:
                build_store(
                    model,
                    instances,
                    self._round(number) / f"store-{split}",
                    c.store.dtype,
                    c.store.shard_size,
                    c.store.batch_size,
                    progress,
                    crew=crew,
                    model_path=model_path,
                    instances_path=source,
                )

    def policy(self, number: int, model_path: Path, log: MetricLog) -> dict[str, Any]:
        """Answer heads where the policy answers itself, then the policy phase."""
        c = self.config
        settings = policy_settings(c, derive_seed(c.seed, "policy", number))
        model = EarlyExitModel.from_pretrained(model_path)
        if c.reward.cost == "latency":
            settings = replace(settings, cost=self._measured_cost(number, model))
        kept = self._round(number) / "store-train"
        answers = None
        if model.answer_heads is not None:
            seed = derive_seed(c.seed, "answers", number)
            ids = answer_ids(self.run.path, c.policy)
            with self.display.step(f"round {number}: own answers", FITTING_PASSES) as fitting:
                fitted = fit_answers(StateStore.open(kept), seed, ids, fitting)
            model.answer_heads, answers = fitted.heads, fitted.answers
        with (
            policy_store(kept, c.policy.inputs, answers) as store,
            self.display.step(f"round {number}: policy ({c.algorithm})", c.policy.epochs) as progress,
        ):
            self.workers.await_policy_room()
            outcome = train_policy(
                store,
                {name: value.detach().clone() for name, value in model.policy.state_dict().items()},
                settings,
                _policy_reporter(progress, log, partial(self.run.keep, checkpoint=True)),
                self._round(number) / "policy-checkpoint",
            )
        for warning in outcome.warnings:
            self.display.say(f"warning: {warning}")
        model.policy.load_state_dict(outcome.weights)
        kept_of_it: dict[str, Any] = {"warnings": list(outcome.warnings)}
        if model.answer_heads is not None:
            kept_of_it["own_answers"] = list(fitted.better)
        model.config.policy_rule = "learned"
        if c.tries_policy:
            trial = self._trial(number, model, answers, {"cost": settings.cost})
            if trial is not None:
                model.config.policy_rule = "learned" if trial.better else "confidence"
                kept_of_it["trial"] = trial.to_dict()
        model.save_pretrained(self._round(number) / "model")
        shutil.rmtree(self._round(number) / "policy-checkpoint", ignore_errors=True)
        return kept_of_it

    def _trial(
        self, number: int, model: EarlyExitModel, answers: Answers | None, changes: dict[str, Any]
    ) -> PolicyTrial | None:
        """The policy against confidence, on instances that the exits were not fitted to; None where they are few."""
        held = Instances.open(self.run.instances("held")).ids
        metric = read_json(self.run.path / "data" / "task.json")["metric"]
        with self.display.step(f"round {number}: policy tried against confidence", FOLDS) as progress:
            kept = self._round(number) / "store-train"
            trial = try_policy(self.config, kept, model.policy, metric, held, answers, changes, progress.update)
        few = "too few instances are kept from the exits to try the policy against confidence: it decides"
        self.display.say(few if trial is None else trial.in_words())
        return trial

    def _measured_cost(self, number: int, model: EarlyExitModel) -> tuple[float, ...]:
        """Time of leaving at each layer, in layers; measured once in a round and kept, so that a resumed run agrees."""
        folder = self._round(number)
        costs = read_costs(folder)
        if costs is None:
            with self.display.step(f"round {number}: time of each layer", 1 + FEWEST) as progress:
                costs = profile(model, [self.config.inference.batch_size], runs=FEWEST, progress=progress)
            write_costs(folder, costs)
        length = int(np.median(Instances.open(self.run.instances("dev")).lengths))
        return tuple(float(value) for value in costs.in_layers(self.config.inference.batch_size, length))

    def measure_dev(self, number: int, floor: float) -> SplitResult:
        """From the store: no pass of the model."""
        c = self.config
        model = EarlyExitModel.from_pretrained(self._round(number) / "model")
        metric = read_json(self.run.path / "data" / "task.json")["metric"]
        store = StateStore.open(self._round(number) / "store-dev")
        answers = answers_of(store, model.answer_heads)

        odds = deciding_logits(store, model, answers)

        def at(threshold: float) -> SplitResult:
            return evaluate_store(store, odds, metric, threshold, answers)

        if c.inference.threshold != "auto":
            return at(float(c.inference.threshold))
        at_half = at(0.5)
        reference = max(floor, at_half.full_depth_score)
        threshold = choose_threshold(at_half.curve, reference, c.alternation.tolerance)
        return at_half if threshold == 0.5 else at(threshold)

    def finish(self, best: dict[str, Any]) -> dict[str, Any]:
        """See :func:`rl_exit.trainers.finish.finish`."""
        return finish(self.run, self.display, best)

    def _round(self, number: int) -> Path:
        return self.run.path / "rounds" / str(number)


def _policy_reporter(progress: Progress, log: MetricLog, keep: Callable[[], None]) -> Callable[[PolicyProgress], None]:
    def report(at: PolicyProgress) -> None:
        progress.update(at.epoch, policy_in_words(at.metrics))
        log.log(at.step, at.epoch, at.metrics)
        keep()

    return report
