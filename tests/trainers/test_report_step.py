"""The report of a run whose best round has lost its state store, because a later one had seemed better."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from rl_exit.config import load_config
from rl_exit.envs.state_store import StateStore
from rl_exit.files import read_json
from rl_exit.progress import Silent
from rl_exit.trainers.alternation import train


def test_the_store_of_the_best_round_is_built_again_for_the_report(tiny_run: list[str], tmp_path: Path) -> None:
    config = load_config(None, [*tiny_run, "keep_rounds=all"])
    before = train(config, Silent())
    run = config.run_dir
    best = run / "rounds" / str(read_json(run / "results.json")["best_round"])
    kept = tmp_path / "kept"
    for split in ("train", "dev"):
        shutil.move(best / f"store-{split}", kept / split)
    shutil.rmtree(run / "report")
    (run / "steps" / "report.json").unlink()

    assert train(config, Silent(), resume=True) == before
    assert (run / "report" / "index.html").is_file()
    for split in ("train", "dev"):
        first, again = StateStore.open(kept / split), StateStore.open(best / f"store-{split}")
        rows = np.arange(first.num_instances)
        for one, other in ((first.states(rows), again.states(rows)), (first.logits, again.logits)):
            assert np.array_equal(np.asarray(one), np.asarray(other))
