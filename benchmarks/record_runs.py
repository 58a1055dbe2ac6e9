"""Put the results of finished runs into benchmarks/results/runs.json.

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
}


def main(folders: list[str]) -> None:
    """Read each run's results.json."""
    recorded: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for folder in folders:
        results = json.loads((Path(folder) / "results.json").read_text())
        recorded[results["run_name"]] = {
            "command": COMMANDS.get(results["run_name"], "rl-exit train"),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "results": results,
        }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(recorded, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
