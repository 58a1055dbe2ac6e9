"""Kills every part of a distributed run in every phase, again and again, and records what became of the run.

python benchmarks/chaos.py [--runs 5] [--only NAME ...] [--out benchmarks/results/chaos.json]

A run of a tiny model on three raylets of this machine (a head without CPUs, two nodes of five) meets with several
faults, one after the other, each in the middle of a phase, and ends. Every one of them is a trial. It survived if the
run ended (after the action of docs/fault-tolerance.md, if one is named there), and its result is equal if results.json
(without times) and every weight of the model are those of the undisturbed run; if not, it counts against every fault of
the run. If a fault ends the run, those before it do not count and are done again. Lost seconds are the longest time
without new progress from the harm to the end of the step; for driver and head, the time from the harm until the resumed
run had passed the place (its own start, and for the head that of a new cluster, included). A run in which a harm did
not hit (nothing was there to be killed, or an error came before) is done again and noted under ``missed``; one that
does not end within 25 minutes has not survived. The result file is written after every run, and runs that it already
has are not done again. Exit code 1: a trial has not survived, or with another result.
"""

from __future__ import annotations

import argparse
import faulthandler
import fcntl
import json
import os
import shlex
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from chaos_desk import (
    NODE_CPUS,
    NODE_SECONDS,
    NODES,
    PLACES,
    ROOT,
    TITLES,
    Desk,
    Hit,
    MissedError,
    Watchdog,
    Watched,
    children,
    go_on,
    kill_all,
)

AWAY_SECONDS = 30.0
RUN_SECONDS = 1500.0
DRIVER_SECONDS = 180.0  # for a driver without a head to end by itself
MISSES = 3  # of the harm, before a scenario is left out of this session


@dataclass(frozen=True)
class Fault:
    """A kind of harm at a place.

    Attributes:
        name: In the table.
        place: Key of ``PLACES``.
        after: Share of the step after which it is done.
        role: Who is hit: key of ``TITLES``; empty where it is the driver, the head or the disk.
        node: Whether the whole node of that process is.
    """

    name: str
    place: str
    after: float = 0.4
    role: str = ""
    node: bool = False


@dataclass(frozen=True)
class Scenario:
    """One run and the faults that it meets with, in order.

    Attributes:
        name: Its own.
        mode: How it is run: name of a function below.
        faults: In order.
        kind: ``spread`` over a cluster or ``local``.
    """

    name: str
    mode: str
    faults: tuple[Fault, ...]
    kind: str = "spread"


NAMES = {"init": "initialisation", "store": "state store", "policy": "policy phase", "task": "task step"}
CONTROLLER, DESK = "controller of Ray Train killed", "desk between driver and Train workers killed"


def everywhere(what: str, places: tuple[str, ...] = tuple(NAMES)) -> tuple[Fault, ...]:
    return tuple(Fault(f"{what}, {NAMES[place]}", place) for place in places)


SCENARIOS = [
    Scenario(
        "processes",
        "killed",
        (
            Fault("Train worker killed, initialisation", "init", role="Train worker"),
            Fault("store builder killed, state store", "store", role="store builder"),
            Fault("env runner killed, policy phase", "policy", 0.25, role="env runner"),
            Fault("learner killed, policy phase", "policy", 0.5, role="learner"),
            Fault("Train worker killed, task step", "task", role="Train worker"),
        ),
    ),
    Scenario(
        "controller, nodes",
        "killed",
        (
            Fault(f"{CONTROLLER}, initialisation", "init", role="controller"),
            Fault("node removed, state store", "store", role="store builder", node=True),
            Fault("node removed, policy phase", "policy", role="env runner", node=True),
            Fault(f"{CONTROLLER}, task step", "task", role="controller"),
        ),
    ),
    Scenario(
        "desk, nodes",
        "killed",
        (
            Fault(f"{DESK}, initialisation", "init", 0.3, role="desk"),
            Fault("node removed, initialisation", "init", 0.6, role="Train worker", node=True),
            Fault(f"{DESK}, task step", "task", 0.3, role="desk"),
            Fault("node removed, task step", "task", 0.6, role="Train worker", node=True),
        ),
    ),
    Scenario("disk full", "disk_full", everywhere("disk full")),
    Scenario("away", "storage_away", everywhere("storage away for 30 s")),
    Scenario("driver", "driver_ended", everywhere("driver killed and resumed")),
    Scenario("head", "driver_ended", everywhere("head killed, cluster started anew and resumed")),
    Scenario(
        "disk full, local", "disk_full", everywhere("disk full, run in one process", ("init", "store")), kind="local"
    ),
    Scenario(
        "away, local",
        "storage_away",
        everywhere("storage away for 30 s, run in one process", ("store", "task")),
        kind="local",
    ),
]
FAULTS = [fault for scenario in SCENARIOS for fault in scenario.faults]
# So many runs at a time, each with a cluster of its own: much of a run is waiting.
LANES = [
    ("processes", "controller, nodes", "desk, nodes", "disk full"),
    ("driver", "head", "away", "disk full, local", "away, local"),
]


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


def trial(desk: Desk, scenario: Scenario, turn: int, results: Results) -> None:
    """Do one run and record what became of it."""
    whole = desk.whole(scenario.kind)
    output = Path(tempfile.mkdtemp(prefix="run-", dir=desk.folder))
    begun = time.monotonic()
    hits = [Hit(fault.name, fault.place, fault.after) for fault in scenario.faults]

    def record(survived: bool, same: bool, note: str) -> None:
        common = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "scenario": scenario.name,
            "run_seconds": round(time.monotonic() - begun, 1),
            "load_average": round(os.getloadavg()[0], 1),
        }
        results.add(hits, survived, same, common, note)

    def give_up() -> None:
        faulthandler.dump_traceback(all_threads=True)
        record(False, False, f"had not ended after {RUN_SECONDS:.0f} s")
        if desk.cluster is not None:
            kill_all(desk.cluster)
        os._exit(3)

    survived = same = False
    note = ""
    with Watchdog(RUN_SECONDS, give_up):
        try:
            MODES[scenario.mode](desk, scenario, output, hits, turn)
            survived = (output / "tiny" / "results.json").is_file()
            same = survived and equal(output / "tiny", whole)
        except Exception:  # noqa: BLE001  (that is what is recorded)
            note = traceback.format_exc()[-1500:]
    record(survived, same, note)
    shutil.rmtree(output, ignore_errors=True)


def killed(desk: Desk, scenario: Scenario, output: Path, hits: list[Hit], turn: int) -> None:
    """A process of a role, or the whole node that it is on, ends in the middle of the phase."""
    desk.join(scenario.kind)
    replacing: list[threading.Thread] = []

    def harm(fault: Fault, hit: Hit) -> None:
        found = desk.roles(fault.role)
        victim = found[turn % len(found)]  # each of them in turn
        hit.facts["killed"] = victim.title
        if not fault.node:
            os.kill(victim.pid, signal.SIGKILL)
            return
        node = desk.raylets()[victim.raylet]
        lost = [victim.raylet, *(child.pid for child in children({victim.raylet}))]
        hit.facts["processes"] = len(lost)
        for pid in lost:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        replacing.append(threading.Thread(target=replace_node, args=(desk, node), daemon=True))
        replacing[-1].start()

    for fault, hit in zip(scenario.faults, hits, strict=True):
        hit.harm = lambda _, fault=fault, hit=hit: harm(fault, hit)  # type: ignore[misc]
    try:
        go_on(desk.folder, scenario.kind, output, Watched(hits))
    finally:
        for thread in replacing:
            thread.join()


def replace_node(desk: Desk, node: Any) -> None:
    """Take a dead node out, and start another one a little later, as an autoscaler would."""
    desk.cluster.remove_node(node, allow_graceful=False)
    time.sleep(NODE_SECONDS)
    desk.fill(from_thread=True)


def disk_full(desk: Desk, scenario: Scenario, output: Path, hits: list[Hit], turn: int) -> None:
    """A disk of its own, which something else fills to the last byte; it is emptied, and the run resumed."""
    from rl_exit.errors import UserError

    disk = output / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "chaos", str(disk)], check=True)
    filler = disk / "filler"

    def harm(_: float) -> None:
        with filler.open("wb", buffering=0) as out:
            for size in (1 << 20, 1 << 12, 1):
                with suppress(OSError):
                    while True:
                        out.write(b"x" * size)

    for hit in hits:
        hit.harm = harm
    try:
        desk.join(scenario.kind)
        while True:
            try:
                go_on(desk.folder, scenario.kind, disk, Watched(hits))
                break
            except UserError as error:
                if "no space left" not in str(error) or not filler.exists():
                    raise
                last = [hit for hit in hits if hit.harmed is not None][-1]
                last.facts["message"] = str(error).replace(str(disk), "DISK")
                filler.unlink()
        if any("message" not in hit.facts for hit in hits):
            raise RuntimeError("a full disk was not noticed")
        shutil.copytree(disk / "tiny", output / "tiny")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def storage_away(desk: Desk, scenario: Scenario, output: Path, hits: list[Hit], turn: int) -> None:
    """The mount of the run directory is taken away; an empty folder of the local disk is left in its place."""
    real, mount = output / "real", output / "mount"
    real.mkdir()
    mount.mkdir()

    def attach() -> None:
        subprocess.run(["mount", "--bind", str(real), str(mount)], check=True)

    timers: list[threading.Timer] = []

    def harm(_: float) -> None:
        subprocess.run(["umount", "-l", str(mount)], check=True)
        timers.append(threading.Timer(AWAY_SECONDS, attach))
        timers[-1].start()

    for hit in hits:
        hit.harm = harm
    attach()
    try:
        desk.join(scenario.kind)
        go_on(desk.folder, scenario.kind, mount, Watched(hits))
        shutil.copytree(real / "tiny", output / "tiny")
    finally:
        for timer in timers:
            timer.cancel()
        subprocess.run(["umount", "-l", str(mount)], check=False)


def driver_ended(desk: Desk, scenario: Scenario, output: Path, hits: list[Hit], turn: int) -> None:
    """The driver is a process of its own; it, or the head below it, is killed, and the run resumed by another."""
    import ray

    ray.shutdown()  # this process is to see neither die; the nodes stay
    events = Events(output / "events")
    past: tuple[str, float] | None = None
    with_head = scenario.name == "head"
    for hit in hits:
        desk.stand()
        driver = desk.start_driver(output, past, (hit.place, hit.after), dies=not with_head)
        _note_passed(hits, past, events, driver)
        at = events.next(driver)
        if at is None:
            raise MissedError(f"the driver ended with {driver.exitcode}: {_log(output)}")
        if with_head:
            hit.facts["processes"] = kill_head(desk)
        hit.begin(at["at"], at["done"])
        driver.join(DRIVER_SECONDS)
        hit.facts["driver_ended_after"] = round(time.monotonic() - at["at"], 1)
        if driver.is_alive():  # one that still waits for its head is ended, as the page says
            hit.facts["driver_ended_after"] = None
            driver.kill()
            driver.join()
        if with_head:
            desk.stop_cluster()
        past = (hit.place, at["done"])
    desk.stand()
    driver = desk.start_driver(output, past, None, dies=False)
    _note_passed(hits, past, events, driver)
    driver.join()
    if driver.exitcode:
        raise RuntimeError(f"the driver ended with {driver.exitcode}: {_log(output)}")


def kill_head(desk: Desk) -> int:
    """Kill the head's processes and those of all actors on it (but not the driver); returns their number."""
    head = desk.cluster.head_node
    lost = [info.process.pid for infos in head.all_processes.values() for info in infos]
    lost += [child.pid for child in children(set(lost))]
    for pid in lost:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(lost)


def _note_passed(hits: list[Hit], past: tuple[str, float] | None, events: Events, driver: Any) -> None:
    """Wait until the resumed run has passed the last harm."""
    if past is None:
        return
    at = events.next(driver)
    if at is None or at["what"] != "passed":
        raise RuntimeError(f"the resumed driver ended with {driver.exitcode}: {_log(events.path.parent)}")
    [hit for hit in hits if hit.harmed is not None][-1].passed = at["at"]


def _log(output: Path) -> str:
    return (output / "driver.log").read_text()[-1200:]


class Events:
    """What drivers have told, in order."""

    def __init__(self, path: Path) -> None:
        self.path, self._seen = path, 0

    def next(self, driver: Any) -> dict[str, Any] | None:
        """Wait for the next word; None if the driver ended without one."""
        while True:
            alive = driver.is_alive()
            lines = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
            if len(lines) > self._seen and lines[self._seen].endswith("\n"):
                self._seen += 1
                found: dict[str, Any] = json.loads(lines[self._seen - 1])
                return found
            if not alive:
                return None
            time.sleep(0.02)


Mode = Callable[[Desk, Scenario, Path, list[Hit], int], None]
MODES: dict[str, Mode] = {
    "killed": killed,
    "disk_full": disk_full,
    "storage_away": storage_away,
    "driver_ended": driver_ended,
}


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of the trials in which the harm was done."""
    lost = [t["lost_seconds"] for t in trials if t["lost_seconds"] is not None]
    return {
        "runs": len(trials),
        "survived": sum(t["survived"] for t in trials),
        "equal_result": sum(t["equal_result"] for t in trials),
        "lost_seconds_median": round(statistics.median(lost), 2) if lost else None,
        "lost_seconds_max": max(lost) if lost else None,
    }


class Results:
    """The result file; lanes write it in turn.

    Args:
        path: Of the file.
        command: That is noted in it.
        lock: A file to lock while it is written.
    """

    def __init__(self, path: Path, command: str, lock: Path) -> None:
        self.path, self.command, self.lock = path, command, lock

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.is_file() else {"commands": [], "faults": {}}

    def count(self, scenario: Scenario) -> int:
        """Runs of a scenario: the trials of that of its faults that has fewest."""
        faults = self.read()["faults"]
        return min(len(faults.get(fault.name, {}).get("trials", [])) for fault in scenario.faults)

    def add(self, hits: list[Hit], survived: bool, same: bool, common: dict[str, Any], note: str) -> None:
        """Record a run."""
        from rl_exit.files import write_json

        harmed = [hit for hit in hits if hit.harmed is not None]
        if survived and len(harmed) < len(hits):
            note = f"not every harm was done: {[hit.fault for hit in hits if hit.harmed is None]}"
        with self._alone():
            tree = self.read()
            for hit in hits:
                counts = len(harmed) == len(hits) if survived else bool(harmed) and hit is harmed[-1]
                counts = counts and "MissedError" not in note
                trial = {
                    **common,
                    "survived": survived,
                    "equal_result": same,
                    "lost_seconds": hit.lost if survived else None,
                    **hit.facts,
                    **({"note": note} if note else {}),
                }
                print(f"{hit.fault}{'' if counts else ' (does not count)'}: {json.dumps(trial)}", flush=True)
                found = tree["faults"].get(hit.fault, {"trials": [], "missed": []})
                trials, missed = found["trials"], found["missed"]
                (trials if counts else missed).append(trial)
                tree["faults"][hit.fault] = {**summary(trials), "missed": missed, "trials": trials}
            commands = list(dict.fromkeys([*tree["commands"], self.command]))
            write_json(self.path, self._whole(tree["faults"], commands))

    def _whole(self, faults: dict[str, Any], commands: list[str]) -> dict[str, Any]:
        from rl_exit.trainers.run_directory import versions

        ordered = {fault.name: faults[fault.name] for fault in FAULTS if fault.name in faults}
        every = [t for found in ordered.values() for t in found["trials"]]
        return {
            "command": "; ".join(commands),
            "commands": commands,
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine([t["load_average"] for t in every]),
            "versions": versions(),
            "total": summary(every),
            "not_run": [fault.name for fault in FAULTS if not faults.get(fault.name, {}).get("trials")],
            "faults": ordered,
        }

    @contextmanager
    def _alone(self) -> Any:
        with self.lock.open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def machine(loads: list[float]) -> str:
    """Where it was done, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = f"load average {min(loads):g} to {max(loads):g}" if loads else "load average unknown"
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, {load}; {NODES + 1} raylets on them (a head without CPUs, "
        f"{NODES} nodes of {NODE_CPUS}), none for runs in one process; {len(LANES)} runs at a time"
    )


def work(args: argparse.Namespace) -> None:
    """Do the runs of one lane; of lane -1 those without any harm, which the others share."""
    desk = Desk(args.folder)
    results = Results(args.out, args.command, args.folder / "lock")
    end = time.monotonic() + 60 * args.minutes
    chosen = wanted(args.only)
    try:
        if args.lane < 0:
            for kind in sorted({scenario.kind for scenario in chosen}):
                desk.whole(kind)
            return
        misses: dict[str, int] = {}
        mine = [scenario for scenario in chosen if scenario.name in LANES[args.lane]]
        for turn in range(args.runs):
            for scenario in mine:
                while (
                    (before := results.count(scenario)) <= turn
                    and misses.get(scenario.name, 0) < MISSES
                    and time.monotonic() < end
                ):
                    trial(desk, scenario, turn, results)
                    misses[scenario.name] = misses.get(scenario.name, 0) + (results.count(scenario) == before)
    finally:
        desk.stop_cluster()


def wanted(words: list[str]) -> list[Scenario]:
    """Scenarios with a fault whose name contains one of the words; all if there are none."""

    def is_wanted(scenario: Scenario) -> bool:
        return not words or any(word in fault.name for word in words for fault in scenario.faults)

    return [scenario for scenario in SCENARIOS if is_wanted(scenario)]


@contextmanager
def work_folder(kept: Path | None) -> Iterator[str]:
    """Where all is done: a folder that is removed afterwards, or one that is kept."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield str(kept)
        return
    with tempfile.TemporaryDirectory(prefix="rl-exit-chaos-", ignore_cleanup_errors=True) as folder:
        yield folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each scenario")
    parser.add_argument(
        "--only", nargs="*", default=[], help="faults whose name contains such a word; with others of their runs"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "chaos.json")
    parser.add_argument("--fresh", action="store_true", help="forget the trials that the result file already has")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no trial after so many")
    parser.add_argument("--list", action="store_true", help="the faults, and no more")
    parser.add_argument("--lane", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="keep the undisturbed runs here for the next session")
    parser.add_argument("--command", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        print("\n".join(fault.name for scenario in wanted(args.only) for fault in scenario.faults))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.lane is not None:
        work(args)
        return
    if args.fresh:
        args.out.unlink(missing_ok=True)
    given = [word for word in sys.argv[1:] if word != "--fresh"]
    told = [word for word in sys.argv[1:] if word not in ("--folder", str(args.folder), "--out", str(args.out))]
    command = shlex.join(["python", "benchmarks/chaos.py", *told])
    with work_folder(args.folder) as folder:
        own = ["--folder", folder, "--command", command]

        def start(lane: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-u", __file__, *given, *own, "--lane", str(lane)])

        lanes = [start(-1)]
        try:
            codes = [lanes[0].wait()]
            names = [scenario.name for scenario in wanted(args.only)]
            lanes = [start(lane) for lane, mine in enumerate(LANES) if not codes[0] and set(names) & set(mine)]
            codes += [lane.wait() for lane in lanes]
        except BaseException:
            for lane in lanes:
                lane.terminate()
            for lane in lanes:
                lane.wait()
            raise
    if not args.out.is_file():  # nothing was wanted
        sys.exit(max(codes))
    total = json.loads(args.out.read_text())["total"]
    whole = total["runs"] == total["survived"] == total["equal_result"]
    sys.exit(max(*codes, int(not whole)))


assert all(fault.role in ("", *TITLES) and fault.place in PLACES for fault in FAULTS)
assert sorted(name for lane in LANES for name in lane) == sorted(scenario.name for scenario in SCENARIOS)

if __name__ == "__main__":
    main()
