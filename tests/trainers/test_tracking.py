"""Trackers: stand-ins with the two libraries' calls; the real ones are used where they are installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rl_exit.config import load_config
from rl_exit.errors import ConfigError
from rl_exit.progress import Silent
from rl_exit.trainers.alternation import train
from rl_exit.trainers.run_directory import MetricLog, RunDirectory
from rl_exit.trainers.tracking import RayMetrics, check_tracking, group_of, tracked


def run_directory(tmp_path: Path, word: str) -> RunDirectory:
    config = load_config(None, [f"output_dir={tmp_path}", "name=r", f"tracking={word}", "reward.alpha=0.03"])
    return RunDirectory.create(config, resume=True)


class FakeMLflow:
    """Keeps what the real one would, by run."""

    def __init__(self) -> None:
        self.params: dict[str, dict[str, str]] = {}
        self.metrics: dict[str, list[tuple[str, float, int]]] = {}
        self.ended: list[tuple[str, str]] = []
        self.now = ""

    def set_experiment(self, name: str) -> None:
        assert name == "rl-exit"

    def start_run(self, run_id: str | None = None, run_name: str | None = None) -> Any:
        self.now = run_id or f"id-{len(self.metrics)}"
        self.metrics.setdefault(self.now, [])
        return SimpleNamespace(info=SimpleNamespace(run_id=self.now))

    def log_params(self, params: dict[str, str]) -> None:
        assert self.now not in self.params
        self.params[self.now] = params

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics[self.now] += [(name, value, step) for name, value in metrics.items()]

    def end_run(self, status: str) -> None:
        self.ended.append((self.now, status))


def test_mlflow_gets_every_row_and_a_resumed_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    run = run_directory(tmp_path, "mlflow")
    with pytest.raises(ZeroDivisionError), tracked(run):
        MetricLog("policy", 2, tmp_path / "tb", run.loggers).log(7, 0.5, {"return": 0.25, "exits_1": 0.5})
        raise ZeroDivisionError
    with tracked(run_directory(tmp_path, "mlflow")):
        pass
    assert fake.metrics == {"id-0": [("policy-2/return", 0.25, 7), ("policy-2/exits_1", 0.5, 7)]}
    assert fake.params["id-0"]["reward.alpha"] == "0.03"
    assert fake.ended == [("id-0", "FAILED"), ("id-0", "FINISHED")]


class FakeWandB:
    def __init__(self, broken: bool = False) -> None:
        self.broken, self.calls, self.rows, self.axes = broken, [], [], []
        self.id = "w1"

    def init(self, **settings: Any) -> FakeWandB:
        self.calls.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: dict[str, float]) -> None:
        if self.broken:
            raise OSError("no network")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.rows.append({"exit": exit_code})


def test_wandb_gets_an_axis_for_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        run = run_directory(tmp_path, "wandb")
        with tracked(run):
            for tell in run.loggers:
                tell("init", 0, 3, {"loss": 1.5})
        assert run.loggers == []
    assert fake.rows == [{"init/step": 3, "init/loss": 1.5}, {"exit": 0}] * 2
    assert fake.axes[:2] == [("init/step", None), ("init/*", "init/step")]
    assert [(call["id"], call["resume"]) for call in fake.calls] == [(None, None), ("w1", "allow")]


def test_a_tracker_that_fails_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB(broken=True))
    run = run_directory(tmp_path, "wandb")
    with tracked(run):
        for step in range(3):
            run.loggers[-1]("policy", 1, step, {"return": 0.0})
    assert [record.getMessage() for record in caplog.records] == [
        "tracking=wandb failed and is left out from here on: no network"
    ]


@pytest.mark.parametrize("word", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_told_before_anything_starts(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, word, None)
    config = load_config(None, [f"output_dir={tmp_path}", f"tracking={word}"])
    with pytest.raises(ConfigError, match=rf"not installed; pip install 'rl-exit\[{word}\]'"):
        train(config, Silent())
    assert list(tmp_path.iterdir()) == []
    check_tracking(load_config())


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = run_directory(tmp_path, "mlflow")
    with tracked(run):
        run.loggers[-1]("policy", 1, 4, {"return": 0.5})
    (found,) = mlflow.search_runs(experiment_names=["rl-exit"], output_format="list")
    assert found.data.metrics["policy-1/return"] == 0.5 and found.info.status == "FINISHED"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = run_directory(tmp_path, "wandb")
    with tracked(run):
        run.loggers[-1]("policy", 1, 4, {"return": 0.5})
    assert list((tmp_path / "r" / "wandb").glob("offline-run-*/*.wandb"))


def test_ray_gauges_carry_run_phase_round_and_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.util.metrics

    seen: list[tuple[str, float, dict[str, str]]] = []

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert set(tags) == set(self.keys)
            seen.append((self.name, value, tags))

    monkeypatch.setattr(ray.util.metrics, "Gauge", Gauge)
    RayMetrics("docs").log("policy", 2, 9, {"return": 0.5, "exits_3": 0.25})
    assert [(name, value, tags["round"], tags["layer"]) for name, value, tags in seen] == [
        ("rl_exit_return", 0.5, "2", ""),
        ("rl_exit_exits", 0.25, "2", "3"),
        ("rl_exit_step", 9.0, "2", ""),
    ]
    assert group_of("final", 0) == "final"
