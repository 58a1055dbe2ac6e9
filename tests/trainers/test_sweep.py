"""Doing a sweep: what is open is done, what fails stops nothing else, what is done stays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rl_exit.cli import app
from rl_exit.errors import RunError
from rl_exit.progress import Silent
from rl_exit.report_sweep import render_sweep
from rl_exit.sweep_tables import settings_table, trials_table
from rl_exit.tables import plain_table
from rl_exit.trainers import sweep as module
from rl_exit.trainers.run_directory import RunDirectory
from rl_exit.trainers.sweep import Job, Outcome, Share, do_job, run_sweep
from rl_exit.trainers.sweep_plan import SweepPlan, plan_sweep
from rl_exit.trainers.sweep_results import sweep_results


@pytest.fixture
def plan(tmp_path: Path) -> SweepPlan:
    return plan_sweep(None, ["task.name=sst2"], ["alpha=0.1,0.2"], 2, tmp_path / "sweep")


class Machine:
    """In place of Ray Tune: notes the jobs it is given and does them by writing what a run leaves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: Sequence[str] = (), killed_at: str = "") -> None:
        self.failing, self.killed_at = set(failing), killed_at
        self.done: list[str] = []
        monkeypatch.setattr(module, "_do", self)

    def __call__(
        self, plan: SweepPlan, title: str, jobs: Sequence[Job], display: Any, shares: Any, most: int, outcome: Outcome
    ) -> None:
        for job in jobs:
            if job.name == self.killed_at:
                raise KeyboardInterrupt
            assert job.name in shares
            self.done.append(job.name)
            if job.name in self.failing:
                outcome.failed[job.name] = "no space"
            else:
                finish(plan, job)


def finish(plan: SweepPlan, job: Job) -> None:
    run = Path(job.config["output_dir"]) / job.config["name"]
    (run / "steps").mkdir(parents=True)
    step = "init" if job.kind == "init" else "report"
    (run / "steps" / f"{step}.json").write_text("{}")
    if job.kind == "run":
        alpha, seed = job.config["reward"]["alpha"], job.config["seed"]
        dev = {
            "full_depth_score": 0.9,
            "score": 0.9 - alpha + seed / 100,
            "mean_exit_layer": 6 - 10 * alpha,
            "saved_layers": alpha * 10 / 6,
        }
        (run / "results.json").write_text(
            json.dumps({"dev": dev, "test": None, "seconds": {"init": 1.0, "final": 2.0}})
        )


def shares(plan: SweepPlan) -> dict[str, Share]:
    return {part.label: Share() for part in (*plan.initialisations, *plan.trials)}


def test_initialisations_first_then_trials(plan: SweepPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    results = run_sweep(plan, Silent(), shares(plan), 2)
    assert machine.done == [
        *(start.label for start in plan.initialisations),
        *(f"alpha-{alpha}-seed-{seed}" for alpha in (0.1, 0.2) for seed in (0, 1)),
    ]
    assert [row["state"] for row in results["trials"]] == ["finished"] * 4
    assert json.loads((plan.folder / "sweep.json").read_text()) == results
    first = results["settings"][0]
    assert first["seeds"] == [0, 1] and first["test"] is None
    assert first["dev"]["score"]["mean"] == pytest.approx(0.805)
    assert first["dev"]["score"]["sd"] == pytest.approx(0.01 / 2**0.5)
    assert results["trials"][0]["seconds"] == 3.0


def test_an_interrupted_sweep_goes_on_where_it_was(plan: SweepPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, killed_at="alpha-0.2-seed-0")
    with pytest.raises(KeyboardInterrupt):
        run_sweep(plan, Silent(), shares(plan), 1)
    found = json.loads((plan.folder / "sweep.json").read_text())
    assert [row["state"] for row in found["trials"]] == ["finished", "finished", "open", "open"]
    machine = Machine(monkeypatch)
    run_sweep(plan, Silent(), shares(plan), 1)
    assert machine.done == ["alpha-0.2-seed-0", "alpha-0.2-seed-1"]
    again = Machine(monkeypatch)
    run_sweep(plan, Silent(), shares(plan), 1)
    assert again.done == []


def test_a_failure_stops_only_what_needs_it(plan: SweepPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, failing=[plan.initialisations[1].label, "alpha-0.1-seed-0"])
    results = run_sweep(plan, Silent(), shares(plan), 1)
    assert "alpha-0.1-seed-1" not in machine.done and "alpha-0.2-seed-0" in machine.done
    state = {row["name"]: (row["state"], row["error"]) for row in results["trials"]}
    assert state["alpha-0.1-seed-0"] == ("failed", "no space")
    assert state["alpha-0.1-seed-1"] == ("failed", "its initialisation failed: no space")
    assert state["alpha-0.2-seed-0"] == ("finished", None)
    assert [start["state"] for start in results["initialisations"]] == ["finished", "failed"]
    assert [entry["seeds"] for entry in results["settings"]] == [[], [0]]
    mended = Machine(monkeypatch)
    results = run_sweep(plan, Silent(), shares(plan), 1)
    assert mended.done == [plan.initialisations[1].label, "alpha-0.1-seed-0", "alpha-0.1-seed-1", "alpha-0.2-seed-1"]
    assert all(row["state"] == "finished" for row in results["trials"])


def test_one_process_at_a_time(plan: SweepPlan) -> None:
    with RunDirectory.locked(plan.folder), pytest.raises(RunError, match="another process"):
        run_sweep(plan, Silent(), shares(plan), 1)


def test_tables_and_page(plan: SweepPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = sweep_results(plan, {})
    assert "0 of 2" in plain_table(settings_table(empty).for_terminal())
    assert "4 of 4 runs are not finished" in render_sweep(empty)
    Machine(monkeypatch, failing=["alpha-0.2-seed-1"])
    results = run_sweep(plan, Silent(), shares(plan), 1)
    table = plain_table(settings_table(results).for_terminal())
    assert "80.50 ± 0.71" in table and "1 of 2" in table
    assert "no space" in plain_table(trials_table(results).for_terminal())
    page = render_sweep(results)
    assert 'data-figure="trade-off-dev"' in page and "trade-off-test" not in page
    assert "1 of 4 runs are not finished" in page and "alpha 0.2" in page


def test_a_job_that_fails_says_why_and_keeps_its_log(plan: SweepPlan, tmp_path: Path) -> None:
    config = plan.trials[0].config.model_copy(update={"algorithm": "pgg"})
    log = tmp_path / "logs" / "one.log"
    job = Job("one", "run", config.model_dump(mode="json"), str(log), str(Path.cwd()))
    failed = do_job({"job": vars(job)})["failed"]
    assert "pgg" in failed and failed in log.read_text()


class Heard(Silent):
    """A display that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_what_is_heard_of_trials(tmp_path: Path) -> None:
    import pickle

    from rl_exit.trainers.sweep_watch import Watch

    class Ended:
        def __init__(self, name: str, result: Any = None, error_file: str | None = None) -> None:
            self.config, self.last_result, self.error_file = {"job": {"name": name}}, result, error_file

    display, failed, counted = Heard(), {"earlier": "x"}, list[float]()
    with display.step("trials", 4) as progress:
        watch = Watch(display, progress, 4, failed, lambda: counted.append(1))
    file = tmp_path / "error.txt"
    file.write_text("Traceback\n  File ...\nray.exceptions.OutOfMemoryError: killed\n\n")
    watch.on_trial_complete(0, [], Ended("good", {"failed": None}))
    watch.on_trial_complete(0, [], Ended("bad", {"failed": "no space"}))
    watch.on_trial_error(0, [], Ended("killed", None, str(file)))
    watch.on_trial_error(0, [], Ended("gone", None, str(tmp_path / "absent")))
    assert failed["bad"] == "no space" and failed["killed"] == "ray.exceptions.OutOfMemoryError: killed"
    assert "without a message" in failed["gone"] and "good" not in failed
    assert display.said[0] == "good: done (1 of 4)" and len(display.said) == len(counted) == 4
    assert vars(pickle.loads(pickle.dumps(watch))) == {}  # as Tune does; the display cannot be pickled


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_of_real_runs(
    tiny_backbone: Path, tiny_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)  # paths are relative to where the command is given
    words = [
        "name=tiny",
        "task.name=local",
        f"task.path={tiny_task}",
        "task.max_train=64",
        f"model.backbone={tiny_backbone}",
        "model.policy_width=8",
        "init.epochs=1",
        "policy.epochs=1",
        "alternation.rounds=0",
    ]
    # One trial of the two cannot be done; the other is not disturbed.
    over = ["--over", "algorithm=exact,nowhere.Algorithm", "--max-concurrent", "2"]
    done = CliRunner().invoke(app, ["sweep", *words, *over], catch_exceptions=False)
    assert done.exit_code == 2 and "1 of 2 runs did not finish" in done.stderr
    folder = Path("runs/tiny-algorithm")
    assert f"rl-exit compare {folder}/*/" in done.stdout and (folder / "index.html").is_file()
    results = json.loads((folder / "sweep.json").read_text())
    good, bad = results["trials"]
    assert good["state"] == "finished", good["error"]
    assert good["dev"]["num_instances"] == 64
    assert bad["state"] == "failed" and "nowhere" in bad["error"]
    assert [start["state"] for start in results["initialisations"]] == ["finished"]
    run = RunDirectory.open(folder / good["name"])
    assert run.result("init") == {"taken_from": run.config.init.model}
    assert not (folder / ".tune").exists()
    assert "round 1" in (folder / ".logs" / f"{good['name']}.log").read_text()
