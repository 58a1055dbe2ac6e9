"""reward.cost=latency: the policy pays for measured time in place of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_exit.config import load_config
from rl_exit.costs import CostModel
from rl_exit.files import read_json
from rl_exit.progress import Silent
from rl_exit.trainers import label_steps
from rl_exit.trainers.alternation import train


def measured(layer_seconds: list[float]) -> CostModel:
    """Exits and policy cost nothing; layers what is said, whatever the batch and the length."""
    layers = np.broadcast_to(np.array(layer_seconds), (1, 2, 3)).copy()
    return CostModel((32,), (4, 16), np.zeros((1, 2)), layers, np.zeros((1, 3)), np.zeros((1, 2)), {})


def test_the_policy_pays_for_time(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A last layer that takes nearly all of the time is not worth it; resumed, the same measurement counts."""
    asked: list[Any] = []
    told: list[tuple[float, ...]] = []
    original = label_steps.train_policy

    def profile(model: Any, batch_sizes: list[int], **_: Any) -> CostModel:
        asked.append(batch_sizes)
        return measured([0.5, 0.1, 5.4])

    def watched(store: Path, weights: Any, settings: Any, *rest: Any) -> Any:
        told.append(settings.cost)
        if len(told) == 1:
            raise KeyboardInterrupt
        return original(store, weights, settings, *rest)

    monkeypatch.setattr(label_steps, "profile", profile)
    monkeypatch.setattr(label_steps, "train_policy", watched)
    words = ["reward.cost=latency", "reward.alpha=0.5", "alternation.rounds=0", "task.max_train=64", "policy.epochs=20"]
    config = load_config(None, [*tiny_run, *words, "init.epochs=1", "inference.threshold=0.5", "algorithm=exact"])
    with pytest.raises(KeyboardInterrupt):
        train(config, Silent())
    train(config, Silent(), resume=True)
    assert asked == [[config.inference.batch_size]], "measured once"
    assert told == [pytest.approx((0.25, 0.3, 3.0))] * 2
    assert read_json(config.run_dir / "results.json")["dev"]["mean_exit_layer"] <= 2.0
