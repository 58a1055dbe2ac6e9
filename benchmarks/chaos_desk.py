"""The ground of benchmarks/chaos.py: a cluster of this machine, undisturbed runs, and drivers that meet with harm."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Ray gives its workers the lowest priority but four; on a machine shared with other work they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")  # 60 by default: how long to wait for a head
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # only processes that are needed
ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

NODES, NODE_CPUS = 2, 5  # beside a head without CPUs
NODE_SECONDS = 3.0  # after which a lost node is replaced
SNAPSHOT_SECONDS = 0.5  # between two snapshots of the policy phase, in place of 30 s: a phase takes no longer here
WORDS = [
    "name=tiny",
    "task.name=local",
    "model.policy_width=8",
    "init.epochs=4",
    "init.lr=1e-3",
    "init.batch_size=16",
    "policy.epochs=6",
    "policy.batch_size=64",
    "policy.holdout=0",
    "task_step.batch_size=16",
    "task_step.epochs=4",
    "alternation.rounds=1",
    "alternation.patience=9",
    "store.shard_size=128",
    "store.batch_size=16",
    "placement.timeout=600",  # a loaded machine is no fault
]
SPREAD = [
    "sampling.num_env_runners=2",
    "learners.num_learners=1",
    "store.num_workers=2",
    "task_step.num_workers=2",
]
KEPT = ("store.num_workers", "task_step.num_workers")
# Role -> how the titles of its processes begin. Ray names a process by the class of its actor, and while a method runs
# by class and method; workers of Ray Train and learners that have been handed a function by that, until the next.
TITLES = {
    "env runner": r"ray::SamplerActor\b",
    "learner": r"ray::(_WrappedExecutable\b|_RayTrainWorker__execute\.)",
    "store builder": r"ray::ShardWorker\b",
    "Train worker": r"ray::(RayTrainWorker\b|execute\.)",
    "controller": r"ray::TrainController\b",
    "desk": r"ray::Desk\b",
}
# Where in a run harm is done: in steps whose title begins so.
PLACES = {
    "init": "initialisation",
    "store": "round 1: states of train",
    "policy": "round 1: policy",
    "task": "round 1: task step",
}


Place = tuple[str, float]
"""A key of ``PLACES``, and a share or the progress of the step."""


class MissedError(RuntimeError):
    """The harm could not be done."""


@dataclass
class Hit:
    """One harm of a run: in the middle of what, and what came of it.

    Attributes:
        fault: Name of the fault.
        place: Key of ``PLACES``.
        after: Share of the step after which it is done.
        harm: Does it; takes the progress of the step.
        harmed: When it was done (``time.monotonic``), at what progress.
        passed: When the run was past that.
        stalled: Longest time without new progress since, to the end of the step or the next harm in it.
        facts: What the record says besides.
    """

    fault: str
    place: str
    after: float
    harm: Callable[[float], None] = lambda _: None
    harmed: tuple[float, float] | None = None
    passed: float | None = None
    stalled: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    best: float = 0.0
    since: float = 0.0
    closed: bool = False

    def begin(self, when: float, done: float) -> None:
        """The harm is done."""
        self.harmed, self.best, self.since = (when, done), done, when

    def again(self) -> None:
        """The step is done again: what it had done since the harm was not believed."""
        if self.harmed is not None and not self.closed:
            self.passed, self.best, self.since = None, self.harmed[1], self.harmed[0]

    def progress(self, now: float, done: float) -> None:
        """The step has got so far."""
        if self.harmed is None or self.closed or done <= self.best:
            return
        self.stalled = max(self.stalled, now - self.since)
        self.best, self.since = done, now
        self.passed = self.passed or now

    def end(self, now: float, closed: bool) -> None:
        """The step has ended, or the next harm is done."""
        if self.harmed is not None and not self.closed:
            self.stalled = max(self.stalled, now - self.since)
            self.passed = self.passed or now
            self.closed = closed

    @property
    def lost(self) -> float | None:
        """Seconds that were lost."""
        if self.harmed is None or self.passed is None:
            return None
        return round(self.stalled or self.passed - self.harmed[0], 2)


class Watched:
    """A display that does harm at the places of a run, in their order, and notes when the run is past each."""

    def __init__(self, hits: Sequence[Hit] = ()) -> None:
        self.hits = hits

    def say(self, message: str) -> None:
        return

    @contextmanager
    def step(self, title: str, total: float) -> Iterator[Any]:
        here = [hit for hit in self.hits if title.startswith(PLACES[hit.place])]
        for hit in here:
            hit.again()
        yield _Bar(here, total)
        for hit in here:
            hit.end(time.monotonic(), closed=False)


class _Bar:
    """Progress of one step, with the harm that is done in it."""

    def __init__(self, hits: Sequence[Hit], total: float) -> None:
        self.hits, self.total = hits, total

    def update(self, done: float, note: str = "") -> None:
        now = time.monotonic()
        for hit in self.hits:
            hit.progress(now, done)
        following = next((hit for hit in self.hits if hit.harmed is None), None)
        if following is not None and done >= following.after * self.total:
            for earlier in self.hits:
                earlier.end(now, closed=True)
            following.harm(done)
            following.begin(now, done)


@dataclass(frozen=True)
class Process:
    """A process of a role, and the raylet that it belongs to."""

    pid: int
    raylet: int
    title: str
    begun: int


class Desk:
    """Folders, cluster and undisturbed runs of a chaos session."""

    def __init__(self, folder: Path) -> None:
        from conftest import write_tiny_backbone, write_tiny_task

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        if not (folder / "task").exists():
            write_tiny_backbone(folder / "backbone")
            write_tiny_task(folder / "task", {"train": 1024, "dev": 64, "test": 64})
        self.cluster: Any = None
        # Drivers of their own are forked from a process that has everything loaded and has never started Ray.
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload(["chaos_desk", "ray.train.torch", "rl_exit.trainers.alternation"])
        os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)

    def start_cluster(self) -> None:
        from ray.cluster_utils import Cluster

        for attempt in range(5):  # on a busy machine a node may need longer to start than Ray waits
            try:
                own = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False}
                self.cluster = Cluster(initialize_head=True, head_node_args=own)
                break
            except Exception:
                if attempt == 4:
                    raise
        self.fill()

    def fill(self, from_thread: bool = False) -> None:
        """Have all nodes beside the head; beside the main thread, which alone may have a node end with the process."""
        for _ in range(10):
            if len(self.cluster.worker_nodes) >= NODES:
                return
            self.cluster._shutdown_at_exit = not from_thread  # stop_cluster ends it all the same
            try:
                self.cluster.add_node(num_cpus=NODE_CPUS)
            except Exception as error:  # noqa: BLE001  (see start_cluster)
                print(f"a node did not start: {error}", flush=True)
            finally:
                self.cluster._shutdown_at_exit = True

    def stop_cluster(self) -> None:
        import ray

        if self.cluster is None:
            return
        ray.shutdown()
        cluster, self.cluster = self.cluster, None
        try:
            cluster.shutdown()
        finally:
            kill_all(cluster)

    def join(self, kind: str) -> None:
        """Connect this process to all nodes; a run in one process needs neither."""
        import ray

        if kind == "local":
            return
        self.stand()
        if not ray.is_initialized():
            ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")

    def stand(self) -> None:
        """Have a cluster with all its nodes."""
        if self.cluster is None:
            self.start_cluster()
        self.fill()

    def whole(self, kind: str) -> Path:
        """The undisturbed run of a kind."""
        output = self.folder / f"whole-{kind}"
        if not (output / "tiny" / "results.json").is_file():
            self.join(kind)
            go_on(self.folder, kind, output, Watched())
        return output / "tiny"

    def raylets(self) -> dict[int, Any]:
        """Process of every raylet of this session -> its node."""
        nodes = [*self.cluster.worker_nodes, self.cluster.head_node]
        return {node.all_processes["raylet"][0].process.pid: node for node in nodes}

    def roles(self, role: str) -> list[Process]:
        """The processes at work in a role, the last begun last; those of this session's own nodes only."""
        raylets = self.raylets()
        found = [child for child in children(set(raylets)) if re.match(TITLES[role], child.title)]
        if not found:
            titles = sorted({child.title for child in children(set(raylets))})
            raise MissedError(f"no process is at work as {role}; there are {titles}")
        return sorted(found, key=lambda process: (process.begun, process.pid))

    def start_driver(self, output: Path, past: Place | None, harm: Place | None, dies: bool) -> Any:
        """A driver as a process of its own; see :func:`drive`."""
        driver = self.forks.Process(
            target=drive, args=(str(self.folder), str(output), self.cluster.address, past, harm, dies)
        )
        driver.start()
        return driver


def children(parents: set[int]) -> list[Process]:
    """Ray's processes below some others."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError, ValueError):
            stat = (entry / "stat").read_text().rsplit(")", 1)[1].split() if entry.name.isdigit() else []
            if not stat or int(stat[1]) not in parents or stat[0] == "Z":
                continue
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if title.startswith("ray::"):
                found.append(Process(int(entry.name), int(stat[1]), title, int(stat[19])))
    return found


def kill_all(cluster: Any) -> None:
    """End what is left of a cluster: the processes of its nodes, and nothing else."""
    nodes = [*cluster.worker_nodes, *([cluster.head_node] if cluster.head_node is not None else [])]
    for info in [info for node in nodes for infos in node.all_processes.values() for info in infos]:
        with contextlib.suppress(OSError):
            info.process.kill()


def words(folder: Path, kind: str, output: Path) -> list[str]:
    """Configuration of a run: ``spread`` over a cluster, or ``local``."""
    return [
        *WORDS,
        *(SPREAD if kind == "spread" else []),
        f"task.path={folder / 'task'}",
        f"model.backbone={folder / 'backbone'}",
        f"output_dir={output}",
    ]


def go_on(folder: Path, kind: str, output: Path, display: Any) -> None:
    """Go on with the run in this process; begin it if there is none."""
    from rl_exit.config import load_config
    from rl_exit.trainers import policy_phase
    from rl_exit.trainers.alternation import train

    policy_phase.CHECKPOINT_SECONDS = SNAPSHOT_SECONDS
    train(load_config(None, words(folder, kind, output)), display, resume=True, kept=KEPT)


def drive(folder: str, output: str, address: str, past: Place | None, harm: Place | None, dies: bool) -> None:
    """A driver's own process.

    Args:
        folder: Of the desk.
        output: Of the run.
        address: Of the cluster.
        past: Where the driver before it was lost, and at what progress: tells when it is past that.
        harm: Where it tells that it is there, and after what share of the step.
        dies: Whether it kills itself there.
    """
    import ray

    log = os.open(Path(output) / "driver.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")

    def tell(what: str, done: float) -> None:
        with (Path(output) / "events").open("a") as events:
            events.write(json.dumps({"what": what, "done": done, "at": time.monotonic()}) + "\n")

    def harmed(done: float) -> None:
        tell("harm", done)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1.0)  # the harm is done meanwhile

    hits = [] if harm is None else [Hit("", *harm, harm=harmed)]
    go_on(Path(folder), "spread", Path(output), Passing(hits, past, tell))


class Passing(Watched):
    """Tells once when a resumed run is past where the one before was."""

    def __init__(self, hits: Sequence[Hit], past: Place | None, tell: Callable[[str, float], None]) -> None:
        super().__init__(hits)
        self.past, self.tell = past, tell

    @contextmanager
    def step(self, title: str, total: float) -> Iterator[Any]:
        with super().step(title, total) as bar:
            here = self.past is not None and title.startswith(PLACES[self.past[0]])
            if not here:  # that step is done
                self.is_past(float("inf"))
            yield _PassingBar(self, bar) if here else bar
            if here:
                self.is_past(float("inf"))

    def is_past(self, done: float) -> None:
        if self.past is not None and done > self.past[1]:
            self.past = None
            self.tell("passed", done)


class _PassingBar:
    def __init__(self, passing: Passing, bar: _Bar) -> None:
        self.passing, self.bar = passing, bar

    def update(self, done: float, note: str = "") -> None:
        self.passing.is_past(done)
        self.bar.update(done, note)


class Watchdog:
    """Ends a trial that hangs: calls ``give_up`` beside it after so many seconds, unless the block has ended."""

    def __init__(self, seconds: float, give_up: Callable[[], None]) -> None:
        self._timer = threading.Timer(seconds, give_up)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
