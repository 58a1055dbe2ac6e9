"""The whole run: data, initialisation, rounds of policy phase and task step, final evaluation.

A round is: state store of the training set with the current exits, policy phase on it, evaluation on dev, task step
under the frozen policy. After the last task step a closing round without one fits the policy to the exits that it will
serve. The round with the best dev result becomes the model.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl_exit.config import OptimConfig, RunConfig
from rl_exit.costs import read_costs, write_costs
from rl_exit.data.instances import Instances
from rl_exit.data.tasks import load_task, task_kind, tokenise
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import ConfigError, UserError
from rl_exit.evaluation import SplitResult, check_metric, choose_threshold
from rl_exit.files import read_json, telling_disk_errors, write_json
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.profiling import FEWEST, profile
from rl_exit.progress import Display, Progress
from rl_exit.report import write_report
from rl_exit.seeding import derive_seed
from rl_exit.trainers.exit_training import ExitTraining, LoraSettings, objective_options, train_exits
from rl_exit.trainers.finish import finish
from rl_exit.trainers.hold_out import hold_out
from rl_exit.trainers.initialised import take_initialised
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, PolicyProgress, train_policy
from rl_exit.trainers.policy_store import fit_answers, held_ids, policy_store
from rl_exit.trainers.rllib.registry import algorithm_class, check_algorithm
from rl_exit.trainers.run_clock import outlook, policy_in_words
from rl_exit.trainers.run_directory import MetricLog, RunDirectory
from rl_exit.trainers.store_evaluation import answers_of, evaluate_store
from rl_exit.trainers.store_phase import build_store
from rl_exit.trainers.supervised import OptimSettings
from rl_exit.trainers.token_finish import finish_generation
from rl_exit.trainers.token_steps import CURVE_POINTS, measure_split, prepare_examples, train_on_blocks
from rl_exit.trainers.token_store import tokens_of
from rl_exit.trainers.tracking import check_tracking, tracked
from rl_exit.trainers.workers import Workers


def train(
    config: RunConfig,
    display: Display,
    *,
    resume: bool = False,
    overwrite: bool = False,
    kept: Collection[str] = (),
) -> dict[str, Any]:
    """Do a run from its configuration to its results.

    Args:
        config: The resolved configuration.
        display: Where progress is shown.
        resume: Go on with an interrupted run.
        overwrite: Replace a run of the same name.
        kept: Keys of the workers that stay between their turns (``rl_exit.cluster.plan``).

    Returns:
        The contents of results.json.

    Raises:
        UserError: Anything the user can mend, in one message.
    """
    check_algorithm(config.algorithm)
    if "." in config.algorithm:  # a path that leads nowhere is told now, not after the initialisation
        algorithm_class(config.algorithm)
    check_tracking(config)
    with RunDirectory.locked(config.run_dir), telling_disk_errors(config.run_dir):
        run = RunDirectory.create(config, resume=resume, overwrite=overwrite)
        if run.result("report") is not None:
            display.say(f"{run.path}: this run is finished; its results:")
        else:
            try:
                with Workers(config, run.path / ".train", kept) as workers, tracked(run):
                    _Alternation(run, display, workers).go()
            except UserError:
                run.discard_if_empty()
                raise
        return read_json(run.path / "results.json")


def initialise(config: RunConfig, display: Display) -> Path:
    """Do the data and initialisation steps of a run and no more, going on where an earlier try ended.

    Args:
        config: The resolved configuration; it names the run directory.
        display: Where progress is shown.

    Returns:
        Folder of the initialised model, for ``init.model`` of other runs.

    Raises:
        UserError: Anything the user can mend, in one message.
    """
    with RunDirectory.locked(config.run_dir), telling_disk_errors(config.run_dir):
        run = RunDirectory.create(config, resume=True)
        try:
            with Workers(config, run.path / ".train") as workers:
                _Alternation(run, display, workers).initialise()
        except UserError:
            run.discard_if_empty()
            raise
        shutil.rmtree(run.path / "init" / "start", ignore_errors=True)
        return run.path / "init" / "model"


class _Alternation:
    """The steps of one run, in order; each is skipped when its marker is there."""

    def __init__(self, run: RunDirectory, display: Display, workers: Workers) -> None:
        self.run = run
        self.workers = workers
        self.config = run.config
        self.display = display
        self.writes = task_kind(run.config.task) == "generation"
        if self.writes and run.config.reward.cost == "latency":
            raise ConfigError("reward.cost = latency: for classifiers; a decoder that writes text is trained by layers")

    def initialise(self) -> None:
        """Do the steps before the first round."""
        self.run.run_step("data", self._prepare_data, "data")
        self.run.run_step("init", self._initialise, "init")

    def go(self) -> None:
        """Do every open step."""
        self.initialise()
        model = self.run.path / "init" / "model"
        last = self.config.alternation.rounds + 1
        outcomes: list[dict[str, Any]] = []
        for number in range(1, last + 1):
            folder = self._round(number)
            self.run.run_step(f"round-{number}-store", partial(self._store, number, model), "store", number)
            self.run.run_step(f"round-{number}-policy", partial(self._policy, number, model), "policy", number)
            outcome = self.run.run_step(f"round-{number}-dev", partial(self._dev, number), "dev", number)
            outcomes.append(outcome)
            chosen = best_round(outcomes, self.config)
            self.display.say(
                f"round {number}: dev {100 * outcome['score']:.2f} at mean exit layer {outcome['mean_exit_layer']:.2f} "
                f"(full depth {100 * outcome['reference']:.2f})"
            )
            self._retain(number, chosen["round"])
            if number == last or number - chosen["round"] >= self.config.alternation.patience:
                break
            self.run.run_step(f"round-{number}-task", partial(self._task, number), "task", number)
            self.display.say(outlook(self.run.seconds(), self.config.alternation.rounds))
            model = folder / "trained"
        self.run.run_step("final", lambda log: self._finish(chosen), "final")
        self.run.run_step("report", lambda log: self._report(chosen["round"], log), "report")

    def _retain(self, number: int, best: int) -> None:
        """Drop what earlier rounds leave and nothing reads any more: by far the most of a run's space."""
        for earlier in range(1, number):
            shutil.rmtree(self._round(earlier) / "trained", ignore_errors=True)
            if self.config.keep_rounds != "all" and earlier != best:
                shutil.rmtree(self._round(earlier) / "store-train", ignore_errors=True)
                shutil.rmtree(self._round(earlier) / "store-dev", ignore_errors=True)

    def _finish(self, best: dict[str, Any]) -> dict[str, Any]:
        return (finish_generation if self.writes else finish)(self.run, self.display, best)

    def _report(self, best: int, log: MetricLog) -> dict[str, Any]:
        if not (self._round(best) / "store-train").is_dir():  # a later round had seemed better
            self._store(best, self._round(best) / "model", log)
        self.run.gather_metrics()
        write_report(self.run.path)
        self._tidy(best)
        return {}

    def _round(self, number: int) -> Path:
        return self.run.path / "rounds" / str(number)

    def _prepare_data(self, log: MetricLog) -> dict[str, Any]:
        c = self.config
        if self.writes:
            return prepare_examples(self.run, self.display)
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
        sizes = {}
        for split, texts in task.splits.items():
            instances = tokenise(texts, model.tokenizer, c.model.max_length)
            if split == "train" and c.policy.holdout:
                fitted, held = hold_out(len(instances), c.policy.holdout, derive_seed(c.seed, "holdout"))
                instances.take(held).save(self.run.instances("held"))
                if c.policy.instances == "all":
                    instances.save(self.run.instances("all"))
                sizes["held"] = len(held)
                instances = instances.take(fitted)
            instances.save(self.run.instances(split))
            sizes[split] = len(instances)
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

    def _initialise(self, log: MetricLog) -> dict[str, Any]:
        c = self.config
        folder = self.run.path / "init"
        if c.init.model is not None:
            self.display.say(f"initialisation taken from {c.init.model}")
            return take_initialised(c.init.model, folder / "start", folder / "model")
        if not self.writes:
            self.workers.begin_store()
        job = ExitTraining(
            model=str(folder / "start"),
            instances=str(self.run.instances("train")),
            output=str(folder / "model"),
            checkpoint=str(folder / "checkpoint"),
            weights=c.init.objective,
            settings=optim_settings(c.init),
            lora=LoraSettings(**c.init.lora.model_dump()),
            seed=derive_seed(c.seed, "init"),
            options=objective_options(c.init),
            visits=str(folder / "forgetting.arrow"),
            exchange=self.run.exchange(),
        )
        return self._train_exits(job, "initialisation", log)

    def _store(self, number: int, model_path: Path, log: MetricLog) -> dict[str, Any]:
        c = self.config
        if self.writes:  # token states are built and learnt in blocks, within the policy phase
            return {"model": str(model_path.relative_to(self.run.path))}
        model = EarlyExitModel.from_pretrained(model_path)
        if c.store.use_gpu and not c.store.num_workers:
            model.to("cuda" if torch.cuda.is_available() else "cpu")
        for split in ("train", "dev"):
            # What the policy learns on: instances that the exits were not fitted to, where some were kept for it.
            source = self.run.instances(c.policy.instances if split == "train" and c.policy.holdout else split)
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
        return {"model": str(model_path.relative_to(self.run.path))}

    def _policy(self, number: int, model_path: Path, log: MetricLog) -> dict[str, Any]:
        c = self.config
        settings = policy_settings(c, derive_seed(c.seed, "policy", number))
        if self.writes:
            return train_on_blocks(self.run, self.display, number, model_path, settings, log)
        model = EarlyExitModel.from_pretrained(model_path)
        if c.reward.cost == "latency":
            settings = replace(settings, cost=self._measured_cost(number, model))
        kept = self._round(number) / "store-train"
        answers = None
        if model.answer_heads is not None:
            seed = derive_seed(c.seed, "answers", number)
            fitted = fit_answers(StateStore.open(kept), seed, held_ids(self.run.path))
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
        model.save_pretrained(self._round(number) / "model")
        shutil.rmtree(self._round(number) / "policy-checkpoint", ignore_errors=True)
        own = {} if model.answer_heads is None else {"own_answers": list(fitted.better)}
        return {"warnings": list(outcome.warnings), **own}

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

    def _dev(self, number: int, log: MetricLog) -> dict[str, Any]:
        c = self.config
        folder = self._round(number)
        model = EarlyExitModel.from_pretrained(folder / "model")
        if self.writes:
            instances = Instances.open(self.run.instances("dev"))
            total = int(tokens_of(instances).sum()) * (CURVE_POINTS + 1)
            with self.display.step(f"round {number}: tokens of dev", total) as progress:
                result = measure_split(model, instances, c, self._reference(number, 0.0), progress)
            reference, threshold = self._reference(number, result.full_depth_score), result.threshold
        else:
            result, reference = self._dev_from_store(number, model)
            threshold = result.threshold
        log.log(
            number,
            number,
            {
                "score": result.score,
                "mean_exit_layer": result.mean_exit_layer,
                "full_depth_score": result.full_depth_score,
                "threshold": threshold,
            },
        )
        return {
            "round": number,
            "reference": reference,
            "threshold": threshold,
            "score": result.score,
            "mean_exit_layer": result.mean_exit_layer,
            "dev": result.to_dict(),
        }

    def _dev_from_store(self, number: int, model: EarlyExitModel) -> tuple[SplitResult, float]:
        """Result at the threshold, and what it is measured against."""
        c = self.config
        metric = read_json(self.run.path / "data" / "task.json")["metric"]
        store = StateStore.open(self._round(number) / "store-dev")

        answers = answers_of(store, model.answer_heads)

        def at(threshold: float) -> SplitResult:
            return evaluate_store(store, model.policy, metric, threshold, c.policy.inputs, answers)

        at_half = at(0.5)
        reference = self._reference(number, at_half.full_depth_score)
        threshold = pick_threshold(c, at_half, reference)
        return (at_half if threshold == 0.5 else at(threshold)), reference

    def _reference(self, number: int, full_depth: float) -> float:
        """What early exit is measured against: full depth right after initialisation, or of these exits if better."""
        if number == 1:
            return full_depth
        first = self.run.result("round-1-dev")
        assert first is not None  # rounds are done in order
        return max(float(first["reference"]), full_depth)

    def _task(self, number: int, log: MetricLog) -> dict[str, Any]:
        c = self.config
        folder = self._round(number)
        job = ExitTraining(
            model=str(folder / "model"),
            instances=str(self.run.instances("train")),
            output=str(folder / "trained"),
            checkpoint=str(folder / "checkpoint"),
            weights=c.task_step.draw,
            settings=optim_settings(c.task_step),
            lora=LoraSettings(**c.task_step.lora.model_dump()),
            seed=derive_seed(c.seed, "task", number),
            options=objective_options(c.task_step),
            exchange=self.run.exchange(),
        )
        return self._train_exits(job, f"round {number}: task step", log)

    def _train_exits(self, job: ExitTraining, title: str, log: MetricLog) -> dict[str, Any]:
        c = self.config
        last: dict[str, float] = {}
        started = time.monotonic()
        with self.display.step(title, 1.0) as progress:

            def on_update(done: int, total: int, epoch: float, values: dict[str, float]) -> None:
                rate = done / max(1e-9, time.monotonic() - started)
                progress.update(done / total, f"epoch {epoch:.1f}, loss {values['loss']:.3f}, {rate:.1f} updates/s")
                if done % max(1, total // 200) == 0 or done == total:
                    log.log(done, epoch, values)
                last.update(values)
                self.run.keep(checkpoint=True)

            with self.workers.train() as crew:
                train_exits(job, on_update, use_gpu=c.task_step.use_gpu, crew=crew)
        shutil.rmtree(job.checkpoint, ignore_errors=True)
        shutil.rmtree(Path(job.checkpoint).parent / "train", ignore_errors=True)
        return {"loss": last.get("loss")}

    def _tidy(self, best: int) -> None:
        """Drop what a finished run no longer needs: models on the way, and state stores unless all are kept."""
        shutil.rmtree(self.run.path / "init" / "start", ignore_errors=True)
        for folder in (self.run.path / "rounds").iterdir():
            shutil.rmtree(folder / "trained", ignore_errors=True)
            if self.config.keep_rounds != "all":
                shutil.rmtree(folder / "model", ignore_errors=True)
                if folder.name != str(best):
                    shutil.rmtree(folder / "store-train", ignore_errors=True)
                    shutil.rmtree(folder / "store-dev", ignore_errors=True)


def optim_settings(section: OptimConfig) -> OptimSettings:
    """The optimiser's plain values out of a configuration section."""
    return OptimSettings(**{name: getattr(section, name) for name in OptimSettings.__dataclass_fields__})


def best_round(outcomes: Sequence[dict[str, Any]], config: RunConfig) -> dict[str, Any]:
    """The round to keep, with its threshold.

    All rounds are held against the best full depth that any of them has reached: exits that a later task step has made
    better judge the earlier rounds too. Within the tolerance more saved layers win; outside of it a better score does.

    Args:
        outcomes: What every round so far came to on dev.
        config: Tolerance, and the threshold where it is fixed.

    Returns:
        ``round``, ``threshold``, ``score`` and ``mean_exit_layer`` (on dev) of the best; the earliest of equals.
    """
    reference = max(float(outcome["reference"]) for outcome in outcomes)

    def judged(outcome: dict[str, Any]) -> tuple[tuple[float, ...], dict[str, Any]]:
        found = SplitResult.from_dict(outcome["dev"])
        threshold, score, layer = found.threshold, found.score, found.mean_exit_layer
        if config.inference.threshold == "auto":
            threshold = choose_threshold(found.curve, reference, config.alternation.tolerance)
            _, score, layer = next(point for point in found.curve if point.threshold == threshold)
        within = score >= reference - config.alternation.tolerance - 1e-9
        rank = (1.0, -layer, score) if within else (0.0, score, -layer)
        return rank, {"round": outcome["round"], "threshold": threshold, "score": score, "mean_exit_layer": layer}

    return max((judged(outcome) for outcome in outcomes), key=lambda pair: pair[0])[1]


def policy_settings(config: RunConfig, seed: int) -> PolicyPhaseSettings:
    """The policy phase's plain values out of a configuration."""
    policy = config.policy.model_dump(exclude={"inputs", "answer", "holdout", "instances"})
    return PolicyPhaseSettings(
        algorithm=config.algorithm,
        # Of tokens whose store says "agrees" where others say "correct", it is the same reward.
        reward="correctness" if config.reward.name == "agreement" else config.reward.name,
        alpha=config.reward.alpha,
        runner=config.sampling.runner,
        num_env_runners=config.sampling.num_env_runners,
        envs_per_runner=config.sampling.envs_per_runner,
        transport=config.sampling.transport,
        overlap=config.sampling.overlap,
        num_learners=config.learners.num_learners,
        learner_gpu=config.learners.use_gpu,
        width=config.model.policy_width,
        seed=seed,
        **policy,
    )


def pick_threshold(config: RunConfig, dev: SplitResult, reference: float) -> float:
    """The threshold of the configuration, or the one chosen on dev."""
    if config.inference.threshold != "auto":
        return float(config.inference.threshold)
    return choose_threshold(dev.curve, reference, config.alternation.tolerance)


def _policy_reporter(progress: Progress, log: MetricLog, keep: Callable[[], None]) -> Callable[[PolicyProgress], None]:
    def report(at: PolicyProgress) -> None:
        progress.update(at.epoch, policy_in_words(at.metrics))
        log.log(at.step, at.epoch, at.metrics)
        keep()

    return report
