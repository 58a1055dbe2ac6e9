"""A run as a job on three raylets that share nothing but the configured storage: as a user would type it."""

from __future__ import annotations

import asyncio
import json
import platform
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from raylets import Raylets, three_raylets
from typer.testing import CliRunner

from rl_exit.cli import app
from rl_exit.cluster.address import Target
from rl_exit.cluster.jobs import Jobs, _job, plain
from rl_exit.cluster.runs import headline_of, local_runs, stored_runs, with_jobs
from rl_exit.config import load_config
from rl_exit.progress import Silent
from rl_exit.trainers.alternation import train

runner = CliRunner()


def call(*words: str, code: int = 0) -> str:
    """Run a command; returns standard output, or standard error where it fails."""
    result = runner.invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def details(**words: object) -> SimpleNamespace:
    given = {
        "submission_id": "a-1",
        "job_id": None,
        "status": "RUNNING",
        "message": "first\nsecond",
        "metadata": {"rl_exit.run": "a", "rl_exit.place": "/kept"},
        "start_time": 5000,
        "end_time": None,
    }
    return SimpleNamespace(**{**given, **words})


def test_what_ray_says_of_a_job() -> None:
    job = _job(details(status=SimpleNamespace(value="FAILED"), end_time=9000, message="\x1b[31mbad\x1b[0m"))
    assert (job.state, job.run, job.place, job.message, job.seconds) == ("FAILED", "a", "/kept", "bad", 4.0)
    assert job.is_over and not _job(details()).is_over
    assert _job(details(metadata=None, start_time=None, message=None)).seconds is None


def test_leaving_off_to_follow_is_no_fault() -> None:
    class Client:
        closed = False

        async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
            try:
                yield "one"
                asyncio.get_running_loop().call_later(0.05, signal.raise_signal, signal.SIGINT)
                await asyncio.sleep(60)
            finally:
                Client.closed = True

        def get_job_info(self, name: str) -> SimpleNamespace:
            return details()

    jobs = Jobs.__new__(Jobs)
    jobs.target, jobs._client = Target("http://127.0.0.1:8265", "--address"), Client()
    parts = jobs.follow("a-1")
    assert next(parts) == "one"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            next(parts)
    finally:
        signal.signal(signal.SIGINT, before)
    assert Client.closed


def test_no_control_characters_reach_a_terminal() -> None:
    assert plain("a\x1b[1;31mb\x1b[0m\tc\r\n\x07d\x1b]0;title\x07") == "ab\tc\nd0;title"
    assert plain("äöü…\n") == "äöü…\n"


def test_a_run_and_its_job_are_one_row(tmp_path: Path) -> None:
    done = tmp_path / "sweep" / "done"
    (done / "steps").mkdir(parents=True)
    (done / "config.yaml").write_text("")
    (done / "run.json").write_text('{"started": 1.0}')
    (done / "results.json").write_text(
        json.dumps({"test": None, "dev": {"score": 0.5, "full_depth_score": 0.6, "saved_layers": 0.1}})
    )
    (done / "steps" / "init.json").write_text("{}")
    (run,) = local_runs(tmp_path)
    assert (run.name, run.state, run.step, run.started, run.result) == ("sweep/done", "open", "init", 1.0, None)
    (done / "steps" / "report.json").write_text("{}")
    (run,) = local_runs(tmp_path)
    assert run.state == "finished" and run.result == {
        "split": "dev",
        "metric": None,
        "score": 0.5,
        "full_depth_score": 0.6,
        "mean_exit_layer": None,
        "saved_layers": 0.1,
    }
    jobs = [
        _job(details(submission_id="new", metadata={"rl_exit.run": "sweep/done", "rl_exit.place": str(tmp_path)})),
        _job(details(submission_id="old", metadata={"rl_exit.run": "sweep/done", "rl_exit.place": str(tmp_path)})),
        _job(details(submission_id="other", status="FAILED", metadata={"rl_exit.run": "x", "rl_exit.place": "s3://y"})),
    ]
    both = with_jobs([run], jobs, "http://head")
    assert [(row.name, row.job, row.state) for row in both] == [
        ("sweep/done", "new", "running"),
        ("x", "other", "failed"),
    ]
    assert headline_of({}) is None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with three_raylets() as raylets:
        yield raylets


@pytest.fixture
def let_in(cluster: Raylets, monkeypatch: pytest.MonkeyPatch) -> Raylets:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster.url)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(cluster.token_path))
    return cluster


@pytest.mark.ray
@pytest.mark.timeout(600)
class TestOnThreeRaylets:
    def test_a_job_ends_with_the_results_of_the_local_run(
        self, let_in: Raylets, tiny_run: list[str], tmp_path: Path
    ) -> None:
        alone = train(load_config(None, tiny_run), Silent())
        spread = ["sampling.num_env_runners=2", "store.num_workers=2", f"storage_path={tmp_path / 'kept'}"]
        words = [word for word in tiny_run if not word.startswith("output_dir")]
        sent = json.loads(call("submit", *words, *spread, "--json"))
        name = sent["submission_id"]
        log = call("jobs", "logs", "-f", name)  # ends with the job
        assert "round 1: dev" in log and "\x1b" not in log and "\r" not in log
        assert call("jobs", "logs", name).splitlines()[-1] == log.splitlines()[-1]
        status = json.loads(call("jobs", "status", name, "--json"))
        assert status["state"] == "SUCCEEDED" and status["metadata"]["rl_exit.package"] == sent["rl_exit.package"]
        kept = tmp_path / "kept" / "tiny"
        found = json.loads((kept / "results.json").read_text())
        for results in (alone, found):
            del results["timing"], results["seconds"]
        assert found == alone
        model = "model/model.safetensors"
        assert (kept / model).read_bytes() == (tmp_path / "runs" / "tiny" / model).read_bytes()
        (row,) = json.loads(call("runs", str(tmp_path / "none"), "--storage", str(tmp_path / "kept"), "--json"))
        assert (row["state"], row["job"], row["result"]["score"]) == ("finished", name, alone["test"]["score"])
        (stored,) = stored_runs(f"file://{tmp_path / 'kept'}")
        assert stored.result == row["result"]

    @pytest.mark.slow
    def test_a_job_can_be_stopped(self, let_in: Raylets, tiny_run: list[str], tmp_path: Path) -> None:
        words = [word for word in tiny_run if not word.startswith("output_dir")]
        long = ["init.epochs=100000", "name=long", f"storage_path={tmp_path / 'kept'}"]
        name = json.loads(call("submit", *words, *long, "--json"))["submission_id"]
        until = time.monotonic() + 120
        while "task local" not in call("jobs", "logs", name):
            assert time.monotonic() < until
            time.sleep(0.5)
        assert json.loads(call("jobs", "list", "--json"))[0]["name"] == name
        assert "RUNNING" in call("jobs", "status", name)
        assert "STOPPED" in call("jobs", "stop", name)
        assert "was over already" in call("jobs", "stop", name)
        assert "STOPPED" in call("jobs", "logs", "-f", name, code=2)

    def test_what_stands_in_the_way_is_one_message(self, let_in: Raylets, monkeypatch: pytest.MonkeyPatch) -> None:
        words = ["submit", "storage_path=/kept"]
        assert "no job 'nope'" in call("jobs", "status", "nope", code=2)
        monkeypatch.setattr(platform, "python_version", lambda: "3.99.1")
        assert "and this machine 3.99.1" in call(*words, code=2)
        monkeypatch.undo()
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", let_in.url)
        monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
        message = call(*words, code=2)
        assert "401" in message and message.count("\n") == 1
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        assert "403" in call(*words, code=2)
