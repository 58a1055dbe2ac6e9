"""The ground of benchmarks/chaos.py: a cluster of this machine, undisturbed runs, and drivers that meet with harm."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

NODES, NODE_CPUS = 3, 2  # beside a head without CPUs
NODE_SECONDS = 3.0  # after which a lost node is replaced
SNAPSHOT_SECONDS = 0.5  # between two snapshots of the policy phase, in place of 30 s: a trial takes no longer
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
]
SPREAD = ["sampling.num_env_runners=2", "learners.num_learners=1", "store.num_workers=2"]
TRAINED = ["task_step.num_workers=2"]
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


@dataclass(frozen=True)
class Place:
    """Where in a run harm is done: which run, before which step it is taken up, and after what share of what."""

    kind: str
    step: str
    title: str
    after: float = 0.4


PLACES = {
    "init": Place("trained", "init", "initialisation"),
    "task": Place("trained", "round-1-task", "round 1: task step"),
    "store": Place("spread", "round-2-store", "round 2: states of train", 0.3),
    "policy": Place("spread", "round-2-policy", "round 2: policy"),
    "local init": Place("local", "init", "initialisation"),
    "local store": Place("local", "round-2-store", "round 2: states of train"),
    "local task": Place("local", "round-1-task", "round 1: task step"),
}


class MissedError(RuntimeError):
    """The harm could not be done."""


class Watched:
    """A display that calls ``harm`` at the place, and notes when the run has passed it."""

    def __init__(self, place: Place | None, harm: Callable[[float], None] = lambda _: None) -> None:
        self.place, self.harm = place, harm
        self.harmed: tuple[float, float] | None = None  # when, at what progress
        self.passed: float | None = None
        self.stalled = 0.0  # longest time without new progress since the harm
        self.best, self.since = 0.0, 0.0
        self.facts: dict[str, Any] = {}  # what the trial's record says besides

    def say(self, message: str) -> None:
        return

    def hit(self, when: float, done: float) -> None:
        """The harm is done."""
        self.harmed, self.best, self.since = (when, done), done, when

    @contextmanager
    def step(self, title: str, total: float) -> Iterator[Any]:
        here = self.place is not None and title.startswith(self.place.title)
        if here and self.harmed is not None:
            # The step is done again: what it had done since the harm was not believed.
            self.passed, self.best, self.since = None, self.harmed[1], self.harmed[0]
        yield _Bar(self, total) if here else _Bar(None, total)
        if here and self.harmed is not None:
            self.stalled = max(self.stalled, time.monotonic() - self.since)
            self.passed = self.passed or time.monotonic()


class _Bar:
    """Progress of one step; ``watched`` is None where nobody looks."""

    def __init__(self, watched: Watched | None, total: float) -> None:
        self.watched, self.total = watched, total

    def update(self, done: float, note: str = "") -> None:
        watched = self.watched
        if watched is None or watched.place is None:
            return
        now = time.monotonic()
        if watched.harmed is None:
            if done >= watched.place.after * self.total:
                watched.harm(done)
                watched.hit(now, done)
            return
        if done > watched.best:
            watched.stalled = max(watched.stalled, now - watched.since)
            watched.best, watched.since = done, now
        if watched.passed is None and done > watched.harmed[1]:
            watched.passed = now


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
        self.backbone = write_tiny_backbone(folder / "backbone")
        self.task = write_tiny_task(folder / "task", {"train": 1024, "dev": 64, "test": 64})
        self.cluster: Any = None
        # Drivers of their own are forked from a process that has everything loaded and has never started Ray.
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload(["chaos_desk", "ray.train.torch", "rl_exit.trainers.alternation"])
        os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)

    def start_cluster(self) -> None:
        from ray.cluster_utils import Cluster

        for attempt in range(5):  # on a busy machine a node may need longer to start than Ray waits
            try:
                self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
                break
            except Exception:
                if attempt == 4:
                    raise
        self.fill()

    def fill(self) -> None:
        """Have three nodes beside the head."""
        for _ in range(10):
            if len(self.cluster.worker_nodes) >= NODES:
                return
            try:
                self.cluster.add_node(num_cpus=NODE_CPUS)
            except Exception as error:  # noqa: BLE001  (see start_cluster)
                print(f"a node did not start: {error}", flush=True)

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
        """Connect this process and have three nodes; a run in one process needs neither."""
        import ray

        if kind == "local":
            return
        self.stand()
        if not ray.is_initialized():
            ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")

    def stand(self) -> None:
        """Have a cluster of three nodes."""
        if self.cluster is None:
            self.start_cluster()
        self.fill()

    def whole(self, kind: str) -> Path:
        """The undisturbed run of a kind, with a copy of it as it was before each step."""
        from rl_exit.trainers.run_directory import RunDirectory

        output = self.folder / f"whole-{kind}"
        if (output / "tiny" / "results.json").is_file():
            return output / "tiny"
        original = RunDirectory.run_step

        def keeping(run: Any, step: str, *args: Any, **kwargs: Any) -> Any:
            shutil.copytree(run.path, output / "before" / step / "tiny")
            return original(run, step, *args, **kwargs)

        RunDirectory.run_step = keeping  # type: ignore[method-assign]
        try:
            self.join(kind)
            go_on(self.folder, kind, output, Watched(None))
        finally:
            RunDirectory.run_step = original  # type: ignore[method-assign]
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

    def start_driver(self, place: str, output: Path, what: str, past: float = float("inf")) -> Any:
        """A driver as a process of its own; see :func:`drive`."""
        driver = self.forks.Process(
            target=drive, args=(str(self.folder), place, str(output), self.cluster.address, what, past)
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
    """Configuration of a run of a kind."""
    return [
        *WORDS,
        *{"spread": SPREAD, "trained": TRAINED}.get(kind, []),
        f"task.path={folder / 'task'}",
        f"model.backbone={folder / 'backbone'}",
        f"output_dir={output}",
    ]


def go_on(folder: Path, kind: str, output: Path, display: Any) -> None:
    """Go on with the run in this process."""
    from rl_exit.config import load_config
    from rl_exit.trainers import policy_phase
    from rl_exit.trainers.alternation import train

    policy_phase.CHECKPOINT_SECONDS = SNAPSHOT_SECONDS
    train(load_config(None, words(folder, kind, output)), display, resume=True, kept=KEPT)


def drive(folder: str, place_name: str, output: str, address: str, what: str, past: float) -> None:
    """A driver's own process: dies or tells at the place (``die``, ``tell``), or tells when it is past (``pass``)."""
    import ray

    log = os.open(Path(output) / "driver.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    place, events = PLACES[place_name], Path(output) / "events"

    def tell(done: float) -> None:
        beside = events.with_suffix(".beside")
        beside.write_text(json.dumps({"done": done, "at": time.monotonic()}))
        beside.rename(events)

    def harm(done: float) -> None:
        tell(done)
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1.0)  # the harm is done meanwhile

    watched = Passing(place, past, tell) if what == "pass" else Watched(place, harm)
    go_on(Path(folder), place.kind, Path(output), watched)


class Passing(Watched):
    """Tells once when a resumed run is past where the first one was."""

    def __init__(self, place: Place, past: float, tell: Callable[[float], None]) -> None:
        super().__init__(place)
        self.past, self.tell, self.told = past, tell, False

    @contextmanager
    def step(self, title: str, total: float) -> Iterator[Any]:
        here = self.place is not None and title.startswith(self.place.title)
        yield _PassingBar(self) if here else _Bar(None, total)


class _PassingBar:
    def __init__(self, passing: Passing) -> None:
        self.passing = passing

    def update(self, done: float, note: str = "") -> None:
        if done > self.passing.past and not self.passing.told:
            self.passing.told = True
            self.passing.tell(done)


class Watchdog:
    """Ends a trial that hangs: calls ``give_up`` beside it after so many seconds, unless the block has ended."""

    def __init__(self, seconds: float, give_up: Callable[[], None]) -> None:
        self._timer = threading.Timer(seconds, give_up)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
