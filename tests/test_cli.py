"""The commands as a user types them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rl_exit.cli import app

runner = CliRunner()
# Every command with its --help; a new command without an example fails here.
COMMANDS = (
    "algorithms",
    "analyse",
    "bench generation",
    "bench inference",
    "bench learning",
    "bench sampling",
    "calibrate",
    "compare",
    "config show",
    "config validate",
    "dial",
    "evaluate",
    "generate",
    "jobs list",
    "jobs logs",
    "jobs status",
    "jobs stop",
    "manifest",
    "predict",
    "profile",
    "prune",
    "report",
    "runs",
    "serve",
    "submit",
    "sweep",
    "tasks",
    "train",
)


def call(*words: str, code: int = 0) -> str:
    """Run a command; returns standard output, or standard error where it fails."""
    result = runner.invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, tiny_task: Path) -> Path:
    """A finished tiny run made by the command."""
    folder = tmp_path_factory.mktemp("runs")
    words = [
        "name=tiny",
        f"output_dir={folder}",
        "task.name=local",
        f"task.path={tiny_task}",
        f"model.backbone={tiny_backbone}",
        "model.policy_width=8",
        "init.epochs=8",
        "init.lr=2e-3",
        "init.batch_size=16",
        "policy.epochs=4",
        "policy.batch_size=64",
        "policy.lr=1e-2",
        "task_step.batch_size=16",
        "alternation.rounds=1",
    ]
    out = call("train", "--quiet", *words)
    assert "saved layers %" in out and str(folder / "tiny" / "model") in out
    return folder / "tiny"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    assert "Example" in call(*command.split(), "--help")


def test_all_commands_are_listed_here() -> None:
    import typer.main

    group: Any = typer.main.get_command(app)
    names = []
    for name, command in group.commands.items():
        names += [f"{name} {inner}" for inner in command.commands] if hasattr(command, "commands") else [name]
    assert sorted(names) == sorted(COMMANDS)


def test_help_is_quick() -> None:
    """In processor time: what a busy machine does to the clock is not ours (.ci/check-wheel takes the clock's)."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    took = []
    for _ in range(3):
        before = spent()
        code = "import sys; sys.argv = ['rl-exit', '--help']; from rl_exit.cli import main; main()"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        took.append(spent() - before)
    assert min(took) < 1.0


def test_results_json_has_what_programs_need(trained: Path) -> None:
    results = json.loads((trained / "results.json").read_text())
    for split in ("dev", "test"):
        found = results[split]
        assert found["saved_layers"] == pytest.approx(1 - found["mean_exit_layer"] / results["num_layers"])
        assert 0 <= found["score"] <= found["oracle_score"] <= 1
    assert {"num_layers", "seed", "versions", "threshold"} <= results.keys() and "torch" in results["versions"]
    assert results["test"]["score"] >= 0.9  # the tiny task can be learned


def test_a_finished_run_is_shown_again_and_left_as_it_is(trained: Path) -> None:
    before = (trained / "model" / "model.safetensors").stat().st_mtime_ns
    config = trained / "config.yaml"
    shown = json.loads(call("train", "--quiet", "--resume", "--json", str(config)))
    assert shown == json.loads((trained / "results.json").read_text())
    assert (trained / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert "--resume" in call("train", "--quiet", str(config), code=2)


def test_evaluate_gives_what_the_run_recorded(trained: Path) -> None:
    recorded = json.loads((trained / "results.json").read_text())
    for target in (trained, trained / "model"):
        found = json.loads(call("evaluate", str(target), "--json"))
        assert found["test"] == pytest.approx(recorded["test"])
    lone = json.loads(call("evaluate", str(trained), "--split", "dev", "--threshold", "1.0", "--json"))
    assert lone["test"] is None and lone["dev"]["mean_exit_layer"] == lone["num_layers"]


def test_predict_says_label_and_layer(trained: Path, tmp_path: Path) -> None:
    model = str(trained / "model")
    rows = json.loads(call("predict", model, "--text", "the old horse", "--text", "a red hammer", "--json"))
    assert [row["label"] for row in rows] == ["animal", "tool"]
    assert all(1 <= row["exit_layer"] <= 3 and sum(row["probabilities"]) == pytest.approx(1, abs=1e-5) for row in rows)
    file = tmp_path / "texts.txt"
    file.write_text("the old horse\na red hammer\n")
    assert json.loads(call("predict", model, "--file", str(file), "--json")) == rows
    assert "exit layer" in call("predict", model, "--file", str(file))


def test_predict_takes_a_run_and_one_text_a_line(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes("\ufeffthe old\u2028horse\x0b\r\n\na red hammer".encode())
    rows = json.loads(call("predict", str(trained), "--file", str(file), "--json"))
    assert [row["label"] for row in rows] == ["animal", "tool"]
    assert rows[1] == json.loads(call("predict", str(trained / "model"), "--text", "a red hammer", "--json"))[0]
    for content, said in (("a\tb\nc\n", "lines with 0 and 1 tabs"), ("a\tb\tc\n", "lines with 2 tabs")):
        file.write_text(content)
        assert said in call("predict", str(trained), "--file", str(file), code=2)


def test_report_can_be_written_again(trained: Path) -> None:
    (trained / "report" / "index.html").unlink()
    assert call("report", str(trained)).strip() == str(trained / "report" / "index.html")
    assert "<html" in (trained / "report" / "index.html").read_text()


def test_tasks_lists_and_describes() -> None:
    assert "stackoverflow" in call("tasks")
    assert "GLUE" in call("tasks", "sst2")
    assert {"docstrings", "rte", "ag_news"} <= {task["name"] for task in json.loads(call("tasks", "--json"))}
    assert "Did you mean 'sst2'" in call("tasks", "sst", code=2)


def test_config_show_is_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(call("config", "show", "policy.epochs=9"))
    assert "valid; the run goes to" in call("config", "validate", str(file))
    assert "policy.epochs" in call("config", "show", "--keys")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "polcy.lr=1"), "unknown key 'polcy'. Did you mean 'policy'?"),
        (("train", "policy.epochs=x"), "policy.epochs = 'x' (str): input should be a valid integer"),
        (("train", "nowhere.yaml"), "nowhere.yaml: no such configuration file"),
        (("train", "a.yaml", "b.yaml"), "one configuration file is accepted"),
        (("train", "algorithm=pgg"), "pgg"),
        (("train", "algorithm=no_such_module.Algorithm"), "algorithm 'no_such_module.Algorithm': cannot be imported"),
        (("train", "algorithm=rl_exit.errors.UserError"), "a subclass of"),
        (("train", "task.name=docstrngs"), "docstrings"),
        (("train", "task.name=local", "task.path=nowhere"), "nowhere"),
        (("evaluate", "nowhere"), "nowhere"),
        (("predict", "nowhere", "--text", "x"), "nowhere"),
        (("predict", "nowhere"), "give either --text or --file"),
        (("predict", "nowhere", "--file", "nofile"), "nofile: no such file"),
        (("report", "nowhere"), "nowhere"),
        (("config", "validate", "seed=-1"), "seed = -1"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = call(*words, code=2)
    assert said in message and "Traceback" not in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def _csv(folder: Path, rows: list[str], header: str = "text,label") -> Path:
    file = folder / "data.csv"
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


GOOD = [f"word {i} cat,{'ab'[i % 2]}" for i in range(40)]


@pytest.mark.parametrize(
    ("header", "rows", "words", "said"),
    [
        ("body,label", GOOD, (), "body"),
        ("text,label", [f"{i},a" for i in range(20)] + ["3,b"] * 20, (), "number"),
        ("text,label", GOOD, ("task.labels=[x, y]",), "'a'"),
        ("text,label", [], (), "data.csv"),
        ("text,label", [row[:-1] + "a" for row in GOOD], (), "class"),
    ],
    ids=["missing column", "text of numbers", "label outside the classes", "empty split", "one class"],
)
def test_bad_data(
    tmp_path: Path, tiny_backbone: Path, header: str, rows: list[str], words: tuple[str, ...], said: str
) -> None:
    file = _csv(tmp_path, rows, header)
    message = call(
        "train",
        "--quiet",
        "task.name=local",
        f"task.path={file}",
        f"model.backbone={tiny_backbone}",
        f"output_dir={tmp_path / 'runs'}",
        *words,
        code=2,
    )
    assert said in message and "Traceback" not in message


@pytest.mark.parametrize("contents", [b"[1]", b"a: [", b"name: 2020-13-45", b"\xff", b"task: 3"])
def test_a_model_with_a_damaged_training_yaml(trained: Path, tmp_path: Path, contents: bytes) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    (folder / "training.yaml").write_bytes(contents)
    message = call("evaluate", str(folder), code=2)
    assert "training.yaml" in message and message.count("\n") == 1


@pytest.mark.parametrize("contents", ["", "{}", "[]"])
def test_a_finished_run_with_damaged_results(trained: Path, tmp_path: Path, contents: str) -> None:
    import shutil

    shutil.copytree(trained, tmp_path / "tiny")
    (tmp_path / "tiny" / "results.json").write_text(contents)
    words = [str(trained / "config.yaml"), f"output_dir={tmp_path}"]
    assert "results.json" in call("train", "--resume", "--quiet", *words, code=2)


def test_closed_streams_are_no_obstacle(tmp_path: Path) -> None:
    command = f"'{sys.executable}' -c 'from rl_exit.cli import main; main()' config show >&- <&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("damage", ["truncated", "no folder", "no model", "hub id", "max_tokens", "dtype", "nan"])
def test_bad_models(trained: Path, tmp_path: Path, damage: str) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    target = str(folder)
    if damage == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "nan":
        from safetensors.torch import load_file, save_file

        weights = {name: value * float("nan") for name, value in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif damage in ("max_tokens", "dtype"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {damage: []}))
    elif damage == "no folder":
        target = str(tmp_path / "other")
    elif damage == "no model":
        (folder / "config.json").unlink()
    else:
        target = "some-owner/some-model"
    message = call("predict", target, "--text", "x", code=2)
    assert (target in message or damage == "max_tokens") and "Traceback" not in message


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_no_space_on_the_device(tmp_path: Path, tiny_backbone: Path, tiny_task: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        words = ["task.name=local", f"task.path={tiny_task}", f"model.backbone={tiny_backbone}", f"output_dir={small}"]
        message = call("train", "--quiet", *words, code=2)
        assert "no space left" in message and "Traceback" not in message
        left = [path for path in small.rglob("*") if path.name.startswith(".") and path.suffix != ".lock"]
        assert not left, left
    finally:
        subprocess.run(["umount", str(small)], check=True)
