"""Operating points: the speed asked for is predicted, the loss bound is one, too few texts are refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rl_exit import operating, turns
from rl_exit.costs import CostModel
from rl_exit.criteria import StoredSplit, criterion, exits_from_store, scores_from_store
from rl_exit.criteria.calibration import betting_p, careful_first, fewest_for
from rl_exit.errors import ConfigError, DataError
from rl_exit.operating import Clocked, Evidence, exits_of, grid, point_by_loss, point_by_speed

LAYERS = 6
POLICY = criterion("consistentee")


def even_costs(policy: float = 0.0) -> CostModel:
    """Each layer costs 1 ms, nothing else costs but the policy."""
    return CostModel(
        batch_sizes=(1,),
        lengths=(1, 64),
        embed=np.zeros((1, 2)),
        layers=np.ones((1, 2, LAYERS)),
        exits=np.zeros((1, LAYERS)),
        policy=np.full((1, LAYERS - 1), policy),
        where={},
    )


def evidence_of(count: int, seed: int = 0, classes: int = 3) -> Evidence:
    """Exits that get better with depth, and a policy that mostly knows when they are right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    ease = rng.normal(0, 1.2, (count, 1)) + np.linspace(0.2, 2.2, LAYERS)
    logits = rng.normal(0, 1, (count, LAYERS, classes))
    logits[np.arange(count), :, labels] += ease
    odds = 1.5 * ease[:, :-1] + rng.normal(0, 1, (count, LAYERS - 1)) - 1
    split = StoredSplit.from_logits(labels, logits, None, odds)
    return Evidence(split, rng.integers(1, 65, count), True)


@pytest.mark.parametrize("speedup", [1.3, 2.0, 3.0])
@pytest.mark.parametrize("policy", [0.0, 0.2])
def test_the_speed_asked_for_is_what_the_rule_gives(speedup, policy):
    evidence, costs = evidence_of(800), even_costs(policy)
    point = point_by_speed([POLICY], evidence, costs, speedup, 1)
    rule = criterion(point.criterion, **point.params)
    left = exits_from_store(rule, None, evidence.split.logits, evidence.split.exit_logits).numpy()
    decisions = np.minimum(left, LAYERS - 1)
    assert LAYERS * len(left) / (left.sum() + policy * decisions.sum()) == pytest.approx(speedup, rel=0.02)
    assert point.speedup == pytest.approx(speedup, rel=0.02)
    assert point.saved_layers == pytest.approx(1 - left.mean() / LAYERS)
    assert point.loss == pytest.approx(evidence.losses(rule, left).mean())
    assert point.guarantee is None


def test_the_clock_corrects_what_the_costs_predict():
    """An engine slower than its costs by 1 % a layer saved: the threshold is where it reaches what was asked."""
    evidence, costs = evidence_of(800), even_costs()

    class Slower(Clocked):
        def bias(self, rule, costs, exit_layers):
            assert np.array_equal(exit_layers, exits_of(rule, scores_from_store(rule, evidence.split)))
            return 0.9 - 0.01 * (LAYERS - exit_layers.mean())

    clock = Slower(None, None, 1)  # type: ignore[arg-type]
    point = point_by_speed([POLICY], evidence, costs, 2.0, 1, clock)
    rule = criterion(point.criterion, **point.params)
    left = exits_of(rule, scores_from_store(rule, evidence.split))
    assert LAYERS / left.mean() * clock.bias(rule, costs, left) == pytest.approx(2.0, rel=0.01)
    assert point.speedup == pytest.approx(2.0, rel=0.01) and point.clocked == pytest.approx(0.87, abs=0.02)
    alone = point_by_speed([POLICY], evidence, costs, 2.0, 1)
    assert alone.clocked is None and point.params["threshold"] < alone.params["threshold"]


@pytest.mark.parametrize(("batches", "allowed", "count"), [(4, 1e9, 16), (20, 1e9, 80), (20, 0.0, 16), (90, 1e9, 100)])
def test_the_clock_runs_some_texts_of_all_lengths_both_ways(batches, allowed, count, monkeypatch):
    """A clock that the passes themselves set: a text takes 3 s at full depth, 2 s by the rule."""
    now, ran = [0.0], []

    def engine_pass(model, instances, rule, batch_size):
        def start():
            ran.append((rule.name, instances, batch_size))
            for done in range(1, len(instances) + 1):
                now[0] += 3.0 if rule.name == "fixed" else 2.0
                yield done

        return start

    class Texts:
        lengths = np.arange(100)[::-1]

        def take(self, rows):
            return self.lengths[rows].tolist()

    monkeypatch.setattr(operating, "engine_pass", engine_pass)
    monkeypatch.setattr(operating, "CLOCKED_SECONDS", allowed)
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])
    device = torch.device("cpu")
    model = SimpleNamespace(num_layers=LAYERS, training=False, train=lambda mode: None, device=device)
    clock = Clocked(model, Texts(), 4, texts=5, batches=batches, rounds=3)
    left = np.where(Texts.lengths > 50, 4, 2)
    found = clock.bias(POLICY, even_costs(), left)
    some = ran[0][1]
    assert len(ran) == 8 and {name for name, *_ in ran} == {"fixed", "consistentee"} and ran[0][2] == 4
    assert len(some) == count and some[0] == 0 and some[-1] == 99 and some == sorted(some), "evenly spread"
    layers = np.where(np.array(some) > 50, 4, 2)
    assert found == pytest.approx(1.5 / (LAYERS * count / layers.sum()))


def test_what_the_policy_itself_answers_counts():
    evidence = evidence_of(100)
    left = np.full(100, 2)
    own = Evidence(evidence.split, evidence.lengths, True, np.zeros((100, LAYERS), dtype=bool))
    full = evidence.split.correct[:, -1].mean()
    assert own.losses(POLICY, left).mean() == pytest.approx(full)
    other = criterion("entropy", threshold=0.5)
    np.testing.assert_array_equal(own.losses(other, left), evidence.losses(other, left))


def test_of_several_methods_who_loses_least_is_taken():
    evidence, costs = evidence_of(800), even_costs()
    rules = [criterion("max_probability", threshold=0.5), POLICY]
    alone = [point_by_speed([rule], evidence, costs, 2.0, 1) for rule in rules]
    assert alone[0].loss != alone[1].loss
    best = point_by_speed(rules, evidence, costs, 2.0, 1)
    assert best == min(alone, key=lambda point: point.loss)


def test_speeds_out_of_reach_are_refused():
    evidence, costs = evidence_of(200), even_costs()
    with pytest.raises(ConfigError, match=r"not to be had .* the most is 6\.00"):
        point_by_speed([POLICY], evidence, costs, 9.0, 1)
    for speedup in (1.0, 0.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="a number above 1"):
            point_by_speed([POLICY], evidence, costs, speedup, 1)


@pytest.mark.parametrize("word", ["consistentee", "max_probability", "entropy", "fastbert", "calm_softmax", "pabee"])
def test_the_grid_begins_with_care_and_its_exits_are_the_criterions_own(word):
    params = {"consistentee": {}, "pabee": {"patience": 1}}.get(word, {"threshold": 0.5})
    evidence = evidence_of(300)
    split = evidence.split
    rules = list(grid(criterion(word, **params), LAYERS, 3))
    from rl_exit.criteria import scores_from_store

    scores = scores_from_store(rules[0], split)
    exits = [exits_of(rule, scores) for rule in rules]
    for rule, left in list(zip(rules, exits, strict=True))[:: max(len(rules) // 9, 1)]:
        expected = exits_from_store(rule, None, split.logits, split.exit_logits).numpy()
        np.testing.assert_array_equal(left, expected)
    means = [left.mean() for left in exits]
    assert means == sorted(means, reverse=True) and means[0] > means[-1]


def test_the_bound_holds_over_many_draws():
    """Calibrated on draws of a large population whose loss is known at every threshold."""
    whole = evidence_of(40_000, seed=5)
    rules = list(grid(POLICY, LAYERS, 3))
    lost = np.stack([whole.losses(rule, exits_of(rule, whole.split.exit_logits)) for rule in rules])
    true, rng, broken, faster = lost.mean(1), np.random.default_rng(0), 0, 0
    for _ in range(200):
        rows = rng.integers(0, lost.shape[1], 600)
        passed, _ = careful_first((row[rows] for row in lost), 0.02, 0.1)
        broken += passed is not None and true[passed] > 0.02
        faster += passed is not None and true[passed] > 0.0
    assert broken <= 0.1 * 200
    assert faster > 100, "a rule that never dares anything would hold any bound"
    naive = 0
    for _ in range(200):  # what the test would miss: the most aggressive threshold that looks good
        rows = rng.integers(0, lost.shape[1], 600)
        good = np.flatnonzero(lost[:, rows].mean(1) <= 0.02)
        naive += len(good) > 0 and true[good[-1]] > 0.02
    assert naive > 0.2 * 200


def test_p_values_are_valid_and_sharp():
    rng = np.random.default_rng(1)
    # Mean exactly at the bound: at most a share `level` may be rejected.
    draws = rng.choice([1.0, -1.0, 0.0], p=[0.06, 0.04, 0.9], size=(2000, 500))
    rejected = np.mean([betting_p(row, 0.02, 0.05) <= 0.05 for row in draws])
    assert rejected <= 0.05
    better = rng.choice([1.0, -1.0, 0.0], p=[0.005, 0.005, 0.99], size=(200, 1000))
    assert np.mean([betting_p(row, 0.02, 0.05) <= 0.05 for row in better]) > 0.8
    assert betting_p(np.ones(50), 0.02, 0.05) == 1.0
    assert betting_p([], 0.02, 0.05) == 1.0
    fewest = fewest_for(0.01, 0.05)
    assert betting_p(np.zeros(fewest), 0.01, 0.05) <= 0.05 < betting_p(np.zeros(fewest - 1), 0.01, 0.05)
    assert 299 <= fewest < 450  # no test can do with fewer than ln 0.05 / ln 0.99


def test_a_guaranteed_point_and_its_refusals():
    evidence, costs = evidence_of(3000), even_costs()
    point = point_by_loss([POLICY], evidence, costs, 0.03, 0.9, 1)
    assert point.guarantee is not None
    assert (point.guarantee.texts, point.guarantee.methods) == (3000, 1)
    assert point.guarantee.p_value <= 0.1 and point.loss < 0.03 and point.speedup > 1.1
    tighter = point_by_loss([POLICY], evidence, costs, 0.03, 0.999, 1)
    assert tighter.speedup < point.speedup
    both = point_by_loss([POLICY, criterion("entropy", threshold=0.5)], evidence, costs, 0.03, 0.9, 1)
    assert both.guarantee is not None and both.guarantee.methods == 2
    with pytest.raises(DataError, match=r"100 calibration texts are too few .* at least \d+ are needed"):
        point_by_loss([POLICY], evidence.select(np.arange(100)), costs, 0.01, 0.95, 1)
    with pytest.raises(DataError, match="needs calibration texts with labels"):
        point_by_loss([POLICY], Evidence(evidence.split, evidence.lengths, False), costs, 0.03, 0.9, 1)
    with pytest.raises(ConfigError, match="--max-loss"):
        point_by_loss([POLICY], evidence, costs, 0.0, 0.9, 1)
    with pytest.raises(ConfigError, match="--confidence"):
        point_by_loss([POLICY], evidence, costs, 0.03, 1.0, 1)
    worthless = StoredSplit.from_logits(  # early exits that are always wrong, and a policy that always wants to leave
        np.zeros(600, dtype=np.int64),
        np.tile(np.array([[0.0, 5.0]] * (LAYERS - 1) + [[5.0, 0.0]]), (600, 1, 1)),
        None,
        np.full((600, LAYERS - 1), 30.0),
    )
    with pytest.raises(DataError, match="no threshold of consistentee can be certified"):
        point_by_loss([POLICY], Evidence(worthless, np.full(600, 9), True), costs, 0.03, 0.9, 1)
