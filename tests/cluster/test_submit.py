from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import pytest
import yaml
from dashboards import dashboard
from typer.testing import CliRunner

from rl_exit.cli import app
from rl_exit.cluster import submit
from rl_exit.cluster.address import Target
from rl_exit.cluster.package import CONFIG_NAME
from rl_exit.cluster.submit import EntryPoint, parse_metadata, parse_resources, plan_submission, send
from rl_exit.config import load_config
from rl_exit.errors import UserError

STORED = "storage_path=s3://bucket/runs"


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def sent_config(archive: bytes) -> dict[str, object]:
    with zipfile.ZipFile(io.BytesIO(archive)) as content:
        return yaml.safe_load(content.read(CONFIG_NAME))


def test_what_is_sent_is_what_was_shown_and_is_uploaded_once() -> None:
    plan = plan_submission(
        load_config(None, [STORED, "seed=3"]),
        runtime_env={"env_vars": {"A": "1"}},
        entry_point=EntryPoint(num_cpus=1, memory=5_000_000, resources={"disk": 0.5}),
        metadata={"team": "x"},
    )
    shown = plan.shown("somewhere")
    with dashboard() as board:
        assert send(plan, Target(board.url, "--address")) == plan.submission_id
        assert send(plan, Target(board.url, "--address")) == plan.submission_id
    body = board.submitted[0]
    assert body["entrypoint"] == shown["entrypoint"] == "python -m rl_exit train rl-exit-job.yaml --resume"
    assert {key: body[key] for key in shown["entry_point_resources"]} == shown["entry_point_resources"]
    assert body["metadata"] == shown["metadata"] and body["metadata"]["rl_exit.run"] == "docstrings"
    assert body["metadata"]["rl_exit.package"] == shown["package"]["sha256"] and body["metadata"]["team"] == "x"
    uri = body["runtime_env"].pop("working_dir")
    assert body["runtime_env"] == {"env_vars": {"A": "1"}} and uri.startswith("gcs://")
    assert [method for method, path in board.seen if path.startswith("/api/packages")].count("PUT") == 1
    config = sent_config(board.uploaded[uri.removeprefix("gcs://")])
    assert config == shown["config"] and config["seed"] == 3
    assert config["cluster"] == "auto" and config["name"] == "docstrings"  # joins the cluster it is on


NO_AGENT = "No available agent to submit job, please try again later."  # as Ray 2.60 says it


def test_a_head_that_has_just_started_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "AGENT_WAIT", 0.01)
    plan = plan_submission(load_config(None, [STORED]))
    exists = f"ValueError: Job with submission_id {plan.submission_id} already exists. Please use another."
    with dashboard(refusing=[NO_AGENT, NO_AGENT]) as board:
        assert send(plan, Target(board.url, "--address")) == plan.submission_id
        assert len(board.submitted) == 1
    with dashboard(refusing=[NO_AGENT, exists]) as board:  # the agent was slow, and has begun it
        assert send(plan, Target(board.url, "--address")) == plan.submission_id
    for said in ([exists], ["out of memory"]):
        with dashboard(refusing=said) as board, pytest.raises(UserError, match=said[0][:12]):
            send(plan, Target(board.url, "--address"))
    monkeypatch.setattr(submit, "AGENT_SECONDS", 0.0)
    with dashboard(refusing=[NO_AGENT] * 9) as board, pytest.raises(UserError, match="No available agent"):
        send(plan, Target(board.url, "--address"))


def test_nothing_is_sent_to_a_cluster_of_another_version() -> None:
    with dashboard(ray_version="2.1.0") as board:
        with pytest.raises(UserError, match=r"Ray 2\.1\.0"):
            send(plan_submission(load_config(None, [STORED])), Target(board.url, "--address"))
        assert not board.uploaded and not board.submitted


def test_the_shell_sees_no_word_of_the_user() -> None:
    words = [STORED, "name=a; rm -rf $HOME `x`", "task.path=/data/$(y)"]
    plan = plan_submission(load_config(None, words))
    assert re.fullmatch(r"[A-Za-z0-9_./ -]+", plan.entrypoint)
    assert re.fullmatch(r"[a-z0-9-]+", plan.submission_id)
    for python in ("python; x", "$(x)", "a b", ""):
        with pytest.raises(UserError, match="--python"):
            plan_submission(load_config(None, [STORED]), python=python)


def test_results_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output_dir=runs would lie in the job's own folder"):
        plan_submission(load_config())
    with pytest.raises(UserError, match="storage_path=runs: on a cluster an absolute path"):
        plan_submission(load_config(None, ["storage_path=runs"]))
    plan_submission(load_config(None, [f"output_dir={tmp_path}"]))


def test_relative_paths_travel_and_absolute_ones_are_the_cluster_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/train.jsonl").write_text("{}")
    Path("texts.csv").write_text("text,label\n")
    plan = plan_submission(load_config(None, [STORED, "task.name=local", "task.path=mine", "model.backbone=a/b"]))
    assert plan.config.task.path == "rl-exit-data/task-path/mine" and plan.config.model.backbone == "a/b"
    assert "rl-exit-data/task-path/mine/train.jsonl" in plan.package.files
    plan = plan_submission(load_config(None, [STORED, "task.name=local", "task.path=texts.csv"]))
    assert "rl-exit-data/task-path/texts.csv" in plan.package.files
    plan = plan_submission(load_config(None, [STORED, "task.name=local", f"task.path={tmp_path / 'mine'}"]))
    assert plan.config.task.path == str(tmp_path / "mine")
    assert not [name for name in plan.package.files if name.startswith("rl-exit-data")]


def test_words_of_the_options() -> None:
    assert parse_resources(["disk=0.5", "accelerator_type:A100=1"]) == {"disk": 0.5, "accelerator_type:A100": 1.0}
    assert parse_metadata(["a=b=c"]) == {"a": "b=c"}
    for word in ("disk", "disk=", "disk=x", "=1", "CPU=1", "disk=0"):
        with pytest.raises(UserError, match="--resource"):
            parse_resources([word])
    with pytest.raises(UserError, match="--metadata"):
        parse_metadata(["a"])
    with pytest.raises(UserError, match="the run's own"):
        plan_submission(load_config(None, [STORED]), metadata={"rl_exit.run": "x"})


def test_dry_run_sends_nothing_and_needs_no_cluster() -> None:
    result = CliRunner().invoke(app, ["submit", "--dry-run", STORED, "--env", "MY_TOKEN=abc", "--num-cpus", "2"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["runtime_env"]["env_vars"] == {"MY_TOKEN": "***"} and "abc" not in result.output
    assert shown["entry_point_resources"] == {"entrypoint_num_cpus": 2.0}
    assert shown["package"]["files"] == len(shown["package"]["names"]) > 100


def test_a_bad_configuration_is_refused_before_a_cluster_is_asked() -> None:
    for word, said in (("algorithm=ppoo", "Did you mean 'ppo'"), ("sede=1", "seed")):
        result = CliRunner().invoke(app, ["submit", STORED, word, "--address", "http://127.0.0.1:1"])
        assert result.exit_code == 2 and said in result.stderr
