"""Ray Train workers that stay: one long fit, to which trainings are handed round by round.

Starting a group of Ray Train workers costs many seconds, a training handed to one that is up costs none. The driver
lays an order on a *desk* (a small actor on its own node); every worker asks the desk for the next one. Nothing is lost
with anyone: the desk is told the order again with every look of the driver, workers go on from the training's
checkpoint, and letters of progress that come twice are dropped by their number.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl_exit.errors import RunError, UserError
from rl_exit.trainers.placement import await_room

START_SECONDS = 180.0  # for workers that have their place to be up
LOOK_SECONDS = 0.2  # between two looks of the driver at the desk
PING_SECONDS = 1.0  # between two signs of life of a worker
ATTEMPTS = 4  # at a training without any progress between them
REPORT_EVERY = 10
REPORT_SECONDS = 2.0
LONG_POLL_SECONDS = 5.0

Outcome = tuple[UserError | None]
Letter = tuple[int, int, float, dict[str, float]]
OnUpdate = Callable[[int, int, float, dict[str, float]], None]
Train = Callable[[dict[str, Any], OnUpdate, int, int], None]
"""Does an order: (payload, where to report, rank, number of ranks)."""

logger = logging.getLogger(__name__)


class Desk:
    """The actor between driver and workers. Loses nothing that matters when it is started anew.

    Driver and workers say again with every call what must not be lost: the order, and how the last one ended.
    """

    def __init__(self) -> None:
        self._number, self._over = 0, False
        self._payload: dict[str, Any] | None = None
        self._letters: list[tuple[int, Letter]] = []
        self._outcomes: dict[int, Outcome] = {}
        self._heard: dict[int, float] = {}
        self._groups: dict[int, Any] = {}
        self._taken, self._losses = 0, 0
        self._trouble = ""

    async def look(self, number: int, payload: dict[str, Any] | None, over: bool) -> dict[str, Any]:
        """The driver's look: says what is ordered, takes what has come."""
        if number != self._number:
            self._letters, self._losses = [], 0
        self._number, self._payload, self._over = number, payload, over
        letters, self._letters = self._letters, []
        now = time.monotonic()
        return {
            "letters": [letter for at, letter in letters if at == number],
            "outcome": self._outcomes.get(number),
            "silent": {rank: now - heard for rank, heard in self._heard.items()},
            "losses": self._losses,
            "trouble": self._trouble,
        }

    async def hello(self, rank: int) -> None:
        """A worker has started; if it has begun this order before, it was lost."""
        self._heard[rank] = time.monotonic()
        open_again = self._taken == self._number and self._number not in self._outcomes
        self._losses += rank == 0 and open_again

    async def ping(self, rank: int, group: Any) -> bool:
        """A worker lives, and in which placement group; whether all is over."""
        self._heard[rank], self._groups[rank] = time.monotonic(), group
        return self._over

    async def groups(self) -> list[Any]:
        """The placement groups that workers were last heard from; those of before are forgotten."""
        groups, self._groups = self._groups, {}
        return [group for group in groups.values() if group is not None]

    async def next(self, done: int, outcome: Outcome | None) -> tuple[int, dict[str, Any] | None] | None:
        """The order after ``done``; its payload is None when all is over. None: ask again.

        ``outcome`` is that of ``done``, from the worker that has to tell it. An order that has ended is not given to
        workers that were started anew.
        """
        if outcome is not None:
            self._outcomes.setdefault(done, outcome)
        for _ in range(int(LONG_POLL_SECONDS / 0.1)):
            if self._over:
                return self._number, None
            if self._payload is not None and self._number > done and self._number not in self._outcomes:
                self._taken = self._number
                return self._number, self._payload
            await asyncio.sleep(0.1)
        return None

    async def put(self, number: int, letters: list[Letter]) -> None:
        """Progress of an order."""
        self._letters += [(number, letter) for letter in letters]

    async def tell(self, trouble: str) -> None:
        """Why a worker is about to end."""
        self._trouble = trouble


@dataclass
class TrainCrew:
    """A group of Ray Train workers and its long fit; started by the first training.

    Attributes:
        num_workers: Workers, each with one CPU or GPU.
        use_gpu: A GPU in place of the CPU.
        storage: Folder for what Ray Train itself writes; seen by all nodes.
        train: Does an order, in the workers.
        timeout: Seconds to wait for a place that others hold.
    """

    num_workers: int
    use_gpu: bool
    storage: Path
    train: Train
    timeout: float = 120.0
    _desk: Any = None
    _fit: threading.Thread | None = None
    _failure: BaseException | None = None
    _number: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def do(self, payload: dict[str, Any], on_update: OnUpdate) -> None:
        """Have a training done.

        Args:
            payload: What ``train`` takes; plain values.
            on_update: Called here as it goes on; every update once and in order.

        Raises:
            UserError: What the training raised for the user, workers that find no place, or are lost again and again.
        """
        if self._fit is None:
            self._start()
        self._number += 1
        try:
            self._await(payload, on_update)
        except UserError:
            self.stop()  # other ranks may wait for one that is gone
            raise

    def stop(self) -> None:
        """End the workers and give their resources back."""
        import ray

        if self._fit is None:
            return
        self._over.set()
        deadline = time.monotonic() + 60.0
        try:
            while self._fit.is_alive() and time.monotonic() < deadline:
                ray.get(self._desk.look.remote(self._number, None, True), timeout=30.0)
                self._fit.join(timeout=0.2)
            ray.kill(self._desk)
        except Exception as error:  # noqa: BLE001  (the cluster itself may be gone)
            logger.warning("the workers of Ray Train were not ended in order: %s", error)
        self._fit, self._desk = None, None

    def _start(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        what = f"Ray Train workers (task_step.num_workers={self.num_workers})"
        await_room(what, self.timeout, **{"gpus" if self.use_gpu else "cpus": self.num_workers})
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Desk)
        self._desk, self._failure, self._over = remote.remote(), None, threading.Event()
        self._fit = threading.Thread(target=self._run_fit, args=(self._desk, self._over), daemon=True)
        self._fit.start()

    def _run_fit(self, desk: Any, over: threading.Event) -> None:
        """The long fit; begun anew if its controller is lost."""
        from ray.exceptions import RayActorError
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        logging.getLogger("ray.train").setLevel(logging.ERROR)
        for attempt in range(ATTEMPTS):
            trainer = TorchTrainer(
                work_at_desk,
                train_loop_config={"desk": desk, "train": self.train},
                scaling_config=ScalingConfig(num_workers=self.num_workers, use_gpu=self.use_gpu),
                # The same name resumes silently, so every fit has its own. The number of failures is limited by us,
                # for each training: a long run may see many nodes go.
                run_config=RunConfig(
                    name=f"fit-{uuid.uuid4().hex[:8]}",
                    storage_path=str(self.storage.absolute()),
                    failure_config=FailureConfig(max_failures=-1),
                ),
            )
            try:
                trainer.fit()
                return
            except RayActorError as error:
                logger.warning("the controller of Ray Train was lost (%d): %s", attempt + 1, error)
                self._failure = error
                _give_back_places(desk)
            except BaseException as error:  # noqa: BLE001  (handed to the thread that waits)
                self._failure = error
                return
            if over.is_set():
                return

    def _await(self, payload: dict[str, Any], on_update: OnUpdate) -> None:
        import ray

        seen, losses, begun = 0, 0, time.monotonic()
        fit = self._fit
        assert fit is not None
        while True:
            at = ray.get(self._desk.look.remote(self._number, payload, False))
            for letter in at["letters"]:
                if letter[0] > seen:  # what was done again after a fault is not told again
                    seen = letter[0]
                    losses = at["losses"]
                    on_update(*letter)
            if at["outcome"] is not None:
                (error,) = at["outcome"]
                if error is not None:
                    raise error
                return
            if not fit.is_alive():
                raise RunError(f"Ray Train ended before the training was done: {_last_line(self._failure)}")
            if at["losses"] - losses >= ATTEMPTS:
                raise RunError(
                    f"the workers of Ray Train were lost {at['losses'] - losses} times without any progress between: "
                    f"{at['trouble'] or 'they were killed'}. If memory is short, lower task_step.batch_size, "
                    "init.batch_size or task_step.num_workers"
                )
            self._check_alive(at["silent"], begun)
            time.sleep(LOOK_SECONDS)

    def _check_alive(self, silent: dict[int, float], begun: float) -> None:
        """Workers that never come, or never come back, are waited for a limited time."""
        import ray

        waited = min([time.monotonic() - begun, *silent.values()])
        limit = START_SECONDS + self.timeout
        if waited > limit:
            kind = "GPU" if self.use_gpu else "CPU"
            have, free = ray.cluster_resources().get(kind, 0), ray.available_resources().get(kind, 0)
            raise RunError(
                f"no worker of Ray Train is up after {waited:.0f} s; each needs a {kind}, task_step.num_workers asks "
                f"for {self.num_workers}, and the cluster has {have:g}, of which {free:g} are free"
            )


def _give_back_places(desk: Any) -> None:
    """Remove what a lost controller had reserved for its workers.

    Ray keeps it until the job ends. Ray Train has an actor that does this, but that one asks Ray's dashboard, which a
    session on one machine does not have; without the place the next fit would wait for ever.
    """
    import ray
    from ray.util.placement_group import remove_placement_group

    try:
        for group in ray.get(desk.groups.remote(), timeout=30.0):
            remove_placement_group(group)
    except Exception as error:  # noqa: BLE001  (the next fit tells if there is no place)
        logger.warning("the place of lost workers was not given back: %s", error)


def work_at_desk(config: dict[str, Any]) -> None:
    """The loop of one worker: training after training, until all is over."""
    import ray
    import ray.train

    context = ray.train.get_context()
    rank, world, desk = context.get_world_rank(), context.get_world_size(), config["desk"]
    ray.get(desk.hello.remote(rank))
    threading.Thread(target=_give_signs_of_life, args=(desk, rank), daemon=True).start()
    done = 0
    outcome: Outcome | None = None
    while True:
        order = ray.get(desk.next.remote(done, outcome))
        if order is None:
            continue
        number, payload = order
        if payload is None:
            return
        error: UserError | None = None
        post = _Post(desk, number)
        try:
            config["train"](dict(payload), post.report if rank == 0 else _say_nothing, rank, world)
        except UserError as told:
            error = told
        except BaseException:
            # Perhaps a peer was lost; Ray Train starts all workers anew, and the driver counts how often.
            ray.get(desk.tell.remote(_last_line_of(traceback.format_exc())))
            raise
        post.send()
        done, outcome = number, (error,) if rank == 0 or error is not None else None
        gc.collect()


class _Post:
    """Collects letters of progress, so that not every update costs a call."""

    def __init__(self, desk: Any, number: int) -> None:
        self._desk, self._number = desk, number
        self._unsent: list[Letter] = []
        self._sent = time.monotonic()

    def report(self, done: int, total: int, epoch: float, values: dict[str, float]) -> None:
        self._unsent.append((done, total, epoch, values))
        if len(self._unsent) >= REPORT_EVERY or time.monotonic() - self._sent > REPORT_SECONDS:
            self.send()

    def send(self) -> None:
        if self._unsent:
            self._desk.put.remote(self._number, self._unsent)
        self._unsent, self._sent = [], time.monotonic()


def _say_nothing(done: int, total: int, epoch: float, values: dict[str, float]) -> None:
    return


def _give_signs_of_life(desk: Any, rank: int) -> None:
    """Runs beside the training; ends a process that is still at work (or stuck) long after all is over."""
    import ray
    from ray.util.placement_group import get_current_placement_group

    over, group = 0, get_current_placement_group()
    while True:
        try:
            over += bool(ray.get(desk.ping.remote(rank, group), timeout=60.0))
        except Exception:  # noqa: BLE001  (the desk may be gone for good, and with it the driver)
            return
        if over > 5:
            os._exit(1)
        time.sleep(PING_SECONDS)


def _last_line(error: BaseException | None) -> str:
    return _last_line_of(str(error)) if error is not None else "without a reason"


def _last_line_of(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "without a reason"
