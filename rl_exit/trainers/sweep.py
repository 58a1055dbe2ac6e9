"""Running a sweep with Ray Tune: shared initialisations first, then one run per trial.

Every run is an ordinary run directory and resumes by itself, so an interrupted sweep goes on when the same command is
given again; Tune schedules, and keeps nothing that is needed afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl_exit.config import RunConfig, parse_config
from rl_exit.errors import UserError
from rl_exit.files import telling_disk_errors, write_json
from rl_exit.progress import Display, Terminal
from rl_exit.trainers.run_directory import RunDirectory
from rl_exit.trainers.sweep_plan import Initialisation, SweepPlan, Trial, check_resumable
from rl_exit.trainers.sweep_results import is_finished, is_initialised, sweep_results

TUNE_FOLDER = ".tune"
LOG_FOLDER = ".logs"
_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs log by themselves
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interruption ends the command, not Tune's loop alone
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Share:
    """Resources of one trial.

    Attributes:
        cpus: Of the process that does the run; also its threads.
        gpus: Of the process that does the run.
        actors: CPUs for the actors that it starts, one each.
        actor_gpus: How many of these actors have a GPU.
        workers: CPUs for Ray Train, which reserves them itself.
    """

    cpus: int = 1
    gpus: int = 0
    actors: int = 0
    actor_gpus: int = 0
    workers: int = 0

    @property
    def total(self) -> int:
        """CPUs that one trial holds."""
        return self.cpus + self.actors + self.workers

    def bundles(self) -> list[dict[str, float]]:
        """For a placement group: the run's process first."""
        first = {"CPU": float(self.cpus), **({"GPU": float(self.gpus)} if self.gpus else {})}
        with_gpu = [{"CPU": 1.0, "GPU": 1.0}] * self.actor_gpus
        return [first, *with_gpu, *[{"CPU": 1.0}] * (self.actors - self.actor_gpus)]


def share_of(config: RunConfig, cpus: int) -> Share:
    """What a run holds in a sweep, ``cpus`` of it for its own process."""
    step, learners = config.task_step, config.learners
    return Share(
        cpus=cpus,
        gpus=int((step.use_gpu and not step.num_workers) or (learners.use_gpu and not learners.num_learners)),
        actors=max(config.sampling.num_env_runners + learners.num_learners, config.store.num_workers),
        actor_gpus=learners.num_learners if learners.use_gpu else 0,
        workers=step.num_workers,
    )


@dataclass(frozen=True)
class Job:
    """One training as it is sent to a Tune trial; plain values.

    Attributes:
        name: Label of the trial or initialisation.
        kind: ``"run"`` or ``"init"``.
        config: The configuration as a tree.
        log: File for what it prints.
        here: Working directory, so that relative paths mean what they mean to the user.
    """

    name: str
    kind: str
    config: dict[str, Any]
    log: str
    here: str


@dataclass
class Outcome:
    """What became of the jobs: label -> message for those that failed."""

    failed: dict[str, str] = field(default_factory=dict)


def run_sweep(plan: SweepPlan, display: Display, shares: Mapping[str, Share], max_concurrent: int) -> dict[str, Any]:
    """Do what is open of a sweep in the Ray session of this process.

    Args:
        plan: The sweep.
        display: Where progress is shown.
        shares: Resources of each trial and initialisation, by label.
        max_concurrent: Most trials at once.

    Returns:
        The contents of ``sweep.json``.

    Raises:
        RunError: The folder holds something else, or another process is at work on it.
    """
    with RunDirectory.locked(plan.folder), telling_disk_errors(plan.folder):
        check_resumable(plan)
        outcome = Outcome()
        _write(plan, outcome)
        open_trials = [trial for trial in plan.trials if not is_finished(trial)]
        needed = {trial.initialisation.label for trial in open_trials if trial.initialisation}
        starts = [start for start in plan.initialisations if start.label in needed and not is_initialised(start)]
        try:
            _do(
                plan,
                "initialisations",
                [_job(plan, start) for start in starts],
                display,
                shares,
                max_concurrent,
                outcome,
            )
            ready = []
            for trial in open_trials:
                said = outcome.failed.get(trial.initialisation.label) if trial.initialisation else None
                if said is not None:
                    outcome.failed[trial.label] = f"its initialisation failed: {said}"
                else:
                    ready.append(trial)
            _do(plan, "trials", [_job(plan, trial) for trial in ready], display, shares, max_concurrent, outcome)
        finally:
            shutil.rmtree(plan.folder / TUNE_FOLDER, ignore_errors=True)
            results = _write(plan, outcome)
        return results


def _write(plan: SweepPlan, outcome: Outcome) -> dict[str, Any]:
    results = sweep_results(plan, outcome.failed)
    write_json(plan.folder / "sweep.json", results)
    return results


def _job(plan: SweepPlan, part: Trial | Initialisation) -> Job:
    kind = "run" if isinstance(part, Trial) else "init"
    log = plan.folder / LOG_FOLDER / f"{part.label.replace(' ', '-')}.log"
    return Job(part.label, kind, part.config.model_dump(mode="json"), str(log), str(Path.cwd()))


def _do(
    plan: SweepPlan,
    title: str,
    jobs: Sequence[Job],
    display: Display,
    shares: Mapping[str, Share],
    max_concurrent: int,
    outcome: Outcome,
) -> None:
    """One Tune experiment over the jobs; those that fail do not stop the others."""
    if not jobs:
        return
    from ray import tune

    from rl_exit.trainers.sweep_watch import Watch

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are told by the watch
    log = plan.folder / LOG_FOLDER / "tune.log"
    log.parent.mkdir(parents=True, exist_ok=True)

    def resources(config: dict[str, Any]) -> Any:
        return tune.PlacementGroupFactory(shares[config["job"]["name"]].bundles())

    with display.step(f"{title} ({len(jobs)})", len(jobs)) as progress, _environment(_TUNE_SETTINGS):
        watch = Watch(display, progress, len(jobs), outcome.failed, lambda: _write(plan, outcome))
        tuner = tune.Tuner(
            tune.with_resources(do_job, resources),
            param_space={"job": tune.grid_search([vars(job) for job in jobs])},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=max_concurrent, trial_dirname_creator=lambda trial: trial.trial_id
            ),
            run_config=tune.RunConfig(
                name=title,
                storage_path=str((plan.folder / TUNE_FOLDER).absolute()),
                verbose=0,
                callbacks=[watch],
                failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),
            ),
        )
        # Tune prints tables even when told to be silent; the display writes to standard error.
        with log.open("a", encoding="utf-8") as out, contextlib.redirect_stdout(out):
            tuner.fit()


def do_job(config: dict[str, Any]) -> dict[str, Any]:
    """Do one job; this is what a Tune trial runs.

    Args:
        config: ``{"job": fields of :class:`Job`}``.

    Returns:
        ``{"failed": message or None}``; an error that is not the user's is raised.
    """
    job = Job(**config["job"])
    with contextlib.suppress(FileNotFoundError):  # on another node it may not be there
        os.chdir(job.here)
    Path(job.log).parent.mkdir(parents=True, exist_ok=True)
    from rl_exit.trainers.alternation import initialise, train

    own = parse_config(job.config, job.name)
    with Path(job.log).open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):  # noqa: SIM117
        with contextlib.redirect_stderr(log):
            try:
                if job.kind == "init":
                    initialise(own, Terminal())
                else:
                    train(own, Terminal(), resume=True)
            except UserError as error:
                log.write(f"failed: {error}\n")
                return {"failed": str(error)}
    return {"failed": None}


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
