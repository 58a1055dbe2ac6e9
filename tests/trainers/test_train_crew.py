"""Ray Train workers that stay for several trainings: faults, errors, progress told once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rl_exit.errors import RunError
from rl_exit.trainers import train_crew
from rl_exit.trainers.local_ray import start_local
from rl_exit.trainers.train_crew import OnUpdate, TrainCrew

pytestmark = pytest.mark.ray


def count_to(payload: dict[str, Any], report: OnUpdate, rank: int, world: int) -> None:
    """Stands for a training: counts, keeps its place in a file, and comes to harm where it is told to."""
    folder = Path(payload["folder"])
    place = folder / f"place-{rank}"
    begin = int(place.read_text()) if place.is_file() else 0
    with (folder / f"starts-{rank}").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    for number in range(begin + 1, payload["total"] + 1):
        report(number, payload["total"], number / payload["total"], {"value": float(number)})
        if number == payload.get("die_at") and rank == 0 and not (folder / "died").exists():
            time.sleep(train_crew.REPORT_SECONDS / 2)  # what was reported has left
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == payload.get("always_die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if number % 5 == 0:
            beside = folder / f"beside-{rank}"  # a worker may die at any time
            beside.write_text(str(number))
            beside.replace(place)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainCrew]:
    import ray

    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    start_local(2, runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}})
    crew = TrainCrew(2, False, tmp_path_factory.mktemp("train"), count_to)
    yield crew
    crew.stop()
    ray.shutdown()


def do(crew: TrainCrew, folder: Path, **payload: Any) -> list[int]:
    folder.mkdir(exist_ok=True)
    seen: list[int] = []
    crew.do({"folder": str(folder), "total": 40} | payload, lambda done, *_: seen.append(done))
    return seen


def pids(folder: Path, rank: int) -> list[str]:
    return (folder / f"starts-{rank}").read_text().split()


def test_trainings_follow_each_other_and_a_killed_worker_goes_on_from_its_place(
    crew: TrainCrew, tmp_path: Path
) -> None:
    assert do(crew, tmp_path / "a") == list(range(1, 41))
    begun = time.monotonic()
    assert do(crew, tmp_path / "b") == list(range(1, 41))
    quick = time.monotonic() - begun
    assert pids(tmp_path / "a", 1) == pids(tmp_path / "b", 1)  # the same worker
    assert quick < 5.0
    # Rank 0 is killed after 23 of which 20 are kept: 21 to 23 are done again and not told again.
    assert do(crew, tmp_path / "c", die_at=23) == list(range(1, 41))
    assert len(set(pids(tmp_path / "c", 0))) == 2


@pytest.mark.slow
def test_a_lost_controller_gives_the_place_of_its_workers_back(crew: TrainCrew, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    killed: list[int] = []

    def kill_controller(done: int, *_: Any) -> None:
        if done >= 10 and not killed:
            killed.append(controller())
            os.kill(killed[0], signal.SIGKILL)

    # The session has as many CPUs as there are workers, and no dashboard: what Ray Train itself would clean up stays.
    crew.do({"folder": str(folder), "total": 400}, kill_controller)
    assert len(pids(folder, 0)) == 2 and (folder / "place-0").read_text() == "400"
    assert controller() != killed[0]


def controller() -> int:
    """Process of Ray Train's controller below a raylet of this process."""

    def stat(pid: str) -> list[str]:
        try:
            return (Path("/proc") / pid / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return ["", "0"]

    found = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and stat(stat(entry.name)[1])[1] == str(os.getpid()) and "Controller" in title(entry)
    ]
    assert len(found) == 1
    return found[0]


def title(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.slow
def test_workers_that_die_at_the_same_place_again_and_again_end_it_in_words(
    crew: TrainCrew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_crew, "ATTEMPTS", 1)
    with pytest.raises(RunError, match=r"lost 1 times without any progress.*lower task_step.batch_size"):
        do(crew, tmp_path / "e", always_die_at=1)
