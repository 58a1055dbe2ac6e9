"""Kills every part of a distributed run in every phase, again and again, and records what became of the run.

python benchmarks/chaos.py [--runs 5] [--only NAME ...] [--out benchmarks/results/chaos.json]

A run of a tiny model on four raylets of this machine (a head without CPUs, three nodes of two) is stopped
before each phase once, and its directory kept. A trial takes a copy, goes on from there, does the harm in the middle of
the phase, and lets the run end. It survived if it ended (after the action of docs/fault-tolerance.md, if one is named
there), and its result is equal if results.json (without times) and every weight of the model are those of the
undisturbed run. Lost seconds are the longest time without new progress from the harm to the end of the step; for driver
and head, the time from the harm until the resumed run had passed the place (its own start, and for the head that of a
new cluster, included). A trial in which the harm did not hit (nothing was there to be killed, or an error came before)
is done again and noted under ``missed``; one that does not end within 10 minutes has not survived. The result file is
written after every trial, and trials that it already has are not done again.
"""

from __future__ import annotations

import argparse
import fcntl
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
from collections.abc import Callable
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
    MissedError,
    Place,
    Watchdog,
    Watched,
    children,
    go_on,
    kill_all,
)

AWAY_SECONDS = 30.0
TRIAL_SECONDS = 600.0
DRIVER_SECONDS = 180.0  # for a driver without a head to end by itself
MISSES = 3  # of the harm, before a fault is left out of this session


@dataclass(frozen=True)
class Fault:
    """A kind of harm at a place; ``mode`` says how the trial is run, ``role`` whom it hits."""

    name: str
    place: str
    mode: str
    role: str = ""


NAMES = {"init": "initialisation", "store": "state store", "policy": "policy phase", "task": "task step"}
CLUSTER = [
    ("env runner killed", "process", "env runner", ("policy",)),
    ("learner killed", "process", "learner", ("policy",)),
    ("store builder killed", "process", "store builder", ("store",)),
    ("Train worker killed", "process", "Train worker", ("init", "task")),
    ("controller of Ray Train killed", "process", "controller", ("init", "task")),
    ("desk between driver and Train workers killed", "process", "desk", ("init", "task")),
    ("node removed", "node", "env runner", ("policy",)),
    ("node removed", "node", "store builder", ("store",)),
    ("node removed", "node", "Train worker", ("init", "task")),
    ("disk full", "full", "", ("init", "store", "policy", "task")),
    ("storage away for 30 s", "away", "", ("init", "store", "policy", "task")),
    ("driver killed and resumed", "driver", "", ("init", "store", "policy", "task")),
    ("head killed, cluster started anew and resumed", "head", "", ("init", "store", "policy", "task")),
]
LOCAL = [("disk full", "full", ("init", "store")), ("storage away for 30 s", "away", ("store", "task"))]
FAULTS = [
    *(Fault(f"{name}, {NAMES[place]}", place, mode, role) for name, mode, role, places in CLUSTER for place in places),
    *(
        Fault(f"{name}, run in one process, {NAMES[place]}", f"local {place}", mode)
        for name, mode, places in LOCAL
        for place in places
    ),
]
# Two at a time, each with a cluster of its own: much of a trial is waiting.
LANES = [("trained",), ("spread", "local")]


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


def trial(desk: Desk, fault: Fault, turn: int, record: Callable[[dict[str, Any]], None]) -> None:
    """Do one and record what became of it."""
    place = PLACES[fault.place]
    whole = desk.whole(place.kind)
    output = Path(tempfile.mkdtemp(prefix="trial-", dir=desk.folder))
    run = {"process": killed, "node": killed, "full": disk_full, "away": storage_away}.get(fault.mode, driver_ended)
    watched, begun = Watched(place), time.monotonic()

    def result(survived: bool, same: bool, note: str) -> dict[str, Any]:
        return {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "survived": survived,
            "equal_result": same,
            "harmed": watched.harmed is not None,
            "lost_seconds": lost_seconds(watched) if survived else None,
            "seconds": round(time.monotonic() - begun, 1),
            "load_average": round(os.getloadavg()[0], 1),
            **watched.facts,
            **({"note": note} if note else {}),
        }

    def give_up() -> None:
        record(result(False, False, f"had not ended after {TRIAL_SECONDS:.0f} s"))
        if desk.cluster is not None:
            kill_all(desk.cluster)
        os._exit(3)

    survived = same = False
    note = ""
    with Watchdog(TRIAL_SECONDS, give_up):
        try:
            run(desk, fault, place, output, watched, turn)
            survived = (output / "tiny" / "results.json").is_file()
            same = survived and equal(output / "tiny", whole)
        except Exception:  # noqa: BLE001  (that is what is recorded)
            note = traceback.format_exc()[-1500:]
        record(result(survived, same, note))
    shutil.rmtree(output, ignore_errors=True)


def lost_seconds(watched: Watched) -> float | None:
    """Longest time without new progress since the harm; for a run in a process of its own, until it had passed it."""
    if not watched.harmed or not watched.passed:
        return None
    return round(watched.stalled or watched.passed - watched.harmed[0], 2)


def prepare(desk: Desk, place: Place, output: Path) -> None:
    shutil.copytree(desk.folder / f"whole-{place.kind}" / "before" / place.step, output, dirs_exist_ok=True)


def killed(desk: Desk, fault: Fault, place: Place, output: Path, watched: Watched, turn: int) -> None:
    """A process of a role, or the whole node that it is on, ends in the middle of the phase."""
    prepare(desk, place, output)
    desk.join(place.kind)
    replacing: list[threading.Thread] = []

    def harm(_: float) -> None:
        found = desk.roles(fault.role)
        victim = found[turn % len(found)]  # each of them in turn
        watched.facts["killed"] = victim.title
        if fault.mode == "process":
            os.kill(victim.pid, signal.SIGKILL)
            return
        node = desk.raylets()[victim.raylet]
        lost = [victim.raylet, *(child.pid for child in children({victim.raylet}))]
        watched.facts["processes"] = len(lost)
        for pid in lost:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        replacing.append(threading.Thread(target=replace_node, args=(desk, node), daemon=True))
        replacing[0].start()

    watched.harm = harm
    try:
        go_on(desk.folder, place.kind, output, watched)
    finally:
        for thread in replacing:
            thread.join()


def replace_node(desk: Desk, node: Any) -> None:
    """Take a dead node out, and start another one a little later, as an autoscaler would."""
    desk.cluster.remove_node(node, allow_graceful=False)
    time.sleep(NODE_SECONDS)
    desk.fill()


def disk_full(desk: Desk, fault: Fault, place: Place, output: Path, watched: Watched, turn: int) -> None:
    """A disk of its own, which something else fills to the last byte; it is emptied, and the run resumed."""
    from rl_exit.errors import UserError

    disk = output / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "chaos", str(disk)], check=True)
    try:
        prepare(desk, place, disk)
        desk.join(place.kind)
        filler = disk / "filler"

        def harm(_: float) -> None:
            with filler.open("wb", buffering=0) as out:
                for size in (1 << 20, 1 << 12, 1):
                    with suppress(OSError):
                        while True:
                            out.write(b"x" * size)

        watched.harm = harm
        try:
            go_on(desk.folder, place.kind, disk, watched)
        except UserError as error:
            if "no space left" not in str(error):
                raise
            watched.facts["message"] = str(error).replace(str(disk), "DISK")
            filler.unlink()
            go_on(desk.folder, place.kind, disk, watched)
        else:
            raise RuntimeError("the full disk was not noticed")
        shutil.copytree(disk / "tiny", output / "tiny")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def storage_away(desk: Desk, fault: Fault, place: Place, output: Path, watched: Watched, turn: int) -> None:
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

    def harm(_: float) -> None:
        subprocess.run(["umount", "-l", str(mount)], check=True)
        timer.start()

    watched.harm = harm
    try:
        go_on(desk.folder, place.kind, mount, watched)
        shutil.copytree(real / "tiny", output / "tiny")
    finally:
        timer.cancel()
        subprocess.run(["umount", "-l", str(mount)], check=False)


def driver_ended(desk: Desk, fault: Fault, place: Place, output: Path, watched: Watched, turn: int) -> None:
    """The driver is a process of its own; it, or the head below it, is killed, and the run resumed by another."""
    import ray

    prepare(desk, place, output)
    ray.shutdown()  # this process is to see neither die; the nodes stay
    desk.stand()
    events = output / "events"
    first = desk.start_driver(fault.place, output, "die" if fault.mode == "driver" else "tell")
    at = wait_for(events, first)
    if fault.mode == "head":
        for name in ("gcs_server", "raylet"):
            for info in desk.cluster.head_node.all_processes[name]:
                info.process.kill()
    watched.hit(at["at"], at["done"])
    first.join(DRIVER_SECONDS)
    watched.facts["driver_ended_after"] = round(time.monotonic() - at["at"], 1)
    if first.is_alive():  # one that still waits for its head is ended, as the page says
        watched.facts["driver_ended_after"] = None
        first.kill()
        first.join()
    if fault.mode == "head":
        desk.stop_cluster()
    desk.stand()
    events.unlink(missing_ok=True)
    second = desk.start_driver(fault.place, output, "pass", at["done"])
    at = wait_for(events, second, finished=True)
    watched.passed = at["at"]
    second.join()
    if second.exitcode:
        raise RuntimeError((output / "driver.log").read_text()[-1500:])


def wait_for(events: Path, driver: Any, finished: bool = False) -> dict[str, float]:
    """Wait for the driver's word about where it is."""
    while True:
        alive = driver.is_alive()
        if events.is_file():
            found: dict[str, float] = json.loads(events.read_text())
            return found
        if not alive and finished:
            return {"at": time.monotonic(), "done": 0.0}
        if not alive:
            said = (events.parent / "driver.log").read_text()[-1000:]
            raise MissedError(f"the driver ended with {driver.exitcode} before the harm: {said}")
        time.sleep(0.02)


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

    def count(self, fault: Fault) -> int:
        """Trials in which the harm was done."""
        return len(self.read()["faults"].get(fault.name, {}).get("trials", []))

    def add(self, fault: Fault, result: dict[str, Any]) -> None:
        """Record a trial."""
        from rl_exit.files import write_json

        print(f"{fault.name}: {json.dumps(result)}", flush=True)
        with self._alone():
            tree = self.read()
            found = tree["faults"].get(fault.name, {"trials": [], "missed": []})
            trials, missed = found["trials"], found["missed"]
            (trials if result["harmed"] else missed).append(result)
            tree["faults"][fault.name] = {**summary(trials), "missed": missed, "trials": trials}
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
        f"{NODES} nodes of {NODE_CPUS}), none for runs in one process; {len(LANES)} trials at a time"
    )


def work(args: argparse.Namespace) -> None:
    """Do the trials of one lane."""
    desk = Desk(args.folder / f"lane-{args.lane}")
    results = Results(args.out, args.command, args.folder / "lock")
    end = time.monotonic() + 60 * args.minutes
    misses: dict[str, int] = {}
    mine = [fault for fault in wanted(args.only) if PLACES[fault.place].kind in LANES[args.lane]]
    try:
        for turn in range(args.runs):
            for fault in mine:
                while results.count(fault) <= turn and misses.get(fault.name, 0) < MISSES and time.monotonic() < end:
                    before = results.count(fault)
                    trial(desk, fault, turn, lambda result, fault=fault: results.add(fault, result))  # type: ignore[misc]
                    misses[fault.name] = misses.get(fault.name, 0) + (results.count(fault) == before)
    finally:
        desk.stop_cluster()


def wanted(words: list[str]) -> list[Fault]:
    """Faults whose name contains one of the words; all if there are none."""
    return [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="trials of each fault")
    parser.add_argument("--only", nargs="*", default=[], help="faults whose name contains one of these words")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "chaos.json")
    parser.add_argument("--fresh", action="store_true", help="forget the trials that the result file already has")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no trial after so many")
    parser.add_argument("--list", action="store_true", help="the faults, and no more")
    parser.add_argument("--lane", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--command", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        print("\n".join(fault.name for fault in wanted(args.only)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.lane is not None:
        work(args)
        return
    if args.fresh:
        args.out.unlink(missing_ok=True)
    given = [word for word in sys.argv[1:] if word != "--fresh"]
    command = " ".join(["python benchmarks/chaos.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="rl-exit-chaos-", ignore_cleanup_errors=True) as folder:
        own = ["--folder", folder, "--command", command]
        lanes = [
            subprocess.Popen([sys.executable, "-u", __file__, *given, *own, "--lane", str(lane)])
            for lane, kinds in enumerate(LANES)
            if any(PLACES[fault.place].kind in kinds for fault in wanted(args.only))
        ]
        try:
            codes = [lane.wait() for lane in lanes]
        except BaseException:
            for lane in lanes:
                lane.terminate()
            for lane in lanes:
                lane.wait()
            raise
    sys.exit(max(codes, default=0))


assert all(fault.role in ("", *TITLES) for fault in FAULTS)

if __name__ == "__main__":
    main()
