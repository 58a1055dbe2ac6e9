"""A run that is killed in any phase and started again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import processes
import pytest
from safetensors.numpy import load_file


def train(phase: str, event: str, count: int, *words: str) -> None:
    """The command line, with SIGKILL at the n-th event of a phase.

    "log" is a logged row inside it, "end" the moment when its work is done and its marker not yet written.
    """
    from rl_exit.cli import main
    from rl_exit.trainers import policy_phase, run_directory, supervised

    supervised.CHECKPOINT_SECONDS = policy_phase.CHECKPOINT_SECONDS = 0.0
    left = [count]
    log, run_step = run_directory.MetricLog.log, run_directory.RunDirectory.run_step

    def hit() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def logged(self: Any, *args: Any) -> None:
        log(self, *args)
        if event == "log" and self.phase == phase:
            hit()

    def stepped(self: Any, step: str, work: Any, name: str, round: int = 0) -> Any:
        def wrapped(to: Any) -> Any:
            results = work(to)
            if event == "end" and name == phase:
                hit()
            return results

        return run_step(self, step, wrapped, name, round)

    run_directory.MetricLog.log, run_directory.RunDirectory.run_step = logged, stepped  # type: ignore[method-assign]
    sys.argv = ["rl-exit", "train", "--quiet", "--resume", *words]
    main()


def start(words: list[str], phase: str = "none", event: str = "log", count: int = 1) -> CompletedProcess[str]:
    return processes.run(train, phase, event, count, *words)


def outcome(run: Path) -> dict[str, Any]:
    """What a run achieved, without what the clock decides."""
    results = json.loads((run / "results.json").read_text())
    for name in ("seconds", "timing", "run_name"):
        results.pop(name)
    return results


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, tiny_task: Path
) -> tuple[list[str], Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    words = [
        "name=tiny",
        "task.name=local",
        f"task.path={tiny_task}",
        f"model.backbone={tiny_backbone}",
        "model.policy_width=8",
        "init.epochs=2",
        "init.lr=2e-3",
        "init.batch_size=16",
        "policy.epochs=2",
        "policy.batch_size=64",
        "task_step.batch_size=16",
        "alternation.rounds=1",
    ]
    done = start([*words, f"output_dir={folder}"])
    assert done.returncode == 0, done.stderr
    return words, folder / "tiny"


@pytest.mark.parametrize(
    ("phase", "event", "count"),
    [
        pytest.param("data", "end", 1, marks=pytest.mark.slow),
        pytest.param("init", "log", 9, marks=pytest.mark.slow),
        ("init", "end", 1),
        ("store", "end", 1),
        pytest.param("policy", "log", 2, marks=pytest.mark.slow),
        ("policy", "end", 2),
        ("dev", "end", 1),
        ("task", "log", 5),
        pytest.param("final", "end", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(
    undisturbed: tuple[list[str], Path], tmp_path: Path, phase: str, event: str, count: int
) -> None:
    words, whole = undisturbed
    words = [*words, f"output_dir={tmp_path}"]
    killed = start(words, phase, event, count)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = start(words)
    assert again.returncode == 0, again.stderr
    assert outcome(tmp_path / "tiny") == outcome(whole)
    here, there = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "tiny", whole))
    assert here.keys() == there.keys() and all((here[name] == there[name]).all() for name in here)


def test_another_seed_gives_another_outcome(undisturbed: tuple[list[str], Path], tmp_path: Path) -> None:
    words, whole = undisturbed
    done = start([*words, f"output_dir={tmp_path}", "seed=1"])
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "tiny") != outcome(whole)
