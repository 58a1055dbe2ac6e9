"""The whole run: data, initialisation, rounds of policy phase and task step, final evaluation.

A round is: state store of the training set with the current exits, policy phase on it, evaluation on dev, task step
under the frozen policy. After the last task step a closing round without one fits the policy to the exits that it will
serve. The round with the best dev result becomes the model.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rl_exit.config import OptimConfig, RunConfig
from rl_exit.data.tasks import task_kind
from rl_exit.errors import UserError
from rl_exit.evaluation import SplitResult, choose_threshold
from rl_exit.files import read_json, telling_disk_errors
from rl_exit.progress import Display
from rl_exit.report import write_report
from rl_exit.seeding import derive_seed
from rl_exit.trainers.exit_training import ExitTraining, LoraSettings, objective_options, train_exits
from rl_exit.trainers.initialised import take_initialised
from rl_exit.trainers.label_steps import LabelSteps
from rl_exit.trainers.rllib.registry import check_importable
from rl_exit.trainers.run_clock import outlook
from rl_exit.trainers.run_directory import MetricLog, RunDirectory
from rl_exit.trainers.steps import Steps
from rl_exit.trainers.supervised import OptimSettings
from rl_exit.trainers.token_steps import TokenSteps
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
    check_importable(config.algorithm)
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
        writes = task_kind(run.config.task) == "generation"
        self.steps: Steps = TokenSteps(run, display) if writes else LabelSteps(run, display, workers)

    def initialise(self) -> None:
        """Do the steps before the first round."""
        self.run.run_step("data", lambda log: self.steps.prepare(), "data")
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
            self.run.run_step(f"round-{number}-policy", partial(self.steps.policy, number, model), "policy", number)
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
        self.run.run_step("final", lambda log: self.steps.finish(chosen), "final")
        self.run.run_step("report", lambda log: self._report(chosen["round"], log), "report")

    def _retain(self, number: int, best: int) -> None:
        """Drop what earlier rounds leave and nothing reads any more: by far the most of a run's space."""
        for earlier in range(1, number):
            shutil.rmtree(self._round(earlier) / "trained", ignore_errors=True)
            if self.config.keep_rounds != "all" and earlier != best:
                shutil.rmtree(self._round(earlier) / "store-train", ignore_errors=True)
                shutil.rmtree(self._round(earlier) / "store-dev", ignore_errors=True)

    def _report(self, best: int, log: MetricLog) -> dict[str, Any]:
        if not (self._round(best) / "store-train").is_dir():  # a later round had seemed better
            self._store(best, self._round(best) / "model", log)
        self.run.gather_metrics()
        write_report(self.run.path)
        self._tidy(best)
        return {}

    def _round(self, number: int) -> Path:
        return self.run.path / "rounds" / str(number)

    def _initialise(self, log: MetricLog) -> dict[str, Any]:
        c = self.config
        folder = self.run.path / "init"
        if c.init.model is not None:
            self.display.say(f"initialisation taken from {c.init.model}")
            return take_initialised(c.init.model, folder / "start", folder / "model")
        if self.steps.builds_store:
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
        self.steps.store(number, model_path)
        return {"model": str(model_path.relative_to(self.run.path))}

    def _dev(self, number: int, log: MetricLog) -> dict[str, Any]:
        floor = self._reference(number, 0.0)
        result = self.steps.measure_dev(number, floor)
        reference = max(floor, result.full_depth_score)
        log.log(
            number,
            number,
            {
                "score": result.score,
                "mean_exit_layer": result.mean_exit_layer,
                "full_depth_score": result.full_depth_score,
                "threshold": result.threshold,
            },
        )
        return {
            "round": number,
            "reference": reference,
            "threshold": result.threshold,
            "score": result.score,
            "mean_exit_layer": result.mean_exit_layer,
            "dev": result.to_dict(),
        }

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
