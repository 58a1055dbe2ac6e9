"""The run directory: what is done, what was measured, and who may write.

A run is a row of named steps. Each step writes its outcome (atomically) and then a marker with its results; a run that
dies resumes at the first step without a marker::

    config.yaml                 the resolved configuration
    run.json                    versions, seed, when it was started
    steps/<step>.json           marker of a finished step: its results and seconds
    metrics/<step>.parquet      rows logged by the step
    data/ init/ rounds/<r>/     outcomes
    metrics.parquet  results.json  evaluation.json  report/  model/
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl_exit.config import RunConfig, dump_config, load_config
from rl_exit.errors import RunError, StorageError, UserError
from rl_exit.files import atomic_file, read_json, telling_disk_errors, write_json, write_text
from rl_exit.trainers.mirror import Mirror, mirror_of
from rl_exit.trainers.storage_watch import StorageWatch

KEEP_SECONDS = 60.0  # between two uploads of checkpoints, and at least so many times what an upload takes:
KEEP_SHARE = 20.0
VERSIONED = ("rl-exit", "torch", "transformers", "ray", "gymnasium", "datasets", "pyarrow", "numpy", "peft")
STORAGE_ATTEMPTS = 6  # at a step during which the storage was away
# Keys that may differ between the first start and a resumption, since they do not change the result.
FREE_KEYS = frozenset(
    {
        "output_dir",
        "name",
        "storage_path",
        "cluster",
        "sampling.num_env_runners",
        "sampling.transport",
        "store.num_workers",
        "store.use_gpu",
        "placement.workers",
        "placement.timeout",
        "placement.autoscale",
        "tracking",
        "keep_rounds",
    }
)

logger = logging.getLogger(__name__)
Logger = Callable[[str, int, int, dict[str, float]], None]
"""Takes (phase, round, step, values) of every row that is logged."""

# What the first step and the preparations for it leave.
_FIRST_NAMES = frozenset(
    {"config.yaml", "run.json", "steps", "data", "init", "tensorboard", ".train", "tracking.json", "wandb"}
)
_FIRST_UNFINISHED = (".config.yaml.", ".run.json.")


@dataclass
class MetricLog:
    """Rows of one step in long form; also written as TensorBoard events while the step runs."""

    phase: str
    round: int
    folder: Path
    loggers: Sequence[Logger] = ()
    started: float = field(default_factory=time.time)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(self.folder, ignore_errors=True)  # what an interrupted try of this step wrote
        self._writer = SummaryWriter(str(self.folder))

    def log(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Record named values at a step (updates so far) and epoch (passes so far, may be fractional)."""
        now = time.time() - self.started
        for metric, value in values.items():
            self.rows.append(
                {
                    "phase": self.phase,
                    "round": self.round,
                    "step": step,
                    "epoch": float(epoch),
                    "metric": metric,
                    "value": float(value),
                    "time": now,
                }
            )
            with contextlib.suppress(OSError):  # a disk that fails is told by what needs it
                self._writer.add_scalar(f"{self.phase}/{metric}", value, step)
        for tell in self.loggers:
            tell(self.phase, self.round, step, values)

    def close(self) -> None:
        """Flush the events."""
        with contextlib.suppress(OSError):
            self._writer.close()


class RunDirectory:
    """One run on disk."""

    def __init__(self, path: Path, config: RunConfig, mirror: Mirror | None = None) -> None:
        self.path = path
        self.config = config
        self.mirror = mirror
        self._kept, self._keeping = time.monotonic(), 0.0
        self.loggers: list[Logger] = []  # who else is told every logged row

    @classmethod
    def create(cls, config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> RunDirectory:
        """Make a new run directory, or open the one to be resumed.

        Args:
            config: The resolved configuration; it names the directory.
            resume: Go on with the run that is there; without one, start it.
            overwrite: Remove a run that is there. Nothing but a run is ever removed.

        Raises:
            RunError: The directory exists and neither was asked for, is no run, or was made from another configuration.
        """
        path = config.run_dir
        run = cls(path, config, _opened_mirror(config, resume=resume, overwrite=overwrite))
        if path.exists() or path.is_symlink():
            # A file config.yaml alone makes no run: many a project has one.
            is_run = all((path / name).exists() for name in ("config.yaml", "steps"))
            if not path.is_dir() or not (is_run or run._is_empty()):
                raise RunError(f"{path}: exists and is no run directory; choose another name=... or output_dir=...")
            if is_run and resume and not overwrite:
                run._check_same()
                run.keep()
                return run
            if overwrite or run._is_empty():
                shutil.rmtree(path)
            else:
                raise RunError(
                    f"{path}: a run is already there; go on with it (--resume), replace it (--overwrite) "
                    "or give the new one another name=..."
                )
        (path / "steps").mkdir(parents=True, exist_ok=True)
        write_json(path / "run.json", {"seed": config.seed, "versions": versions(), "started": time.time()})
        write_text(path / "config.yaml", dump_config(config))
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run for reading.

        Raises:
            RunError: No run there.
        """
        file = path / "config.yaml"
        if not file.is_file():
            raise RunError(f"{path}: no run directory (it has no config.yaml)")
        return cls(path, load_config(file))

    @staticmethod
    @contextmanager
    def locked(path: Path) -> Iterator[None]:
        """Hold the run at ``path`` for this process; the lock goes with the process, however it ends.

        Raises:
            RunError: Another process is at work in this directory.
        """
        with telling_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = (path.parent / f".{path.name}.lock").open("w")
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"{path}: another process is at work on this run") from None
            yield

    def discard_if_empty(self) -> None:
        """Remove a run that failed before its first step was done: there is nothing to resume."""
        if self._is_empty():
            shutil.rmtree(self.path, ignore_errors=True)

    def _is_empty(self) -> bool:
        """Whether nothing is there but what a run leaves that ended before its first step."""
        names = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        known = all(name in _FIRST_NAMES or name.startswith(_FIRST_UNFINISHED) for name in names)
        return known and not (self.path / "init" / "model").exists() and not any(self._markers())

    def result(self, step: str) -> dict[str, Any] | None:
        """Results of a finished step, None while it is open."""
        marker = self.path / "steps" / f"{step}.json"
        return _read_marker(marker)["results"] if marker.is_file() else None

    def run_step(
        self, step: str, work: Callable[[MetricLog], dict[str, Any]], phase: str, round: int = 0
    ) -> dict[str, Any]:
        """Do a step unless it is done; its marker is written last.

        Args:
            step: Its name, unique in the run.
            work: Does the step; gets the log for its metrics, returns JSON-able results.
            phase: Phase name of the logged rows.
            round: Round number of the logged rows, 0 outside rounds.
        """
        known = self.result(step)
        if known is not None:
            return known
        started = time.monotonic()
        for attempt in range(1, STORAGE_ATTEMPTS + 1):
            with StorageWatch(self.path / "run.json") as watch:
                try:
                    log = MetricLog(phase, round, self.path / "tensorboard" / step, self.loggers)
                    try:
                        results = work(log)
                    finally:
                        log.close()
                    self._write_rows(step, log.rows)
                    error = None
                except (OSError, UserError) as raised:
                    error = raised
                if not (watch.was_away or isinstance(error, StorageError)):
                    if error is not None:
                        raise error
                    break
                # What was done meanwhile may not be where it should be.
                logger.warning("%s: this storage was away during step %s, which is done again", self.path, step)
                if isinstance(error, StorageError) and watch.present:
                    time.sleep(min(30.0, 2.0**attempt))
                watch.await_back()
        else:
            raise error or RunError(f"{self.path}: this storage was away {STORAGE_ATTEMPTS} times during step {step}")
        write_json(
            self.path / "steps" / f"{step}.json",
            {"step": step, "phase": phase, "seconds": time.monotonic() - started, "results": results},
        )
        self.keep()
        return results

    def exchange(self) -> dict[str, str] | None:
        """Where workers find and leave files that do not see this directory (:mod:`rl_exit.trainers.staging`)."""
        if self.mirror is None:
            return None
        return {"root": str(self.path.absolute()), "url": self.mirror.storage.url}

    def keep(self, checkpoint: bool = False) -> None:
        """Bring the run's storage up to date, where it has one.

        Args:
            checkpoint: Inside a step, for the sake of a checkpoint: only if the last time was some while ago.

        Raises:
            UserError: The storage stays away.
        """
        if self.mirror is None:
            return
        now = time.monotonic()
        if checkpoint and now - self._kept < max(KEEP_SECONDS, KEEP_SHARE * self._keeping):
            return
        self.mirror.push()
        self._kept = time.monotonic()
        self._keeping = self._kept - now

    def instances(self, split: str) -> Path:
        """File of the tokenised instances of a split."""
        return (self.path / "data" / f"{split}.arrow").absolute()

    def seconds(self) -> dict[str, float]:
        """Seconds of every finished step in the order they were done."""
        markers = [_read_marker(path) for path in sorted(self._markers(), key=lambda path: path.stat().st_mtime)]
        return {marker["step"]: marker["seconds"] for marker in markers}

    def _markers(self) -> Iterator[Path]:
        return (self.path / "steps").glob("[!.]*.json")

    def gather_metrics(self) -> None:
        """Write metrics.parquet from the rows of all finished steps."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        done = self.seconds()
        tables = [pq.read_table(self.path / "metrics" / f"{s}.parquet") for s in done if self._rows_of(s).is_file()]
        if tables:
            with atomic_file(self.path / "metrics.parquet") as beside:
                pq.write_table(pa.concat_tables(tables), beside)

    def _rows_of(self, step: str) -> Path:
        return self.path / "metrics" / f"{step}.parquet"

    def _write_rows(self, step: str, rows: Sequence[dict[str, Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if rows:
            with atomic_file(self._rows_of(step)) as beside:
                pq.write_table(pa.Table.from_pylist(list(rows)), beside)

    def _check_same(self) -> None:
        changed = changed_keys(RunDirectory.open(self.path).config, self.config)
        if changed:
            raise RunError(f"{self.path}: cannot be resumed with another configuration: {changed}")


def _opened_mirror(config: RunConfig, *, resume: bool, overwrite: bool) -> Mirror | None:
    """The copy of the run in its storage, taken back first where the run is to go on."""
    mirror = mirror_of(config.run_dir, config.storage_path, config.run_name)
    if mirror is None:
        return None
    if mirror.is_there():
        if not (resume or overwrite):
            raise RunError(
                f"{mirror.storage.url}: a run is already there; go on with it (--resume), replace it (--overwrite) "
                "or give the new one another name=..."
            )
        mirror.open()
        if overwrite:
            mirror.discard()
        else:
            mirror.pull()
    else:
        mirror.open()
    return mirror


def refuse_generation(path: Path, command: str) -> None:
    """Refuse a decoder's run where a command is about labels.

    Raises:
        RunError: The run is one; where its comparison is found instead.
    """
    facts = path / "data" / "task.json"
    if facts.is_file() and read_json(facts).get("kind") == "generation":
        raise RunError(
            f"{path}: 'rl-exit {command}' compares answers with labels, and this run's decoder writes text; its rules "
            "stand side by side in report/index.html and evaluation.json"
        )


def changed_keys(there: RunConfig, here: RunConfig) -> str:
    """In what two configurations differ that decides a result, in words; empty where in nothing."""
    before, now = flat(there.model_dump(mode="json")), flat(here.model_dump(mode="json"))
    changed = sorted(key for key in now if key not in FREE_KEYS and now[key] != before.get(key))
    return ", ".join(f"{key} ({before.get(key)!r} there, {now[key]!r} given)" for key in changed[:5])


def _read_marker(path: Path) -> dict[str, Any]:
    marker = read_json(path)
    wanted: dict[str, Any] = {"step": str, "seconds": (int, float), "results": dict}
    if not all(isinstance(marker.get(key), kind) for key, kind in wanted.items()):
        raise RunError(f"{path}: not the marker of a finished step; remove it to have the step done again")
    return marker


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
