"""Where metrics go besides TensorBoard and the run directory: MLflow or Weights & Biases by one word, Ray's metrics.

A tracker that fails (no network, a full quota) never ends a run: it is told once and then left alone.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rl_exit.config import RunConfig
from rl_exit.errors import ConfigError, RunError
from rl_exit.files import read_json, write_json
from rl_exit.trainers.run_directory import Logger, RunDirectory, flat

PROJECT = "rl-exit"
TRACKING_FILE = "tracking.json"

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A service that keeps metrics of runs."""

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Values of a phase and round (``group``) at a step counted within it."""

    def close(self, failed: bool) -> None:
        """The run is over, for now or for good."""


def check_tracking(config: RunConfig) -> None:
    """Refuse a tracker that is not installed, before anything starts.

    Raises:
        ConfigError: With the command that installs it.
    """
    if config.tracking != "none":
        _import(config.tracking)


@contextmanager
def tracked(run: RunDirectory) -> Iterator[None]:
    """Send the run's metrics on while the block runs: to Ray where there is a session, and to the tracker chosen."""
    loggers: list[Logger] = []
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        loggers.append(RayMetrics(run.config.run_name).log)
    tracker = _Guarded(run) if run.config.tracking != "none" else None
    if tracker is not None:
        loggers.append(tracker.log)
    run.loggers += loggers
    failed = True
    try:
        yield
        failed = False
    finally:
        run.loggers = [one for one in run.loggers if one not in loggers]
        if tracker is not None:
            tracker.close(failed)


class _Guarded:
    """A tracker whose errors are told once and stop nothing."""

    def __init__(self, run: RunDirectory) -> None:
        self._word = run.config.tracking
        self._tracker: Tracker | None = None
        with self._telling():
            self._tracker = (MLflow if self._word == "mlflow" else WandB)(run.config, run.path)

    def log(self, phase: str, round: int, step: int, values: Mapping[str, float]) -> None:
        if self._tracker is not None:
            with self._telling():
                self._tracker.log(group_of(phase, round), step, values)

    def close(self, failed: bool) -> None:
        if self._tracker is not None:
            with self._telling():
                self._tracker.close(failed)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  (whatever a client library may raise)
            self._tracker = None
            logger.warning("tracking=%s failed and is left out from here on: %s", self._word, error)


class MLflow:
    """Metrics and settings in MLflow, at the place that its own environment variables name (MLFLOW_TRACKING_URI)."""

    def __init__(self, config: RunConfig, path: Path) -> None:
        self._mlflow = _import("mlflow")
        self._mlflow.set_experiment(PROJECT)
        known = _known(path, "mlflow")
        started = self._mlflow.start_run(run_id=known, run_name=None if known else config.run_name)
        if known is None:
            settings = {key: str(value)[:500] for key, value in flat(config.model_dump(mode="json")).items()}
            self._mlflow.log_params(settings)
            _remember(path, "mlflow", started.info.run_id)

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        self._mlflow.log_metrics({f"{group}/{name}": float(value) for name, value in values.items()}, step=step)

    def close(self, failed: bool) -> None:
        """See :class:`Tracker`."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class WandB:
    """Metrics and settings in Weights & Biases; ``WANDB_MODE=offline`` keeps them in the run directory."""

    def __init__(self, config: RunConfig, path: Path) -> None:
        wandb = _import("wandb")
        known = _known(path, "wandb")
        self._run = wandb.init(
            project=PROJECT,
            name=config.run_name,
            id=known,
            resume="allow" if known else None,
            config=flat(config.model_dump(mode="json")),
            dir=str(path),
        )
        self._groups: set[str] = set()
        if known is None:
            _remember(path, "wandb", self._run.id)

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`; steps are counted within a group, so each group has an axis of its own."""
        if group not in self._groups:
            self._run.define_metric(f"{group}/step")
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
            self._groups.add(group)
        self._run.log({f"{group}/step": step} | {f"{group}/{name}": float(value) for name, value in values.items()})

    def close(self, failed: bool) -> None:
        """See :class:`Tracker`."""
        self._run.finish(exit_code=int(failed))


class RayMetrics:
    """Gauges ``rl_exit_*`` in Ray's metrics (dashboard, Prometheus), tagged with run, phase and round.

    The shares of the layers are one gauge, ``rl_exit_exits``, with the layer as a tag.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def log(self, phase: str, round: int, step: int, values: Mapping[str, float]) -> None:
        """Set the gauges to these values."""
        for name, value in {**values, "step": float(step)}.items():
            tags = {"run": self._run, "phase": phase, "round": str(round), "layer": ""}
            layer = re.fullmatch(r"exits_(\d+)", name)
            if layer:
                name, tags["layer"] = "exits", layer[1]
            self._gauge(name).set(float(value), tags)

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            clean = re.sub(r"\W", "_", name)
            keys = ("run", "phase", "round", "layer")
            self._gauges[name] = Gauge(f"rl_exit_{clean}", description=f"rl-exit: {name}", tag_keys=keys)
        return self._gauges[name]


def group_of(phase: str, round: int) -> str:
    """Name of the curves of a phase: ``policy-2``, ``init``."""
    return f"{phase}-{round}" if round else phase


def _import(word: str) -> Any:
    try:
        return importlib.import_module(word)
    except ImportError:
        raise ConfigError(
            f"tracking={word}: the package {word} is not installed; pip install 'rl-exit[{word}]', or set "
            "tracking=none (TensorBoard events are always written)"
        ) from None


def _known(path: Path, word: str) -> str | None:
    """Id under which this run is tracked already."""
    try:
        return read_json(path / TRACKING_FILE).get(word)
    except RunError:
        return None


def _remember(path: Path, word: str, name: str) -> None:
    write_json(path / TRACKING_FILE, {word: name})
