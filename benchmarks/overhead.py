"""What a round costs on top of its own work when it is done by workers elsewhere.

python benchmarks/overhead.py [--out benchmarks/results/overhead.json]

The same tiny run twice, in this process and distributed (2 env runners, 2 store builders, 2 Ray Train workers; the
workers are kept between rounds, as the plan does where there is room). The overhead of a round is the time of its steps
(state store, policy phase, dev, task step) less that of the same steps in this process. The work itself is small, so
what remains is starting, handing over and stopping. The first round and the initialisation start the workers.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
import chaos  # noqa: E402

ROUNDS = 3
PARTS = ("store", "policy", "dev", "task")
SPREAD = ["sampling.num_env_runners=2", "store.num_workers=2", "task_step.num_workers=2"]


def seconds(folder: Path, name: str, words: list[str], kept: tuple[str, ...]) -> dict[str, float]:
    """Seconds of every step of a run."""
    from rl_exit.config import load_config
    from rl_exit.progress import Silent
    from rl_exit.trainers.alternation import train

    desk = chaos.Desk(folder / name)
    config = load_config(
        None, [*desk.words("none", folder / name), *words, f"alternation.rounds={ROUNDS}", "policy.epochs=2"]
    )
    train(config, Silent(), kept=kept)
    steps = (folder / name / "tiny" / "steps").glob("[!.]*.json")
    return {tree["step"]: tree["seconds"] for tree in map(json.loads, (path.read_text() for path in steps))}


def main() -> None:
    import ray

    from rl_exit.files import write_json
    from rl_exit.trainers.run_directory import versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "overhead.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = seconds(Path(folder), "here", ["init.batch_size=32", "task_step.batch_size=32"], ())
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])
        ray.init("local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        spread = seconds(Path(folder), "spread", SPREAD, ("store.num_workers", "task_step.num_workers"))
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
        "load_average": round(os.getloadavg()[0], 1),
        "versions": versions(),
        "initialisation": round(spread["init"] - here["init"], 2),
        "rounds": rounds,
        "seconds_here": here,
        "seconds_spread": spread,
    }
    write_json(args.out, tree)
    print(json.dumps({"initialisation": tree["initialisation"], "rounds": rounds, "load": tree["load_average"]}))


if __name__ == "__main__":
    main()
