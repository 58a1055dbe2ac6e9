"""Sampling actors behind one runner: who draws which blocks, and what happens when one of them is lost.

A runner owns groups of shards and maps only those, as long as it lives; if it dies, its blocks are drawn by the others,
to the same result, and once it is back it has them again. No block is drawn twice into a batch or missing from one.
"""

from __future__ import annotations

import logging
import mmap
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from rl_exit.envs.manifest import MANIFEST
from rl_exit.envs.sampler import Block
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import RunError, UserError
from rl_exit.method.sampling import Trajectories
from rl_exit.models.policy_arrays import Weights
from rl_exit.trainers.rllib.remote import SamplerActor, SamplerSettings

START_SECONDS = 120.0  # how long to wait for the first actor
RESTORE_SECONDS = 120.0  # how long to wait for an actor when none is left
STRAGGLER_SECONDS = 30.0  # after which a block is given to a second actor as well
ATTEMPTS = 20  # of drawing a block before its failure counts as the block's own

logger = logging.getLogger(__name__)


@dataclass
class Draw:
    """A draw under way.

    Attributes:
        blocks: What is wanted, in order.
        weights: Reference to the policy's weights.
        epsilon: Exploration.
    """

    blocks: Sequence[Block]
    weights: Any
    epsilon: float
    done: dict[int, Trajectories] = field(default_factory=dict)
    running: dict[Any, tuple[int, list[Block], float]] = field(default_factory=dict)
    attempts: int = 0

    @property
    def open(self) -> list[Block]:
        """Blocks that nobody is drawing."""
        busy = {block.number for _, blocks, _ in self.running.values() for block in blocks}
        return [block for block in self.blocks if block.number not in self.done and block.number not in busy]


class SamplerPool:
    """A number of sampling actors, each with one CPU, over the nodes of the cluster.

    Args:
        count: Number of actors.
        store: The state store, which this process can read.
        settings: Passed on; ``path`` and ``manifest`` are filled in here.
        groups: Groups of shards in the plan.
        **settings: The rest of :class:`~rl_exit.trainers.rllib.remote.SamplerSettings`.
    """

    def __init__(self, count: int, store: StateStore, groups: int, **settings: Any) -> None:
        self._store = store
        self._groups = groups
        manifest = (store.path / MANIFEST).read_text(encoding="utf-8")
        # Restarted for ever: an actor's end is not its own fault but a node's. One thread: see docs/performance.md.
        remote = ray.remote(
            num_cpus=1,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}},
        )(SamplerActor)
        told = SamplerSettings(path=str(store.path), manifest=manifest, **settings)
        self.actors = [remote.remote(told) for _ in range(count)]
        self._alive: dict[int, bool] = {}  # number of the actor -> whether it reads the store by its path
        self._greetings: dict[Any, int] = {}
        self._objects: dict[int, Any] = {}
        for number in range(count):
            self._greet(number)

    def wait(self, count: int | None = None, seconds: float = START_SECONDS) -> None:
        """Wait until so many actors (default all) are up.

        Raises:
            RunError: They are not after so long.
        """
        wanted = len(self.actors) if count is None else count
        deadline = time.monotonic() + seconds
        while len(self._alive) < wanted:
            if time.monotonic() > deadline:
                raise RunError(self._missing(seconds))
            self._listen(Draw([], None, 0.0), 1.0)

    def submit(self, blocks: Sequence[Block], weights: Any, epsilon: float) -> Draw:
        """Start drawing blocks.

        Args:
            blocks: Which.
            weights: Reference (``ray.put``) to the weights of the policy.
            epsilon: Exploration.
        """
        draw = Draw(blocks, weights, epsilon)
        self._listen(draw, 0.0)
        self._assign(draw)
        return draw

    def collect(self, draw: Draw) -> list[Trajectories]:
        """Wait for a draw; its blocks in order.

        Raises:
            RunError: No actor is left and none comes back, or a block cannot be drawn.
        """
        limit = RESTORE_SECONDS if self._alive else START_SECONDS
        deadline = time.monotonic() + limit
        while len(draw.done) < len(draw.blocks):
            self._assign(draw)
            if draw.running:
                deadline = time.monotonic() + limit
            elif time.monotonic() > deadline:
                raise RunError(self._missing(limit))
            self._listen(draw, 1.0)
            self._hedge(draw)
        return [draw.done[block.number] for block in draw.blocks]

    def sample(self, blocks: Sequence[Block], weights: Weights | Any, epsilon: float) -> list[Trajectories]:
        """Draw blocks and wait for them; ``weights`` as arrays or as a reference to them."""
        reference = weights if isinstance(weights, ray.ObjectRef) else ray.put(dict(weights))
        return self.collect(self.submit(blocks, reference, epsilon))

    def usage(self) -> list[dict[str, Any]]:
        """:meth:`SamplerActor.usage <rl_exit.trainers.rllib.remote.SamplerActor.usage>` of every actor that is up."""
        return ray.get([self.actors[number].usage.remote() for number in sorted(self._alive)])

    def stop(self) -> None:
        """End the actors."""
        for actor in self.actors:
            ray.kill(actor)
        self._alive.clear()
        self._greetings.clear()
        self._objects.clear()

    def _greet(self, number: int) -> None:
        # The answer comes when the actor is up, also after a restart.
        self._greetings[self.actors[number].hello.options(max_task_retries=-1).remote()] = number

    def _assign(self, draw: Draw) -> None:
        """Give open blocks to their owners, or to whoever is up in their place."""
        blocks = draw.open
        if not blocks or not self._alive:
            return
        if draw.attempts >= ATTEMPTS:
            raise RunError(f"blocks {[block.number for block in blocks]} could not be drawn in {ATTEMPTS} attempts")
        draw.attempts += 1
        shares: dict[int, list[Block]] = defaultdict(list)
        turns: dict[int, int] = defaultdict(int)
        for block in blocks:
            owners = self._owners(block.group)
            shares[owners[turns[block.group] % len(owners)]].append(block)
            turns[block.group] += 1
        for number, share in shares.items():
            self._send(draw, number, share)

    def _owners(self, group: int) -> list[int]:
        """Actors for a group of shards: its owners if one of them is up, otherwise any."""
        count = len(self.actors)
        owners = [group % count] if count <= self._groups else list(range(group, count, self._groups))
        present = [number for number in owners if number in self._alive]
        if present:
            return present
        others = sorted(self._alive)
        return [others[group % len(others)]] if self._groups > 1 else others

    def _send(self, draw: Draw, number: int, blocks: list[Block]) -> None:
        shards = None
        if not self._alive[number]:
            touched = self._store.shards_of(np.concatenate([block.rows for block in blocks]))
            shards = {index: self._object(index) for index in touched}
        reference = self.actors[number].draw.remote(draw.weights, blocks, draw.epsilon, shards)
        draw.running[reference] = (number, blocks, time.monotonic())

    def _object(self, index: int) -> Any:
        """A shard's bytes in Ray's object store, put there when first asked for."""
        if index not in self._objects:
            with (
                (self._store.path / self._store.shards[index].file).open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
            ):
                data = np.frombuffer(view, dtype=np.uint8)
                self._objects[index] = ray.put(data)
                del data
        return self._objects[index]

    def _listen(self, draw: Draw, seconds: float) -> None:
        """Take in what has come, or comes within so many seconds."""
        waiting = [*draw.running, *self._greetings]
        if not waiting:
            return
        ready, _ = ray.wait(waiting, num_returns=1, timeout=seconds)
        for reference in ready:
            if reference in self._greetings:
                self._greeted(reference)
            else:
                self._drawn(draw, reference)

    def _greeted(self, reference: Any) -> None:
        number = self._greetings.pop(reference)
        try:
            self._alive[number] = ray.get(reference)
        except RayActorError as error:
            raise RunError(f"sampling runner {number} cannot start: {_reason(error)}") from None
        except RayError:
            self._greet(number)

    def _drawn(self, draw: Draw, reference: Any) -> None:
        number, blocks, _ = draw.running.pop(reference)
        try:
            columns = ray.get(reference)
        except RayTaskError as error:
            if not isinstance(error.cause, RayError):
                raise RunError(f"sampling runner {number} failed: {_reason(error)}") from error
            self._lose(number, blocks)  # a shard was lost on its way
        except RayError:
            self._lose(number, blocks)
        else:
            for block, (exit_layer, log_prob, reward) in zip(blocks, columns, strict=True):
                draw.done[block.number] = Trajectories(block.rows, exit_layer, log_prob, reward)

    def _lose(self, number: int, blocks: list[Block]) -> None:
        logger.warning("sampling runner %d was lost: its %d blocks are drawn again by others", number, len(blocks))
        if self._alive.pop(number, None) is not None:
            self._greet(number)

    def _hedge(self, draw: Draw) -> None:
        """Give blocks that take too long to a second actor as well; the first answer counts, they are equal."""
        now = time.monotonic()
        for number, blocks, since in list(draw.running.values()):
            others = [other for other in sorted(self._alive) if other != number]
            late = [block for block in blocks if block.number not in draw.done]
            copies = sum(blocks[0].number == other[0].number for _, other, _ in draw.running.values())
            if late and others and copies == 1 and now - since > STRAGGLER_SECONDS:
                self._send(draw, others[blocks[0].number % len(others)], blocks)

    def _missing(self, seconds: float) -> str:
        have, free = (pool.get("CPU", 0.0) for pool in (ray.cluster_resources(), ray.available_resources()))
        return (
            f"{len(self._alive)} of {len(self.actors)} sampling runners are up after {seconds:.0f} s; each needs a "
            f"CPU, the cluster has {have:g}, of which {free:g} are free (sampling.num_env_runners)"
        )


def _reason(error: Exception) -> str:
    """The message for the user inside Ray's exception, or its last line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return str(cause)
    return str(error).strip().splitlines()[-1]


def idle_worker_megabytes() -> float:
    """Private memory of a Ray worker that does nothing, to compare runners with."""

    def measure() -> float:
        with open("/proc/self/status") as status:  # noqa: PTH123  (nothing is imported that an idle worker has not)
            return next(float(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith("RssAnon"))

    return float(ray.get(ray.remote(num_cpus=0, max_calls=1)(measure).remote()))
