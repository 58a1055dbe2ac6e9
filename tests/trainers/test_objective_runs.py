"""A run without a task step: what a peer's objective needs to be compared."""

from __future__ import annotations

from pathlib import Path

from rl_exit.config import load_config
from rl_exit.data.instances import Instances
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.progress import Silent
from rl_exit.trainers.alternation import train
from rl_exit.trainers.forgetting import read_visits


def test_no_round_but_the_closing_one(tiny_run: list[str]) -> None:
    words = [*tiny_run, "alternation.rounds=0", "init.objective=distilled", "policy.epochs=1", "task.max_train=64"]
    config = load_config(None, words)
    results = train(config, Silent())
    run: Path = config.run_dir
    assert results["best_round"] == 1 and not (run / "rounds" / "2").exists()
    assert not (run / "steps" / "round-1-task.json").exists()
    model, initial = (EarlyExitModel.from_pretrained(run / name) for name in ("model", "init/model"))
    assert bool((model.exits.weight == initial.exits.weight).all())
    visits = read_visits(run / "init" / "forgetting.arrow")
    ids = Instances.open(run / "data" / "train.arrow").ids.tolist()
    assert visits["epoch"].to_pylist() == [epoch for epoch in (1, 2, 3) for _ in ids]
    assert visits["id"].to_pylist() == ids * 3
