"""Trainings on nodes that do not see the run directory: copies from the run's storage, results back through it.

What a training reads was written by earlier steps, and is therefore in the storage. Its checkpoints and its result
go into ``exchange/`` beside the run's files there; the driver fetches the result and puts it where the training would
have.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_exit.errors import RunError
from rl_exit.files import atomic_file, atomic_folder
from rl_exit.storage import Storage
from rl_exit.trainers.mirror import EXCHANGE, MANIFEST
from rl_exit.trainers.supervised import OnUpdate

if TYPE_CHECKING:
    from rl_exit.trainers.exit_training import ExitTraining

LATEST = "latest.json"
CHECKPOINT_SECONDS = 60.0  # between two checkpoints that are handed on, and at least 20 times what that takes


@dataclass(frozen=True)
class Exchange:
    """Where a training's files are in the storage.

    Attributes:
        root: The run directory on the driver's node.
        url: The run's own folder in the storage.
    """

    root: str
    url: str

    def name_of(self, path: str) -> str:
        """Name in the storage of a file of the run directory."""
        return Path(path).relative_to(self.root).as_posix()


@contextmanager
def at_hand(job: ExitTraining, report: OnUpdate, *, is_first: bool) -> Iterator[tuple[ExitTraining, OnUpdate]]:
    """The training with paths that can be read and written here.

    Args:
        job: As the driver gave it, paths from the root.
        report: Where its progress goes.
        is_first: Whether this is rank 0, which writes checkpoints and the result.

    Yields:
        The training and where to report; both unchanged on a node that sees the run directory.

    Raises:
        RunError: The run directory is not seen and the run has no storage.
    """
    if Path(job.model).exists():
        yield job, report
        return
    if job.exchange is None:
        raise RunError(
            f"a worker of Ray Train does not see {job.model}: give storage_path=... (a folder that all nodes share, or "
            "a URL such as s3://bucket/runs)"
        )
    exchange = Exchange(**job.exchange)
    storage = Storage(exchange.url)
    with tempfile.TemporaryDirectory(prefix="rl-exit-") as folder:
        here = _moved(job, exchange, Path(folder))
        _fetch_inputs(job, here, exchange, storage)
        carrier = _Carrier(storage, f"{EXCHANGE}/{exchange.name_of(job.checkpoint)}", Path(here.checkpoint))
        carrier.fetch()

        def tell(done: int, total: int, epoch: float, values: dict[str, float]) -> None:
            report(done, total, epoch, values)
            carrier.hand_on()

        yield here, tell if is_first else report
        if is_first:
            _hand_in(here, f"{EXCHANGE}/{exchange.name_of(job.output)}", storage)


def collect(job: ExitTraining) -> bool:
    """Put a result that was handed in where the training would have written it; returns whether there was one.

    Args:
        job: As it was given to the workers.
    """
    if job.exchange is None:
        return False
    exchange = Exchange(**job.exchange)
    storage = Storage(exchange.url)
    place = f"{EXCHANGE}/{exchange.name_of(job.output)}"
    index = storage.read_json(f"{place}/{LATEST}")
    if index is None:
        return False
    with atomic_folder(Path(job.output)) as beside:
        for name, digest in index["output"].items():
            storage.download(f"{place}/output/{name}", beside / name, digest)
    if job.visits is not None and index["visits"] is not None:
        with atomic_file(Path(job.visits)) as beside:
            storage.download(f"{place}/visits", beside, index["visits"])
    storage.remove(EXCHANGE)
    return True


def _moved(job: ExitTraining, exchange: Exchange, folder: Path) -> ExitTraining:
    """The same training inside another folder."""
    names = ("model", "instances", "output", "checkpoint", "visits")
    paths: dict[str, Any] = {
        name: str(folder / exchange.name_of(value)) for name in names if (value := getattr(job, name)) is not None
    }
    return replace(job, **paths)


def _fetch_inputs(job: ExitTraining, here: ExitTraining, exchange: Exchange, storage: Storage) -> None:
    files = (storage.read_json(MANIFEST) or {}).get("files", {})
    for given, target in ((job.model, here.model), (job.instances, here.instances)):
        name = exchange.name_of(given)
        found = [file for file in files if file == name or file.startswith(f"{name}/")]
        if not found:
            raise RunError(f"{exchange.url}: does not hold {name}, which the training needs")
        for file in found:
            storage.download(file, Path(target + file.removeprefix(name)), files[file]["sha256"])


def _hand_in(here: ExitTraining, place: str, storage: Storage) -> None:
    """Upload the result; the index that names its files comes last."""
    output = Path(here.output)
    found = {}
    for file in sorted(path for path in output.rglob("*") if path.is_file()):
        name = file.relative_to(output).as_posix()
        found[name] = storage.upload(file, f"{place}/output/{name}")[1]
    visits = None
    if here.visits is not None and Path(here.visits).is_file():
        visits = storage.upload(Path(here.visits), f"{place}/visits")[1]
    storage.write_json(f"{place}/{LATEST}", {"output": found, "visits": visits})


class _Carrier:
    """Takes the checkpoints of a training to the storage and back.

    Args:
        storage: The run's.
        place: Folder in it.
        folder: The checkpoint here; replaced as a whole by the training.
    """

    def __init__(self, storage: Storage, place: str, folder: Path) -> None:
        self._storage, self._place, self._folder = storage, place, folder
        self._seen: int | None = None
        self._handed, self._took = time.monotonic(), 0.0
        self._number = 0

    def fetch(self) -> None:
        """Get the last one that was handed on, if any."""
        index = self._storage.read_json(f"{self._place}/{LATEST}")
        if index is None:
            return
        self._number = int(index["number"])
        shutil.rmtree(self._folder, ignore_errors=True)
        for name, digest in index["files"].items():
            self._storage.download(f"{self._place}/{self._number}/{name}", self._folder / name, digest)
        self._seen = self._stamp()

    def hand_on(self) -> None:
        """Upload the checkpoint if there is a new one and the last time was a while ago."""
        stamp, now = self._stamp(), time.monotonic()
        due = self._number == 0 or now - self._handed >= max(CHECKPOINT_SECONDS, 20.0 * self._took)
        if stamp is None or stamp == self._seen or not due:
            return
        number = self._number + 1
        files = {}
        for file in sorted(self._folder.iterdir()):
            files[file.name] = self._storage.upload(file, f"{self._place}/{number}/{file.name}")[1]
        self._storage.write_json(f"{self._place}/{LATEST}", {"number": number, "files": files})
        if self._number:
            self._storage.remove(f"{self._place}/{self._number}")
        self._number, self._seen = number, stamp
        self._handed = time.monotonic()
        self._took = self._handed - now

    def _stamp(self) -> int | None:
        position = self._folder / "position.json"
        return position.stat().st_mtime_ns if position.is_file() else None
