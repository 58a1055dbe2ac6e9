"""The cost model: shapes, interpolation, what is kept; profiled on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rl_exit import EarlyExitModel, pooling, profiling
from rl_exit.costs import FILE, CostModel, read_costs, write_costs
from rl_exit.errors import ConfigError, RunError
from rl_exit.profiling import profile


def made() -> CostModel:
    """Two layers; a text of T tokens costs T ms a layer alone, half of it in a batch of 4."""
    layer = np.array([[[8.0, 8.0], [16.0, 16.0]], [[16.0, 16.0], [32.0, 32.0]]])  # [size, length, layer]
    return CostModel(
        batch_sizes=(1, 4),
        lengths=(8, 16),
        embed=np.array([[1.0, 2.0], [2.0, 4.0]]),
        layers=layer,
        exits=np.array([[0.5, 0.5], [1.0, 1.0]]),
        policy=np.array([[0.25], [0.5]]),
        where={"cpu": "none"},
    )


def test_times_add_up():
    costs = made()
    np.testing.assert_allclose(costs.full_depth(1, [8, 16, 12]), [17.5, 34.5, 26.0])
    # Leaving at 1: embedding, layer, exit, policy; at 2 no policy on top.
    np.testing.assert_allclose(costs.leaving(1, [8]), [[9.75, 18.25]])
    np.testing.assert_allclose(costs.leaving(4, [16]), [[1.0 + 8.0 + 0.25 + 0.125, 17.0 + 0.5 + 0.125]])
    np.testing.assert_allclose(costs.full_depth(64, [16]), costs.full_depth(4, [16]))
    np.testing.assert_allclose(costs.in_layers(1, 8), [2 * 9.75 / 18.25, 2.0])
    assert costs.speedup(1, [8, 16], [2, 1]) == pytest.approx((17.5 + 34.5) / (18.25 + 18.75))
    between = costs.full_depth(2, [8])[0]
    assert costs.full_depth(4, [8])[0] < between < costs.full_depth(1, [8])[0]


def test_costs_are_kept_and_damage_is_told(tmp_path):
    assert read_costs(tmp_path) is None
    write_costs(tmp_path, made())
    again = read_costs(tmp_path)
    assert again is not None and again.to_dict() == made().to_dict()
    tree = made().to_dict()
    for key, value in (
        ("format", 9),
        ("layer_seconds", [[1.0]]),
        ("exit_seconds", [[-1, 1], [1, 1]]),
        ("lengths", [8]),
    ):
        (tmp_path / FILE).write_text(json.dumps({**tree, key: value}))
        with pytest.raises(RunError, match="rl-exit profile"):
            read_costs(tmp_path)


def test_a_model_is_profiled(tiny_backbone: Path):
    model = EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b"), max_length=32, policy_inputs="answers")
    costs = profile(model, [1, 8], [4, 32], runs=3)
    assert (costs.batch_sizes, costs.lengths, costs.num_layers) == ((1, 8), (4, 32), 3)
    assert (costs.layers > 0).all() and (costs.exits > 0).all() and (costs.policy >= 0).all()
    assert (np.diff(costs.leaving(8, [16])) > 0).all()
    for sizes, lengths in (([0], [4]), ([1], [33])):
        with pytest.raises(ConfigError, match="lengths up to the model's 32"):
            profile(model, sizes, lengths)


def test_a_batch_is_timed_in_the_parts_in_which_it_runs(tiny_backbone: Path, monkeypatch):
    """A row takes 1 ms a layer, whatever its length."""
    model = EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b"), max_length=32)
    timed, rows = profiling._timed, []

    def even(model, ids):
        rows.append(len(ids))
        found = timed(model, ids)
        found.embed = 1e-3 * len(ids)
        for each in (found.layers, found.exits, found.policy):
            each[:] = [1e-3 * len(ids)] * len(each)
        return found

    monkeypatch.setattr(pooling, "MOST_TOKENS", 32)
    monkeypatch.setattr(profiling, "_timed", even)
    costs = profile(model, [1, 8], [4, 8, 32], runs=3)
    assert rows[:6] == [1, 1, 1, 8, 4, 1]
    for figures in (costs.embed, costs.exits, costs.policy, costs.layers):
        np.testing.assert_allclose(figures[0], 1e-3)
        np.testing.assert_allclose(figures[1], 8e-3)
