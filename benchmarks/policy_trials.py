"""Learned policies against confidence on instances new to them (``policy.safe``), of finished runs.

    python benchmarks/policy_trials.py RUN [RUN ...] > benchmarks/results/policy-trials.json

What ``rl-exit train`` does at the end of a policy phase, done again on the state stores that the runs keep; nothing of
dev or test is read.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

from rl_exit.data.instances import Instances
from rl_exit.envs.state_store import StateStore
from rl_exit.files import read_json
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.seeding import derive_seed
from rl_exit.trainers.policy_store import answer_ids, fit_answers
from rl_exit.trainers.run_directory import RunDirectory, versions
from rl_exit.trainers.safe_policy import try_policy


def main() -> None:
    """Try the policies of all runs and print JSON."""
    runs = [RunDirectory.open(Path(word)) for word in sys.argv[1:]]
    if not runs:
        raise SystemExit(__doc__)
    tree = {
        "benchmark": "policy_trials",
        "command": "python benchmarks/policy_trials.py RUN ...",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": [_tried(run) for run in runs],
        "versions": versions(),
    }
    print(json.dumps(tree, indent=1))


def _tried(run: RunDirectory) -> dict[str, Any]:
    c = run.config
    number = read_json(run.path / "results.json")["best_round"]
    task = read_json(run.path / "data" / "task.json")
    kept = run.path / "rounds" / str(number) / "store-train"
    model = EarlyExitModel.from_pretrained(run.path / "model")
    answers = None
    if model.answer_heads is not None:
        seed = derive_seed(c.seed, "answers", number)
        answers = fit_answers(StateStore.open(kept), seed, answer_ids(run.path, c.policy)).answers
    held = Instances.open(run.instances("held")).ids
    started = time.monotonic()
    trial = try_policy(c, kept, model.policy, task["metric"], held, answers)
    if trial is None:
        raise SystemExit(f"{run.path}: too few instances are kept from the exits for a trial")
    return {
        "task": task["name"],
        "metric": task["metric"],
        "seed": c.seed,
        "instances": trial.instances,
        "seconds": time.monotonic() - started,
        **trial.to_dict(),
    }


if __name__ == "__main__":
    main()
