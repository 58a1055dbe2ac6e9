"""The dial beside policies trained for one price each, recorded.

python benchmarks/dial.py RUN ... [--out benchmarks/results/dial.json]

For each run what ``rl-exit dial RUN --json`` prints, made on a copy of its model: the run is left as it is. One thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from rl_exit import __version__  # noqa: E402
from rl_exit.deployment import make_dial, model_folder  # noqa: E402
from rl_exit.files import write_json  # noqa: E402
from rl_exit.progress import Terminal  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "dial.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    started, models = time.process_time(), {}
    for run in given.runs:
        with tempfile.TemporaryDirectory(prefix="rl-exit-dial-") as folder:
            copied = Path(folder) / run.name
            shutil.copytree(model_folder(run), copied / "model")
            (copied / "data").mkdir()
            shutil.copy(run / "data" / "held.arrow", copied / "data" / "held.arrow")
            models[run.resolve().name] = make_dial(copied, Terminal())
    tree = {
        "command": " ".join(["python benchmarks/dial.py", *models]),
        "date": date.today().isoformat(),
        "processor_seconds": round(time.process_time() - started, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"rl-exit": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "models": models,
    }
    write_json(given.out, tree)


if __name__ == "__main__":
    main()
