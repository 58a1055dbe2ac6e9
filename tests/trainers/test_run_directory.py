from __future__ import annotations

from pathlib import Path

import pytest

from rl_exit.config import RunConfig, load_config
from rl_exit.errors import ConfigError, RunError
from rl_exit.trainers.run_directory import MetricLog, RunDirectory


def config(folder: Path, *words: str) -> RunConfig:
    return load_config(None, [f"output_dir={folder}", "name=a", *words])


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path)).run_step("data", lambda log: {}, "data")
    (tmp_path / "a" / "precious").write_text("x")
    with pytest.raises(RunError, match=r"--resume.*--overwrite"):
        RunDirectory.create(config(tmp_path))
    assert (tmp_path / "a" / "precious").exists()
    RunDirectory.create(config(tmp_path), resume=True)
    assert (tmp_path / "a" / "precious").exists()
    RunDirectory.create(config(tmp_path), overwrite=True)
    assert not (tmp_path / "a" / "precious").exists()


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml and thesis.tex", ""])
@pytest.mark.parametrize("asked", ["", "resume", "overwrite"])
def test_what_is_no_run_is_never_touched(tmp_path: Path, name: str, asked: str) -> None:
    if name:
        (tmp_path / "a").mkdir()
        for file in name.split(" and "):
            (tmp_path / "a" / file).write_text("x")
    else:
        (tmp_path / "a").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match="is no run directory"):
        RunDirectory.create(config(tmp_path), resume=asked == "resume", overwrite=asked == "overwrite")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kept", ["model", "rounds", "results.json", "init/model"])
def test_a_run_that_lost_its_markers_is_not_overwritten_unasked(tmp_path: Path, kept: str) -> None:
    run = RunDirectory.create(config(tmp_path))
    (tmp_path / "a" / kept).mkdir(parents=True)
    with pytest.raises(RunError, match=r"--resume.*--overwrite"):
        RunDirectory.create(config(tmp_path))
    run.discard_if_empty()
    assert (tmp_path / "a" / kept).exists()


@pytest.mark.parametrize("left", [(), ("run.json",), (".run.json.x1",), ("run.json", ".config.yaml.x1")])
def test_what_a_kill_at_the_very_start_leaves_is_no_obstacle(tmp_path: Path, left: tuple[str, ...]) -> None:
    (tmp_path / "a" / "steps").mkdir(parents=True)
    for name in left:
        (tmp_path / "a" / name).write_text("x")
    RunDirectory.create(config(tmp_path), resume=True)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.yaml", "run.json", "steps"]


@pytest.mark.parametrize("contents", ["", "{}", "[]", '{"step": "init", "seconds": "x", "results": {}}'])
def test_damaged_markers_are_named(tmp_path: Path, contents: str) -> None:
    run = RunDirectory.create(config(tmp_path))
    (tmp_path / "a" / "steps" / "init.json").write_text(contents)
    for ask in (lambda: run.result("init"), run.seconds):
        with pytest.raises(RunError, match=r"steps/init\.json"):
            ask()


@pytest.mark.parametrize("contents", [b"a: [", b"\xff", b"[1]", b"name: 2020-13-45"])
def test_a_damaged_configuration_is_named(tmp_path: Path, contents: bytes) -> None:
    RunDirectory.create(config(tmp_path))
    (tmp_path / "a" / "config.yaml").write_bytes(contents)
    with pytest.raises(ConfigError, match=r"a/config\.yaml"):
        RunDirectory.create(config(tmp_path), resume=True)


def test_resuming_with_another_configuration_names_the_keys(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path, "policy.epochs=5"))
    with pytest.raises(RunError, match=r"policy\.epochs \(5 there, 9 given\)"):
        RunDirectory.create(config(tmp_path, "policy.epochs=9"), resume=True)
    # What does not change the result may differ.
    RunDirectory.create(config(tmp_path, "policy.epochs=5", "sampling.num_env_runners=2"), resume=True)


def test_a_step_is_done_once(tmp_path: Path) -> None:
    run = RunDirectory.create(config(tmp_path))
    calls = []

    def work(log: MetricLog) -> dict[str, int]:
        calls.append(1)
        log.log(1, 0.5, {"loss": 2.0})
        return {"x": 7}

    assert run.run_step("init", work, "init") == {"x": 7} == run.run_step("init", work, "init")
    assert len(calls) == 1 and set(run.seconds()) == {"init"}
    run.gather_metrics()
    import pyarrow.parquet as pq

    rows = pq.read_table(tmp_path / "a" / "metrics.parquet").to_pylist()
    assert [(r["phase"], r["step"], r["epoch"], r["metric"], r["value"]) for r in rows] == [
        ("init", 1, 0.5, "loss", 2.0)
    ]


def test_an_attempt_without_a_finished_step_is_no_run_to_protect(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path))
    run = RunDirectory.create(config(tmp_path, "policy.epochs=9"))
    assert run.config.policy.epochs == 9
    run.discard_if_empty()
    assert not (tmp_path / "a").exists()
    run = RunDirectory.create(config(tmp_path))
    run.run_step("data", lambda log: {}, "data")
    run.discard_if_empty()
    assert (tmp_path / "a" / "config.yaml").exists()


def test_a_failed_step_stays_open(tmp_path: Path) -> None:
    run = RunDirectory.create(config(tmp_path))
    with pytest.raises(ZeroDivisionError):
        run.run_step("init", lambda log: {"x": 1 // 0}, "init")
    assert run.result("init") is None


def test_two_processes_cannot_work_on_one_run(tmp_path: Path) -> None:
    with (
        RunDirectory.locked(tmp_path / "a"),
        pytest.raises(RunError, match="another process is at work"),
        RunDirectory.locked(tmp_path / "a"),
    ):
        pass


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run directory"):
        RunDirectory.open(tmp_path / "nothing")
