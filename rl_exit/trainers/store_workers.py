"""Shards of a state store from a pool of Ray actors; what a lost actor had begun is built again by another.

A worker that sees the run's folders reads the model there and writes its shards itself. One that does not (a node
without the shared disk) gets model and instances through Ray's object store and hands its shards back the same way.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rl_exit.data.instances import Instances
from rl_exit.errors import RunError, UserError
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.trainers.placement import await_room
from rl_exit.trainers.store_phase import Columns, StoreJob, compute_shard, model_fingerprint

ATTEMPTS = 3  # at a shard, before its failure counts as the shard's own
START_SECONDS = 180.0  # for a worker to be ready while no other works
SILENT_SECONDS = 300.0  # a worker that has finished no batch for so long counts as lost

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a worker gets model and instances.

    Attributes:
        model: Folder of the model.
        instances: File of the instances.
        probe: A file that only those see who share the driver's disk.
        model_files: Content of the model folder, object reference; fetched only by those who do not.
        instance_data: The instances, likewise.
    """

    model: str
    instances: str
    probe: str
    model_files: list[Any]
    instance_data: list[Any]


class ShardWorker:
    """The actor: loads a model once and computes shard after shard; may stay for the next store.

    Args:
        use_gpu: Compute on this actor's GPU.
    """

    def __init__(self, use_gpu: bool = False) -> None:
        self.use_gpu = use_gpu

    def load(self, job: StoreJob, source: Source) -> bool:
        """Load model and instances.

        Args:
            job: What is built.
            source: Model and instances.

        Raises:
            UserError: They cannot be loaded, or are not those that the store is built for.
        """
        self.job = job
        self.shares_disk = Path(source.probe).is_file()
        if self.shares_disk:
            self.model = EarlyExitModel.from_pretrained(source.model)
            self.instances = Instances.open(source.instances)
        elif source.model_files:
            with tempfile.TemporaryDirectory(prefix="rl-exit-") as folder:
                for name, content in ray.get(source.model_files[0]).items():
                    (Path(folder) / name).write_bytes(content)
                self.model = EarlyExitModel.from_pretrained(folder)
            self.instances = ray.get(source.instance_data[0])
        else:
            raise RunError(f"a worker of the state store on {os.uname().nodename} does not see {source.model}")
        here = (model_fingerprint(self.model), self.instances.fingerprint)
        if here != (self.job.model, self.job.instances):
            raise RunError(
                f"{source.model}, {source.instances}: fingerprints {here}; the state store is built for "
                f"{(self.job.model, self.job.instances)}: were they changed meanwhile?"
            )
        if self.use_gpu:
            self.model.to("cuda")
        return True

    def build(self, index: int) -> Iterator[int | Columns]:
        """Compute a shard.

        Yields:
            Instances done with each batch; at last the columns, empty if this worker has written them.
        """
        columns = yield from compute_shard(self.job, index, self.model, self.instances)
        if self.shares_disk:
            self.job.write(index, columns)
            columns = {}
        yield columns


class StoreCrew:
    """Actors that build stores; they start with the first store and stay for the next until they are stopped.

    Args:
        num_workers: Most actors, of one CPU or GPU each.
        use_gpu: A GPU in place of the CPU.
        timeout: Seconds to wait for a place that others hold; default ``START_SECONDS``.
    """

    def __init__(self, num_workers: int, use_gpu: bool = False, timeout: float | None = None) -> None:
        self._num_workers, self._use_gpu = num_workers, use_gpu
        self._timeout = START_SECONDS if timeout is None else timeout
        self._workers: list[_Worker] = []

    def start(self) -> None:
        """Start the actors ahead of the first store, without waiting; for those that are kept and have their place."""
        self._workers += [_Worker(self._use_gpu) for _ in range(self._num_workers - len(self._workers))]

    def build(self, job: StoreJob, todo: list[int], model_path: Path, instances_path: Path) -> Iterator[int]:
        """Build shards.

        Args:
            job: What is built.
            todo: Numbers of the shards.
            model_path: Folder of the model.
            instances_path: File of the instances.

        Yields:
            Numbers of instances done; negative where a worker was lost with what it had done.

        Raises:
            RunError: No worker can be started, or a shard failed with three workers.
            UserError: What a worker found wrong with model or data.
        """
        if not todo:
            return
        count = min(self._num_workers, len(todo))
        new = max(0, count - len(self._workers))
        what = f"builders of the state store (store.num_workers={self._num_workers})"
        await_room(what, self._timeout, **{"gpus" if self._use_gpu else "cpus": new})
        self._workers += [_Worker(self._use_gpu) for _ in range(new)]
        with _source(job, model_path, instances_path) as source:
            pool = _Pool(job, source, todo, self._workers[:count], self._use_gpu)
            try:
                yield from pool.work()
            except BaseException:  # also when nobody asks for more
                self.stop()
                pool.stop()
                raise
            self._workers[:count] = pool.workers

    def stop(self) -> None:
        """End all actors."""
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []


@contextmanager
def _source(job: StoreJob, model_path: Path, instances_path: Path) -> Iterator[Source]:
    """Put everything where workers can get it."""
    store = Path(job.path)
    store.parent.mkdir(parents=True, exist_ok=True)
    probe = store.with_name(f".{store.name}.{uuid.uuid4().hex}.probe")
    probe.touch()
    model_path, instances_path = model_path.absolute(), instances_path.absolute()
    try:
        several = sum(node["Alive"] for node in ray.nodes()) > 1
        content, data = shipped(model_path, instances_path) if several else ([], [])
        yield Source(str(model_path), str(instances_path), str(probe), content, data)
    finally:
        probe.unlink(missing_ok=True)


def shipped(model_path: Path, instances_path: Path) -> tuple[list[Any], list[Any]]:
    """Model and instances in the object store, each reference in a list, so that Ray does not fetch it unasked."""
    files = {file.name: file.read_bytes() for file in model_path.iterdir() if file.is_file()}
    return [ray.put(files)], [ray.put(Instances.open(instances_path))]


class _Worker:
    """An actor and what is awaited from it: first that it is ready, then the parts of a shard."""

    def __init__(self, use_gpu: bool) -> None:
        needs = {"num_cpus": 0, "num_gpus": 1} if use_gpu else {"num_cpus": 1}
        self.actor = ray.remote(scheduling_strategy="SPREAD", **needs)(ShardWorker).remote(use_gpu)
        self.awaited: Any = None
        self.shard: int | None = None
        self.done = 0
        self.heard = time.monotonic()

    def load(self, job: StoreJob, source: Source) -> None:
        """Order to get ready for a store."""
        self.shard, self.done, self.heard = None, 0, time.monotonic()
        self.awaited = self.actor.load.remote(job, source)

    def begin(self, shard: int) -> None:
        """Order a shard."""
        self.shard, self.done, self.heard = shard, 0, time.monotonic()
        self.awaited = self.actor.build.options(num_returns="streaming").remote(shard)

    def hear(self) -> Any:
        """What has arrived: True (ready), a number of instances, or columns."""
        reference = self.awaited if self.shard is None else next(self.awaited)
        self.heard = time.monotonic()
        return ray.get(reference)


class _Pool:
    """Shards to workers, results to the disk."""

    def __init__(
        self, job: StoreJob, source: Source, todo: list[int], workers: Sequence[_Worker], use_gpu: bool
    ) -> None:
        self._job, self._source, self._use_gpu = job, source, use_gpu
        self._todo = deque(todo)
        self._open = set(todo)
        self._failures: Counter[int] = Counter()
        self.workers = list(workers)
        for worker in self.workers:
            worker.load(job, source)
        self._idle: list[_Worker] = []

    def work(self) -> Iterator[int]:
        """Until every shard is written."""
        while self._open:
            while self._idle and self._todo:
                self._idle.pop().begin(self._todo.popleft())
            busy = [worker for worker in self.workers if worker not in self._idle]
            awaited = [worker.awaited for worker in busy]
            arrived = {id(item) for item in ray.wait(awaited, num_returns=len(awaited), timeout=0.2)[0]}
            for worker in busy:
                if id(worker.awaited) in arrived:
                    yield from self._hear(worker)
                elif worker.shard is not None and time.monotonic() - worker.heard > SILENT_SECONDS:
                    yield from self._replace(worker, f"no batch was finished in {SILENT_SECONDS:.0f} s")
            self._check_start()

    def stop(self) -> None:
        """End all actors."""
        for worker in self.workers:
            ray.kill(worker.actor)

    def _hear(self, worker: _Worker) -> Iterator[int]:
        try:
            part = worker.hear()
        except RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, UserError) else error from None
        except RayError as error:
            yield from self._replace(worker, str(error).splitlines()[0])
            return
        if part is True:
            self._idle.append(worker)
        elif isinstance(part, dict):
            assert worker.shard is not None  # only a worker with a shard sends columns
            if part:
                self._job.write(worker.shard, part)
            self._open.discard(worker.shard)
            worker.shard = None
            self._idle.append(worker)
        else:
            worker.done += part
            yield part

    def _replace(self, worker: _Worker, reason: str) -> Iterator[int]:
        """Start another actor; the lost one's shard is the next to be built."""
        logger.warning("a worker of the state store was lost: %s", reason)
        ray.kill(worker.actor)
        key = -1 if worker.shard is None else worker.shard
        self._failures[key] += 1
        # Workers that are lost without a shard may have been kept on a node that is gone: as many as there are.
        if self._failures[key] >= ATTEMPTS * (len(self.workers) if key < 0 else 1):
            what = "a worker of the state store" if key < 0 else f"shard {key} of {self._job.path}"
            raise RunError(
                f"{what} was lost {self._failures[key]} times, the last time because: {reason}. If memory is short, "
                "lower store.batch_size, store.shard_size or store.num_workers"
            )
        if worker.shard is not None:
            self._todo.appendleft(worker.shard)
            yield -worker.done
        new = _Worker(self._use_gpu)
        new.load(self._job, self._source)
        self.workers[self.workers.index(worker)] = new

    def _check_start(self) -> None:
        """A pool that waits for its first worker does so for a limited time."""
        if any(worker.shard is not None for worker in self.workers) or self._idle:
            return
        if time.monotonic() - max(worker.heard for worker in self.workers) > START_SECONDS:
            raise RunError(
                f"no worker of the state store could be started in {START_SECONDS:.0f} s; the cluster has "
                f"{ray.cluster_resources().get('CPU', 0):g} CPUs, {ray.available_resources().get('CPU', 0):g} of them "
                f"free, and store.num_workers asks for {len(self.workers)}"
            )
