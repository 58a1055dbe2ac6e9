"""What a round costs on top of its own work when it is done by workers elsewhere.

python benchmarks/overhead.py [--out benchmarks/results/overhead.json]

The same tiny run twice, in this process and distributed (2 env runners, 2 store builders, 2 Ray Train workers; the
workers are kept between rounds, as the plan does where there is room). The overhead of a round is the time of its steps
(state store, policy phase, dev, task step) less that of the same steps in this process, with as many updates of equal
batches. The work itself is small, so what remains is starting, handing over, exchanging gradients and stopping. The
initialisation, which starts the workers of Ray Train, and the first store, which starts the builders, are part of it
where they fall. On a machine with other work the figures are too high: the load average is recorded with them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from chaos_desk import KEPT, PATHS, ROOT, Desk, words

ROUNDS = 3
LIMIT = 5.0  # seconds of a round, that it is held against
PARTS = ("store", "policy", "dev", "task")
WORKERS = ["sampling.num_env_runners=2", "store.num_workers=2", "task_step.num_workers=2"]


def seconds(folder: Path, name: str, own: list[str], kept: tuple[str, ...]) -> dict[str, float]:
    """Seconds of every step of a run."""
    from rl_exit.config import load_config
    from rl_exit.progress import Silent
    from rl_exit.trainers.alternation import train

    given = [*words(folder, "local", folder / name), *own, f"alternation.rounds={ROUNDS}", "policy.epochs=2"]
    config = load_config(None, given)
    train(config, Silent(), kept=kept)
    steps = (folder / name / "tiny" / "steps").glob("[!.]*.json")
    return {tree["step"]: tree["seconds"] for tree in map(json.loads, (path.read_text() for path in steps))}


def main() -> None:
    import ray

    from rl_exit.files import write_json
    from rl_exit.trainers.local_ray import start_local
    from rl_exit.trainers.run_directory import versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "overhead.json")
    args = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        Desk(folder)  # model and task
        here = seconds(folder, "here", ["init.batch_size=32", "task_step.batch_size=32"], ())
        os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)
        start_local(6, logging_level="ERROR")
        spread = seconds(folder, "spread", WORKERS, KEPT)
        ray.shutdown()
    rounds: list[dict[str, Any]] = []
    for number in range(1, ROUNDS + 1):
        steps = [f"round-{number}-{part}" for part in PARTS]
        parts = {step.rsplit("-", 1)[1]: round(spread[step] - here[step], 2) for step in steps}
        rounds.append({"round": number, "overhead": round(sum(parts.values()), 2), **parts})
    tree = {
        "command": "python benchmarks/overhead.py",
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "load_average": round(max(before, os.getloadavg()[0]), 1),
        "versions": versions(),
        "initialisation": round(spread["init"] - here["init"], 2),
        "limit": LIMIT,
        "largest": max(found["overhead"] for found in rounds),
        "rounds": rounds,
        "seconds_here": here,
        "seconds_spread": spread,
    }
    write_json(args.out, tree)
    print(json.dumps({name: tree[name] for name in ("initialisation", "rounds", "largest", "limit", "load_average")}))


if __name__ == "__main__":
    main()
