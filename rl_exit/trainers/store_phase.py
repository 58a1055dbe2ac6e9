"""One inference pass over a split: the state store that everything of the policy phase reads.

The unit of work is a shard, its batches sorted by length. Shards are computed in this process or by Ray actors
(:mod:`rl_exit.trainers.store_workers`), to the same content, and written beside the store's place; a build that was
killed goes on with the shards that are missing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from rl_exit.data.batching import length_sorted_batches
from rl_exit.data.instances import Instances
from rl_exit.envs.build import discard_partial, finish, write_shard, written_origins
from rl_exit.envs.shards import Layout, ShardOrigin
from rl_exit.envs.state_store import StateStore
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.progress import Progress
from rl_exit.trainers.supervised import exit_losses

if TYPE_CHECKING:
    from rl_exit.trainers.store_workers import StoreCrew

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class StoreJob:
    """What is built; plain values, so that it can be sent to workers.

    Attributes:
        path: Folder of the store.
        num_instances: N.
        layout: Shapes and storage type.
        shard_size: Instances per shard.
        batch_size: Instances per forward pass.
        instances: Fingerprint of the instances.
        model: Fingerprint of the model.
    """

    path: str
    num_instances: int
    layout: Layout
    shard_size: int
    batch_size: int
    instances: str
    model: str

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_instances // self.shard_size)

    def rows(self, index: int) -> range:
        """Instances of a shard."""
        return range(index * self.shard_size, min((index + 1) * self.shard_size, self.num_instances))

    def write(self, index: int, columns: Columns) -> None:
        """Write a shard beside the store's place."""
        write_shard(self.path, index, **columns, dtype=self.layout.dtype, instances=self.instances, model=self.model)


def build_store(
    model: EarlyExitModel,
    instances: Instances,
    path: Path,
    dtype: str,
    shard_size: int,
    batch_size: int,
    progress: Progress,
    *,
    num_workers: int = 0,
    model_path: Path | None = None,
    instances_path: Path | None = None,
    crew: StoreCrew | None = None,
) -> StateStore:
    """Write states, losses, correctness and logits of every layer, row i being instance i.

    The content does not depend on ``num_workers`` (on processors that compute alike, with equal numbers of threads).

    Args:
        model: Frozen model.
        instances: N instances.
        path: Folder of the store; one that is there is replaced.
        dtype: Storage of the states.
        shard_size: Instances per shard; a shard is also the unit of work, sorted by length inside.
        batch_size: Instances per forward pass.
        progress: Told the number of instances done.
        num_workers: Ray actors of one CPU each that share the work; 0 works in this process.
        model_path: Folder of the model; needed by workers.
        instances_path: File of the instances; needed by workers.
        crew: Workers that are kept for further stores, in place of ``num_workers`` for this one.

    Raises:
        RunError: Workers cannot be started, or a shard cannot be built.
        UserError: States that are not finite, no space on the device.
    """
    job = StoreJob(
        path=str(Path(path).absolute()),
        num_instances=len(instances),
        layout=Layout(model.num_layers, model.exits.hidden_size, model.config.num_labels, dtype),
        shard_size=shard_size,
        batch_size=batch_size,
        instances=instances.fingerprint,
        model=model_fingerprint(model),
    )
    todo = missing_shards(job)
    own = None
    if crew is None and num_workers:
        from rl_exit.trainers.store_workers import StoreCrew as Crew

        crew = own = Crew(num_workers)
    if crew is not None:
        if model_path is None or instances_path is None:
            raise ValueError("build_store: workers need model_path and instances_path")
        counts = crew.build(job, todo, Path(model_path), Path(instances_path))
    else:
        counts = _build_here(job, todo, model, instances)
    done = job.num_instances - sum(len(job.rows(index)) for index in todo)
    started, here = time.monotonic(), 0
    try:
        for count in counts:
            done, here = done + count, here + count
            progress.update(done, f"{here / max(1e-9, time.monotonic() - started):,.0f} instances/s")
    finally:
        if own is not None:
            own.stop()
    finish(job.path, job.num_shards, layout=job.layout, instances=job.instances, model=job.model)
    return StateStore.open(job.path)


def _build_here(job: StoreJob, todo: list[int], model: EarlyExitModel, instances: Instances) -> Iterator[int]:
    for index in todo:
        columns = yield from compute_shard(job, index, model, instances)
        job.write(index, columns)


def compute_shard(
    job: StoreJob, index: int, model: EarlyExitModel, instances: Instances
) -> Generator[int, None, Columns]:
    """Compute one shard batch by batch.

    Args:
        job: What is built.
        index: Number of the shard.
        model: Frozen model.
        instances: All N instances.

    Yields:
        Number of instances in the batch that has been done.

    Returns:
        The columns that :func:`~rl_exit.envs.build.write_shard` takes.
    """
    model.eval()
    device = next(model.parameters()).device
    rows = np.asarray(job.rows(index))
    layers, hidden, classes = job.layout.num_layers, job.layout.hidden_size, job.layout.num_classes
    states = np.empty((len(rows), layers, hidden), dtype=np.float32)
    logits = np.empty((len(rows), layers, classes), dtype=np.float32)
    for batch in length_sorted_batches(instances.lengths[rows], job.batch_size):
        with torch.inference_mode():
            out = model.all_exits(**{name: part.to(device) for name, part in instances.batch(rows[batch]).items()})
        states[batch] = out.states.float().cpu().numpy()
        logits[batch] = out.logits.float().cpu().numpy()
        yield len(batch)
    labels = np.array(instances.labels[rows])
    return {
        "ids": np.array(instances.ids[rows]),
        "labels": labels,
        "states": states,
        "losses": exit_losses(torch.from_numpy(logits), torch.from_numpy(labels)).numpy(),
        "correct": logits.argmax(-1) == labels[:, None],
        "logits": logits,
    }


def missing_shards(job: StoreJob) -> list[int]:
    """Shards that are still to be built; leftovers of another build are removed."""
    found = written_origins(job.path)
    for index, known in found.items():
        expected = ShardOrigin(index, job.layout, job.instances, job.model)
        if index >= job.num_shards or known != (expected, len(job.rows(index))):
            discard_partial(job.path)
            return list(range(job.num_shards))
    return [index for index in range(job.num_shards) if index not in found]


def model_fingerprint(model: EarlyExitModel) -> str:
    """First 16 hex digits of the SHA-256 of all weights that states and logits depend on (not the policy's)."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith(("policy.", "answer_heads.")):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
