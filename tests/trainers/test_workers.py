"""Groups of workers are kept or come and go, as the plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rl_exit.config import load_config
from rl_exit.trainers import store_workers, workers
from rl_exit.trainers.workers import Workers

KEYS = ("task_step.num_workers", "store.num_workers")


class Crew:
    made: list[Crew] = []  # noqa: RUF012

    def __init__(self, *settings: Any) -> None:
        self.settings, self.stopped, self.started = settings, False, 0
        Crew.made.append(self)

    def start(self) -> None:
        self.started += 1

    def stop(self) -> None:
        assert not self.stopped
        self.stopped = True


@pytest.fixture(autouse=True)
def crews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crew, "made", [])
    monkeypatch.setattr(workers, "train_crew", Crew)
    monkeypatch.setattr(store_workers, "StoreCrew", Crew)


def turns(kept: tuple[str, ...], folder: Path, words: list[str]) -> list[Any]:
    seen = []
    with Workers(load_config(None, words), folder, kept) as run:
        for _ in range(2):
            with run.train() as crew:
                seen.append(crew)
            with run.store() as crew:
                seen.append(crew)
    return seen


WORDS = ["task_step.num_workers=2", "store.num_workers=3", "store.use_gpu=true", "placement.timeout=7"]


def test_kept_workers_are_the_same_in_every_round_and_end_with_the_run(tmp_path: Path) -> None:
    seen = turns(KEYS, tmp_path / "t", WORDS)
    assert seen[:2] == seen[2:] and len(Crew.made) == 2
    assert [crew.settings for crew in seen[:2]] == [(2, False, tmp_path / "t", 7.0), (3, True, 7.0)]
    assert all(crew.stopped for crew in Crew.made)


def test_builders_that_stay_are_started_ahead_of_their_first_turn(tmp_path: Path) -> None:
    with Workers(load_config(None, WORDS), tmp_path, KEYS) as run:
        run.begin_store()
        with run.store() as crew:
            assert Crew.made == [crew] and crew.started == 1
    assert Crew.made[0].stopped
    for words, kept in ((WORDS, KEYS[:1]), ([], KEYS)):  # they come and go, or there are none
        with Workers(load_config(None, words), tmp_path, kept) as run:
            run.begin_store()
    assert len(Crew.made) == 1


def test_workers_that_alternate_end_with_their_turn(tmp_path: Path) -> None:
    seen = turns(("task_step.num_workers",), tmp_path / "t", WORDS)
    assert seen[0] is seen[2] and seen[1] is not seen[3]
    assert all(crew.stopped for crew in Crew.made)


def test_without_workers_everything_is_done_here(tmp_path: Path) -> None:
    assert turns(KEYS, tmp_path / "t", []) == [None] * 4 and Crew.made == []


def test_an_interruption_does_not_wait_for_workers(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Workers(load_config(None, WORDS), tmp_path, KEYS) as run, run.train():
        raise KeyboardInterrupt
    assert not any(crew.stopped for crew in Crew.made)
    with pytest.raises(ValueError), Workers(load_config(None, WORDS), tmp_path, KEYS) as run, run.store():
        raise ValueError
    assert Crew.made[-1].stopped
