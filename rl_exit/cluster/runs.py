"""Runs wherever they are: folders here, a storage, jobs of a cluster; with state and result."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl_exit.cluster.jobs import Job
from rl_exit.errors import UserError
from rl_exit.files import read_json
from rl_exit.storage import Storage
from rl_exit.trainers.mirror import MANIFEST

DEPTH = 2  # a sweep's runs lie in a folder of their own
_PATIENCE = 5.0


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: Of the run, below its folder.
        place: Folder, URL, or address of the cluster.
        state: ``finished``, ``running``, ``open`` (interrupted, or at work elsewhere), or a job's state.
        step: The last step that is done.
        started: Seconds since 1970.
        job: Name of its newest job on the cluster asked.
        result: Of test, else dev: ``split``, ``score``, ``full_depth_score``, ``mean_exit_layer``, ``saved_layers``.
    """

    name: str
    place: str
    state: str
    step: str | None = None
    started: float | None = None
    job: str | None = None
    result: dict[str, Any] | None = None


def local_runs(folder: Path) -> Iterator[Run]:
    """Runs in a folder, and in the folders of sweeps in it."""
    for path in sorted(_run_folders(folder, DEPTH)):
        markers = sorted((path / "steps").glob("[!.]*.json"), key=lambda marker: marker.stat().st_mtime)
        done = [marker.stem for marker in markers]
        yield Run(
            name=path.relative_to(folder).as_posix(),
            place=str(folder),
            state="finished" if "report" in done else "running" if _is_held(path) else "open",
            step=done[-1] if done else None,
            started=_quietly(path / "run.json").get("started"),
            result=headline_of(_quietly(path / "results.json")) if "report" in done else None,
        )


def stored_runs(url: str, patience: float = _PATIENCE) -> Iterator[Run]:
    """Runs in a storage.

    Raises:
        UserError: It cannot be read.
    """
    storage = Storage(url, patience)
    for name in storage.folders():
        found = stored_run(storage, name)
        if found is not None:
            yield found
        else:
            yield from (
                run for inner in storage.below(name).folders() if (run := stored_run(storage, f"{name}/{inner}"))
            )


def stored_run(storage: Storage, name: str) -> Run | None:
    """One run of a storage, None where there is none of that name."""
    manifest = storage.read_json(f"{name}/{MANIFEST}")
    if manifest is None or not isinstance(manifest.get("files"), dict):
        return None
    done = {
        file.removeprefix("steps/").removesuffix(".json") for file in manifest["files"] if file.startswith("steps/")
    }
    finished = "report" in done
    about = storage.read_json(f"{name}/run.json") or {}
    results = storage.read_json(f"{name}/results.json") if finished else None
    return Run(
        name=name,
        place=storage.url,
        state="finished" if finished else "open",
        step=_latest(done),
        started=about.get("started"),
        result=headline_of(results or {}),
    )


def with_jobs(runs: Iterable[Run], jobs: Iterable[Job], address: str) -> list[Run]:
    """Runs with the state of their newest job, and the jobs whose run is not among them."""
    newest: dict[tuple[str, str], Job] = {}
    for job in jobs:  # the newest first
        if job.run is not None:
            newest.setdefault(((job.place or "").rstrip("/"), job.run), job)
    found = []
    for run in runs:
        key = (run.place.rstrip("/"), run.name)
        found.append(replace(run, job=newest[key].name, state=_state(run.state, newest[key])) if key in newest else run)
        newest.pop(key, None)
    for (place, name), job in newest.items():
        known = _at_its_place(place, name) if job.state == "SUCCEEDED" else None
        run = known or Run(name, place or address, "", started=job.started)
        found.append(replace(run, job=job.name, state=_state(run.state, job), started=run.started or job.started))
    return found


def headline_of(results: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of results.json that a list shows."""
    for split in ("test", "dev"):
        found = results.get(split)
        if isinstance(found, dict):
            keys = ("score", "full_depth_score", "mean_exit_layer", "saved_layers")
            return {"split": split, "metric": results.get("metric"), **{key: found.get(key) for key in keys}}
    return None


def _state(state: str, job: Job) -> str:
    return state if state == "finished" and job.is_over else job.state.lower()


def _at_its_place(place: str, name: str) -> Run | None:
    """A run whose place this machine may happen to see."""
    if not place or ("://" not in place and not Path(place).is_dir()):
        return None
    try:
        return stored_run(Storage(place, 0.0), name)
    except UserError:
        return None


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith(".") or not path.is_dir():
            continue
        if (path / "config.yaml").is_file() and (path / "steps").is_dir():
            yield path
        elif depth > 1:
            yield from _run_folders(path, depth - 1)


def _is_held(path: Path) -> bool:
    """Whether a process on this machine is at work on the run."""
    lock = path.parent / f".{path.name}.lock"
    if not lock.is_file():
        return False
    with lock.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _quietly(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UserError:
        return {}


def _latest(done: set[str]) -> str | None:
    """The last of a run's steps by their order."""
    order = {"data": (0, 0), "init": (0, 1), "final": (10**6, 0), "report": (10**6, 1)}
    kinds = ("store", "policy", "dev", "task")

    def place(step: str) -> tuple[int, int]:
        parts = step.split("-")
        if len(parts) == 3 and parts[1].isdigit() and parts[2] in kinds:
            return (int(parts[1]), kinds.index(parts[2]))
        return order.get(step, (-1, 0))

    return max(done, key=place, default=None)
