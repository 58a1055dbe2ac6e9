"""Kills every part of a distributed run in every phase, again and again, and records what became of the run.

python benchmarks/chaos.py [--runs 5] [--only NAME ...] [--out benchmarks/results/chaos.json]

A run of a tiny model on four raylets of this machine (a head without CPUs, three nodes of two) is stopped
before each phase once, and its directory kept. A trial takes a copy, goes on from there, does the harm in the middle of
the phase, and lets the run end. It survived if it ended (after the action of docs/fault-tolerance.md, if one is named
there), and its result is equal if results.json (without times) and every weight of the model are those of the
undisturbed run. Lost seconds are the longest time without new progress from the harm to the end of the step; for driver
and head, the time from the harm until the resumed run had passed the place. The
result file is written after every trial, and trials that it already has are not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

AWAY_SECONDS = 30.0
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


@dataclass(frozen=True)
class Place:
    """Where in a run harm is done: which run, before which step it is taken up, and in the middle of what."""

    kind: str
    step: str
    title: str
    count: int = 1


PLACES = {
    "init": Place("trained", "init", "initialisation"),
    "task": Place("trained", "round-1-task", "round 1: task step"),
    "store": Place("spread", "round-2-store", "round 2: states of train", 3),
    "policy": Place("spread", "round-2-policy", "round 2: policy", 8),
    "local init": Place("local", "init", "initialisation"),
    "local store": Place("local", "round-2-store", "round 2: states of train", 3),
    "local task": Place("local", "round-1-task", "round 1: task step"),
}


@dataclass(frozen=True)
class Fault:
    """A kind of harm at a place; ``mode`` says how the trial is run."""

    name: str
    place: str
    role: str
    mode: str


FAULTS = [
    Fault("env runner killed, policy phase", "policy", "SamplerActor", "process"),
    Fault("learner killed, policy phase", "policy", "learner", "process"),
    Fault("store builder killed, state store", "store", "ShardWorker", "process"),
    Fault("Train worker killed, initialisation", "init", "RayTrainWorker", "process"),
    Fault("Train worker killed, task step", "task", "RayTrainWorker", "process"),
    Fault("node removed, policy phase", "policy", "SamplerActor", "raylet"),
    Fault("node removed, state store", "store", "ShardWorker", "raylet"),
    Fault("node removed, initialisation", "init", "RayTrainWorker", "raylet"),
    Fault("node removed, task step", "task", "RayTrainWorker", "raylet"),
    Fault("disk full, run in one process, initialisation", "local init", "", "full"),
    Fault("disk full, run in one process, state store", "local store", "", "full"),
    Fault("storage away for 30 s, run in one process, state store", "local store", "", "away"),
    Fault("storage away for 30 s, run in one process, task step", "local task", "", "away"),
    Fault("disk full, state store", "store", "", "full"),
    Fault("disk full, task step", "task", "", "full"),
    Fault("storage away for 30 s, state store", "store", "", "away"),
    Fault("storage away for 30 s, task step", "task", "", "away"),
    Fault("driver killed and resumed, policy phase", "policy", "", "driver"),
    Fault("driver killed and resumed, state store", "store", "", "driver"),
    Fault("driver killed and resumed, initialisation", "init", "", "driver"),
    Fault("driver killed and resumed, task step", "task", "", "driver"),
    Fault("head killed, cluster started anew and resumed, policy phase", "policy", "", "head"),
    Fault("head killed, cluster started anew and resumed, state store", "store", "", "head"),
    Fault("head killed, cluster started anew and resumed, task step", "task", "", "head"),
]


class Watched:
    """A display that calls ``harm`` at the place, and notes when the run has passed it."""

    def __init__(self, place: Place | None, harm: Callable[[], None] = lambda: None) -> None:
        self.place, self.harm = place, harm
        self.harmed: tuple[float, float] | None = None  # when, at what progress
        self.passed: float | None = None
        self.stalled = 0.0  # longest time without new progress since the harm
        self.best, self.since = 0.0, 0.0
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    @contextmanager
    def step(self, title: str, total: float) -> Iterator[Any]:
        place, outer = self.place, self
        here, seen = place is not None and title.startswith(place.title), 0
        if here and self.harmed is not None:
            # The step is done again: what it had done since the harm was not believed.
            self.passed, self.best, self.since = None, self.harmed[1], self.harmed[0]

        class Bar:
            def update(self, done: float, note: str = "") -> None:
                nonlocal seen
                seen += 1
                if not here or place is None:
                    return
                if outer.harmed is None and seen >= place.count:
                    outer.harmed = (time.monotonic(), done)
                    outer.best, outer.since = done, outer.harmed[0]
                    outer.harm()
                    return
                if outer.harmed is not None and done > outer.best:
                    now = time.monotonic()
                    outer.stalled = max(outer.stalled, now - outer.since)
                    outer.best, outer.since = done, now
                if outer.harmed is not None and outer.passed is None and done > outer.harmed[1]:
                    outer.passed = time.monotonic()

        yield Bar()
        if here and self.harmed is not None:
            self.stalled = max(self.stalled, time.monotonic() - self.since)
            self.passed = self.passed or time.monotonic()


class Desk:
    """Folders, cluster and undisturbed runs of a chaos session."""

    def __init__(self, folder: Path) -> None:
        from conftest import write_tiny_backbone, write_tiny_task

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.backbone = write_tiny_backbone(folder / "backbone")
        self.task = write_tiny_task(folder / "task", {"train": 1024, "dev": 64, "test": 64})
        self.cluster: Any = None
        self.path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")])

    def words(self, kind: str, output: Path) -> list[str]:
        return [
            *WORDS,
            *{"spread": SPREAD, "trained": TRAINED}.get(kind, []),
            f"task.path={self.task}",
            f"model.backbone={self.backbone}",
            f"output_dir={output}",
        ]

    def start_cluster(self) -> None:
        from ray.cluster_utils import Cluster

        os.environ["PYTHONPATH"] = self.path
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
            if len(self.cluster.worker_nodes) >= 3:
                return
            try:
                self.cluster.add_node(num_cpus=2)
            except Exception as error:  # noqa: BLE001  (see start_cluster)
                print(f"a node did not start: {error}", flush=True)

    def stop_cluster(self) -> None:
        import ray

        if self.cluster is not None:
            ray.shutdown()
            self.cluster.shutdown()
        self.cluster = None

    def join(self, kind: str) -> None:
        """Connect this process and have three nodes; a run in one process needs neither."""
        import ray

        if kind == "local":
            return
        if self.cluster is None:
            self.start_cluster()
        if not ray.is_initialized():
            ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        self.fill()

    def drive(self, kind: str, output: Path, display: Any) -> None:
        """Go on with the run in this process."""
        from rl_exit.config import load_config
        from rl_exit.trainers.alternation import train

        config = load_config(None, self.words(kind, output))
        train(config, display, resume=True, kept=("store.num_workers", "task_step.num_workers"))

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
            self.drive(kind, output, Watched(None))
        finally:
            RunDirectory.run_step = original  # type: ignore[method-assign]
        return output / "tiny"

    def roles(self, role: str) -> list[tuple[int, int]]:
        """(pid, pid of its raylet) of the processes that do a role; those of this session's own nodes only."""
        raylets = {node.all_processes["raylet"][0].process.pid for node in self.cluster.worker_nodes}
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit():
                    continue
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (OSError, IndexError, ValueError):
                continue
            if parent in raylets and "ray::" in title and "IDLE" not in title and "Agent" not in title:
                is_sampler, is_store = "SamplerActor" in title, "ShardWorker" in title
                known = "SamplerActor" if is_sampler else "ShardWorker" if is_store else None
                if (role == known) or (known is None and role in ("RayTrainWorker", "learner") and "Desk" not in title):
                    found.append((int(entry.name), parent))
        return sorted(found)


def outcome(run: Path) -> dict[str, Any]:
    results = json.loads((run / "results.json").read_text())
    for name in ("seconds", "timing", "run_name"):
        results.pop(name)
    return results


def equal(run: Path, whole: Path) -> bool:
    from safetensors.numpy import load_file

    here, there = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    weights = here.keys() == there.keys() and all((here[name] == there[name]).all() for name in here)
    return weights and outcome(run) == outcome(whole)


def trial(desk: Desk, fault: Fault) -> dict[str, Any]:
    """Do one and say what became of it."""
    place = PLACES[fault.place]
    whole = desk.whole(place.kind)
    output = Path(tempfile.mkdtemp(prefix="trial-", dir=desk.folder))
    run = {"process": in_process, "raylet": in_process, "full": disk_full, "away": storage_away}.get(
        fault.mode, by_subprocess
    )
    begun, note = time.monotonic(), ""
    watched = Watched(place)
    try:
        watched = run(desk, fault, place, output)
        survived = (output / "tiny" / "results.json").is_file()
        same = survived and equal(output / "tiny", whole)
    except Exception:  # noqa: BLE001  (that is what is recorded)
        survived = same = False
        note = traceback.format_exc()[-600:]
    result = {
        "survived": survived,
        "equal_result": same,
        "harmed": watched.harmed is not None,
        "lost_seconds": lost_seconds(watched),
        "seconds": round(time.monotonic() - begun, 1),
    }
    if note:
        result["note"] = note
    shutil.rmtree(output, ignore_errors=True)
    return result


def lost_seconds(watched: Watched) -> float | None:
    """Longest time without new progress since the harm; for a run in a process of its own, until it had passed it."""
    if not watched.harmed or not watched.passed:
        return None
    return round(watched.stalled or watched.passed - watched.harmed[0], 2)


def prepare(desk: Desk, place: Place, output: Path) -> None:
    shutil.copytree(desk.folder / f"whole-{place.kind}" / "before" / place.step, output, dirs_exist_ok=True)


def in_process(desk: Desk, fault: Fault, place: Place, output: Path) -> Watched:
    prepare(desk, place, output)
    desk.join(place.kind)

    def harm() -> None:
        pid, raylet = desk.roles(fault.role)[-1]
        if fault.mode == "process":
            os.kill(pid, signal.SIGKILL)
            return
        node = next(n for n in desk.cluster.worker_nodes if n.all_processes["raylet"][0].process.pid == raylet)
        threading.Thread(target=replace_node, args=(desk, node), daemon=True).start()

    watched = Watched(place, harm)
    desk.drive(place.kind, output, watched)
    return watched


def replace_node(desk: Desk, node: Any) -> None:
    """Kill everything of a node at once, and start another one 3 s later, as an autoscaler would."""
    desk.cluster.remove_node(node, allow_graceful=False)
    time.sleep(3.0)
    desk.fill()


def disk_full(desk: Desk, fault: Fault, place: Place, output: Path) -> Watched:
    """A disk of its own, which something else fills to the last byte; it is emptied, and the run resumed."""
    from rl_exit.errors import UserError

    disk = output / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "chaos", str(disk)], check=True)
    try:
        prepare(desk, place, disk)
        desk.join(place.kind)
        filler = disk / "filler"

        def harm() -> None:
            with filler.open("wb", buffering=0) as out:
                for size in (1 << 20, 1 << 12, 1):
                    try:
                        while True:
                            out.write(b"x" * size)
                    except OSError:
                        continue

        watched = Watched(place, harm)
        try:
            desk.drive(place.kind, disk, watched)
        except UserError as error:
            if "no space left" not in str(error):
                raise
            filler.unlink()
            desk.drive(place.kind, disk, watched)
        else:
            raise RuntimeError("the full disk was not noticed")
        shutil.copytree(disk / "tiny", output / "tiny")
        return watched
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def storage_away(desk: Desk, fault: Fault, place: Place, output: Path) -> Watched:
    """The mount of the run directory is taken away; an empty folder of the local disk is left in its place."""
    real, mount = output / "real", output / "mount"
    real.mkdir()
    mount.mkdir()
    prepare(desk, place, real)
    desk.join(place.kind)

    def attach() -> None:
        subprocess.run(["mount", "--bind", str(real), str(mount)], check=True)

    attach()
    timer = threading.Timer(AWAY_SECONDS, attach)

    def harm() -> None:
        subprocess.run(["umount", "-l", str(mount)], check=True)
        timer.start()

    watched = Watched(place, harm)
    try:
        desk.drive(place.kind, mount, watched)
        shutil.copytree(real / "tiny", output / "tiny")
        return watched
    finally:
        timer.cancel()
        subprocess.run(["umount", "-l", str(mount)], check=False)


def by_subprocess(desk: Desk, fault: Fault, place: Place, output: Path) -> Watched:
    """The driver is a process of its own; it, or the head below it, is killed, and the run resumed by another."""
    import ray

    prepare(desk, place, output)
    if desk.cluster is None or fault.mode == "head":
        desk.stop_cluster()
        desk.start_cluster()
    elif fault.mode == "driver":
        ray.shutdown()  # the nodes stay
        desk.fill()
    watched = Watched(place)
    events = output / "events"
    first = start_driver(desk, fault.place, output, "die" if fault.mode == "driver" else "tell")
    done = wait_for(events, first)
    watched.harmed = (time.monotonic(), done)
    if fault.mode == "head":
        for name in ("gcs_server", "raylet"):
            for process in desk.cluster.head_node.all_processes.get(name, []):
                process.process.kill()
    try:
        first.wait(timeout=180)
    except subprocess.TimeoutExpired:
        first.kill()  # a driver that still waits for its head is ended, as the page says
        first.wait()
    if fault.mode == "head":
        desk.stop_cluster()
        desk.start_cluster()
    events.unlink(missing_ok=True)
    second = start_driver(desk, fault.place, output, "pass", str(done))
    wait_for(events, second, finished=True)
    watched.passed = time.monotonic()
    if second.wait(timeout=400):
        raise RuntimeError((output / "driver.log").read_text()[-1500:])
    return watched


def start_driver(desk: Desk, place: str, output: Path, *words: str) -> subprocess.Popen[bytes]:
    with (output / "driver.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "--drive", str(desk.folder), place, str(output), desk.cluster.address, *words],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": desk.path},
        )


def wait_for(events: Path, process: subprocess.Popen[bytes], finished: bool = False) -> float:
    """Wait for the driver's word about where it is."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if events.is_file() and (text := events.read_text()).endswith("\n"):
            return float(text)
        if process.poll() is not None and not events.is_file():
            if finished:
                return 0.0
            raise RuntimeError(f"the driver ended with {process.returncode} before the harm")
        time.sleep(0.02)
    raise RuntimeError("the driver did not get there")


def drive(folder: str, place_name: str, output: str, address: str, what: str, past: str = "inf") -> None:
    """The driver's own process: dies, or tells, at the place; or tells when it has passed it."""
    import ray

    desk = Desk.__new__(Desk)
    desk.folder, desk.backbone, desk.task = Path(folder), Path(folder) / "backbone", Path(folder) / "task"
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    place, events = PLACES[place_name], Path(output) / "events"

    class Told(Watched):
        def step(self, title: str, total: float) -> Any:
            inner = super().step(title, total)
            return passing(inner, title) if what == "pass" else inner

    @contextmanager
    def passing(inner: Any, title: str) -> Iterator[Any]:
        class Bar:
            def update(self, done: float, note: str = "") -> None:
                if title.startswith(place.title) and done > float(past) and not events.exists():
                    events.write_text(f"{done}\n")

        with inner:
            yield Bar()

    watched: Watched

    def harm() -> None:
        assert watched.harmed is not None
        events.write_text(f"{watched.harmed[1]}\n")
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1.0)

    watched = Told(place, harm if what != "pass" else lambda: None)
    desk.drive(place.kind, Path(output), watched)


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    lost = [t["lost_seconds"] for t in trials if t["lost_seconds"] is not None]
    return {
        "runs": len(trials),
        "survived": sum(t["survived"] for t in trials),
        "equal_result": sum(t["equal_result"] for t in trials),
        "lost_seconds_median": round(statistics.median(lost), 2) if lost else None,
        "lost_seconds_max": max(lost) if lost else None,
    }


def write(out: Path, trials: dict[str, list[dict[str, Any]]], runs: int) -> None:
    from rl_exit.files import write_json
    from rl_exit.trainers.run_directory import versions

    faults = {name: {**summary(found), "trials": found} for name, found in trials.items() if found}
    every = [t for found in trials.values() for t in found]
    write_json(
        out,
        {
            "command": f"make chaos (python benchmarks/chaos.py --runs {runs})",
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, shared with other work; 4 raylets, none for runs in one process",
            "versions": versions(),
            "total": summary(every) if every else {},
            "faults": faults,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="trials of each fault")
    parser.add_argument("--only", nargs="*", default=[], help="faults whose name contains one of these words")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "chaos.json")
    parser.add_argument("--fresh", action="store_true", help="forget the trials that the result file already has")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no trial after so many")
    parser.add_argument("--folder", type=Path, help="keep undisturbed runs here for the next call")
    parser.add_argument("--drive", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        drive(*args.drive)
        return
    known = {} if args.fresh or not args.out.is_file() else json.loads(args.out.read_text())["faults"]
    trials = {fault.name: list(known.get(fault.name, {}).get("trials", [])) for fault in FAULTS}
    end = time.monotonic() + 60 * args.minutes
    folder = args.folder or Path(tempfile.mkdtemp(prefix="rl-exit-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    desk = Desk(folder)
    try:
        for turn in range(args.runs):
            for fault in FAULTS:
                wanted = not args.only or any(word in fault.name for word in args.only)
                if not wanted or len(trials[fault.name]) > turn or time.monotonic() > end:
                    continue
                result = trial(desk, fault)
                trials[fault.name].append(result)
                print(f"{fault.name}: {json.dumps(result)}", flush=True)
                write(args.out, trials, args.runs)
    finally:
        desk.stop_cluster()
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
