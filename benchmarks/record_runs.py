"""Put the results of finished runs into benchmarks/results/runs.json; a decoder's into writing-<name>.json.

Run ``python benchmarks/record_runs.py runs/sst2 ...``; runs already recorded under the same name are replaced. Then
``python benchmarks/render.py`` rewrites the tables.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "runs.json"
COMMANDS = {
    "docstrings": "make run",
    "stackoverflow": "rl-exit train configs/stackoverflow.yaml task.path=...",
    "sst2": "rl-exit train configs/sst2.yaml task.path=...",
    "mrpc": "rl-exit train configs/mrpc.yaml task.path=...",
    "alpaca": "rl-exit train configs/alpaca.yaml model.backbone=stories260k task.path=... task.test_path=... "
    "init.epochs=3 model.max_length=256 task.max_train=4000 task.max_dev=200 task.max_test=300 "
    "generation.samples=100 generation.max_new_tokens=48",
    **{
        f"stories-{seed}": f"rl-exit train configs/stories.yaml model.backbone=stories260k task.path=... seed={seed} "
        "generation.samples=100 generation.max_new_tokens=40"
        for seed in range(3)
    },
}


def main(folders: list[str]) -> None:
    """Read each run's results.json."""
    recorded: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for folder in folders:
        results = json.loads((Path(folder) / "results.json").read_text())
        results["run_name"] = results["run_name"].removesuffix("-seed0")
        entry = {
            "command": COMMANDS.get(results["run_name"], "rl-exit train"),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "results": results,
        }
        if results.get("kind") == "generation":
            results["backbone"] = Path(results["backbone"]).name  # a folder of this machine says nothing elsewhere
            path = RESULTS.with_name(f"writing-{results['run_name']}.json")
            path.write_text(json.dumps(entry, indent=2) + "\n")
            continue
        recorded[results["run_name"]] = entry
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(recorded, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
