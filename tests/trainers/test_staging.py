"""A training on a node that does not see the run directory: the same result, through the storage alone."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rl_exit.config import load_config
from rl_exit.errors import RunError
from rl_exit.progress import Silent
from rl_exit.storage import Storage
from rl_exit.trainers import staging
from rl_exit.trainers.alternation import initialise, optim_settings
from rl_exit.trainers.exit_training import ExitTraining, LoraSettings, _train
from rl_exit.trainers.mirror import Mirror
from rl_exit.trainers.staging import at_hand, collect
from rl_exit.trainers.supervised import Rank


def nothing(done: int, total: int, epoch: float, values: dict[str, float]) -> None:
    return


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, tiny_task: Path) -> tuple[Path, str]:
    """A run that stands before its initialisation would be done again, and its storage."""
    folder = tmp_path_factory.mktemp("staging")
    words = [f"output_dir={folder}", "name=run", "task.name=local", f"task.path={tiny_task}", "init.epochs=0"]
    words += [f"model.backbone={tiny_backbone}", "model.policy_width=8"]
    initialise(load_config(None, words), Silent())
    mirror = Mirror(folder / "run", Storage(str(folder / "kept"), 0.0))
    mirror.open()
    mirror.push()
    return folder / "run", str(folder / "kept")


def training(run: Path, storage: str | None) -> ExitTraining:
    config = load_config(None, ["init.epochs=3", "init.batch_size=32", "init.lr=1e-3"])
    return ExitTraining(
        model=str(run / "init" / "model"),
        instances=str(run / "data" / "train.arrow"),
        output=str(run / "out" / "model"),
        checkpoint=str(run / "out" / "checkpoint"),
        weights="weighted",
        settings=optim_settings(config.init),
        lora=LoraSettings(),
        seed=1,
        visits=str(run / "out" / "forgetting.arrow"),
        exchange=None if storage is None else {"root": str(run), "url": storage},
    )


def train_at_hand(job: ExitTraining, dies_after: int | None = None) -> None:
    def report(done: int, total: int, epoch: float, values: dict[str, float]) -> None:
        if done == dies_after:
            raise KeyboardInterrupt

    with at_hand(job, report, is_first=True) as (here, tell):
        _train(here, tell, Rank(), lambda module: module, None)


def results(run: Path) -> dict[str, str]:
    files = [run / "out" / "forgetting.arrow", *sorted((run / "out" / "model").iterdir())]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.name != "README.md"}


def test_where_the_disk_is_seen_nothing_is_copied(prepared: tuple[Path, str]) -> None:
    job = training(*prepared)
    with at_hand(job, nothing, is_first=True) as (here, tell):
        assert here is job and tell is nothing
    assert not collect(job)


def test_without_a_storage_it_is_said(prepared: tuple[Path, str], tmp_path: Path) -> None:
    job = training(tmp_path / "elsewhere", None)
    with pytest.raises(RunError, match="storage_path"), at_hand(job, nothing, is_first=True):
        pass


def test_the_result_is_that_of_a_training_that_sees_the_disk(
    prepared: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies on the way, goes on from the checkpoint in the storage on a third node, and is collected."""
    run, storage = prepared
    monkeypatch.setattr(staging, "CHECKPOINT_SECONDS", 0.0)
    _train(training(run, None), nothing, Rank(), lambda module: module, None)
    expected = results(run)
    shutil.rmtree(run / "out")
    # The same job as seen from a node where the driver's folder is not there.
    away = tmp_path / "away"
    job = replace(training(away, storage), exchange={"root": str(away), "url": storage})
    with pytest.raises(KeyboardInterrupt):
        train_at_hand(job, dies_after=11)
    handed = Storage(storage, 0.0).read_json("exchange/out/checkpoint/latest.json")
    assert handed is not None and set(handed["files"]) >= {"position.json", "model.safetensors"}
    updates: list[int] = []

    def report(done: int, total: int, epoch: float, values: dict[str, float]) -> None:
        updates.append(done)

    with at_hand(job, report, is_first=True) as (here, tell):
        assert here.model != job.model
        _train(here, tell, Rank(), lambda module: module, None)
    assert updates[0] > 1  # it went on
    assert not (away / "out").exists()
    assert collect(training(run, storage))
    assert results(run) == expected
    assert Storage(storage, 0.0).read_json("exchange/out/model/latest.json") is None
    assert not collect(training(run, storage))
