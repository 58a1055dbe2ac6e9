"""Storage that goes away during a step: waited for, the step done again, nothing of the absence believed."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from rl_exit.config import load_config
from rl_exit.errors import RunError, StorageError, UserError
from rl_exit.files import telling_disk_errors, write_text
from rl_exit.trainers import run_directory, storage_watch
from rl_exit.trainers.run_directory import MetricLog, RunDirectory


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setattr(storage_watch, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(run_directory.time, "sleep", lambda seconds: None)
    return RunDirectory.create(load_config(None, [f"output_dir={tmp_path / 'runs'}", "name=r"]))


def go_away(run: RunDirectory, seconds: float) -> None:
    """The mount is gone, and an empty folder of the local disk is in its place."""
    away = run.path.with_name("away")
    run.path.rename(away)
    run.path.mkdir()

    def back() -> None:
        run.path.rename(run.path.with_name("lost"))
        away.rename(run.path)

    threading.Timer(seconds, back).start()


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_during_which_the_storage_was_away_is_done_again(run: RunDirectory, fails: bool) -> None:
    tries: list[int] = []

    def work(log: MetricLog) -> dict[str, int]:
        tries.append(len(tries))
        if len(tries) == 1:
            go_away(run, 0.2)
            if fails:
                (run.path / "init" / "model").read_text()
        write_text(run.path / "data" / "outcome", str(len(tries)))
        return {"tries": len(tries)}

    assert run.run_step("data", work, "data") == {"tries": 2}
    assert (run.path / "data" / "outcome").read_text() == "2"
    assert run.result("data") == {"tries": 2}


def test_an_error_of_the_storage_is_tried_again_another_is_not(run: RunDirectory) -> None:
    tries: list[int] = []

    def failing(number: int, times: int):
        def work(log: MetricLog) -> dict[str, int]:
            tries.append(number)
            if tries.count(number) <= times:
                with telling_disk_errors(run.path):
                    raise OSError(number, "told by the disk")
            return {}

        return work

    run.run_step("a", failing(errno.EIO, 2), "data")
    assert tries == [errno.EIO] * 3
    with pytest.raises(UserError, match="no space left"):
        run.run_step("b", failing(errno.ENOSPC, 1), "data")
    assert tries.count(errno.ENOSPC) == 1
    with pytest.raises(StorageError):
        run.run_step("c", failing(errno.ESTALE, 99), "data")
    assert tries.count(errno.ESTALE) == run_directory.STORAGE_ATTEMPTS


def test_storage_that_stays_away_ends_the_run_in_words(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_watch, "AWAY_SECONDS", 0.0)

    def work(log: MetricLog) -> dict[str, int]:
        run.path.rename(run.path.with_name("gone"))
        return {}

    with pytest.raises(RunError, match="has been away for 0 s; when it is back, --resume goes on"):
        run.run_step("data", work, "data")
