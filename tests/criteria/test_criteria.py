"""Criteria: hand-worked exits, the same from the store and from the live engine, oracles, the registry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_exit import EarlyExitModel
from rl_exit.criteria import (
    CRITERIA,
    ORACLES,
    Carry,
    ConsistentEE,
    Entropy,
    Fixed,
    LayerView,
    MaxProbability,
    cheapest,
    criterion,
    exits_from_store,
    first_agreeing,
    first_correct,
    memorized,
)
from rl_exit.data.instances import Instances
from rl_exit.errors import ConfigError
from rl_exit.evaluation import policy_curve
from rl_exit.inference import run_instances
from rl_exit.method import threshold_exit


@dataclass(frozen=True)
class Patience:
    """PABEE, here to hold that the interface carries counters and the last prediction."""

    patience: int
    name = "patience"

    def start(self, batch_size: int, device: torch.device) -> Carry:
        return {
            "count": torch.zeros(batch_size, dtype=torch.int64, device=device),
            "last": torch.full((batch_size,), -1, device=device),
        }

    def leave(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        predicted = view.logits.argmax(-1)
        carry["count"] = torch.where(predicted == carry["last"], carry["count"] + 1, 0)
        carry["last"] = predicted
        return carry["count"] >= self.patience


@dataclass(frozen=True)
class Saturation:
    """CALM state saturation: keeps the previous state, which enters the carry at layer 1."""

    threshold: float
    name = "saturation"

    def start(self, batch_size: int, device: torch.device) -> Carry:
        return {}

    def leave(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        before, carry["state"] = carry.get("state"), view.state
        if before is None:
            return view.everyone(False)
        return torch.cosine_similarity(view.state, before, dim=-1) >= self.threshold


ALL = [
    ConsistentEE(0.5),
    ConsistentEE(0.0),
    ConsistentEE(1.0),
    Fixed(1),
    Fixed(2),
    Fixed(9),
    MaxProbability(0.6),
    Entropy(0.8),
    Patience(1),
    Patience(2),
    Saturation(0.57),
]


@pytest.fixture(scope="module")
def model(tiny_backbone, rows) -> EarlyExitModel:
    model = EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b", "c"), pooling="mean", max_length=40)
    spread(model, rows)
    return model


def spread(model: EarlyExitModel, rows: Instances) -> None:
    """Widen backbone, exits and policy and centre them, so that every rule has rows that leave and rows that stay."""
    with torch.no_grad():
        for weight in model.backbone.model.parameters():
            weight *= 10 if weight.dim() == 2 else 1
        model.exits.weight *= 5
        every = model.all_exits(**rows.batch(range(len(rows))))
        model.exits.bias -= every.logits.mean(0)
        model.policy.weight_out *= 30
        model.policy.bias_out -= model.policy(every.states).quantile(0.6, dim=0)


@pytest.fixture(scope="module")
def rows() -> Instances:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, 60)
    return Instances(
        ids=np.arange(60),
        labels=rng.integers(0, 3, 60),
        tokens=rng.integers(4, 20, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_types=None,
        pad_token_id=0,
    )


@pytest.mark.parametrize("rule", ALL, ids=repr)
@pytest.mark.parametrize("as_array", [True, False], ids=["numpy", "torch"])
def test_store_and_live_engine_leave_at_the_same_layers(model, rows, rule, as_array):
    with torch.no_grad():
        every = model.all_exits(**rows.batch(range(60)))
        stored = (every.states, every.logits, model.policy(every.states))
    if as_array:
        stored = tuple(column.numpy() for column in stored)
        for column in stored:
            column.flags.writeable = False
    expected = exits_from_store(rule, *stored, batch_size=17)
    found = run_instances(model, rows, rule, batch_size=7)
    assert torch.equal(found.exit_layer, expected)
    picked = every.logits[torch.arange(60), expected - 1]
    torch.testing.assert_close(found.logits, picked, atol=1e-5, rtol=0)


def test_the_comparison_above_sees_several_layers(model, rows):
    with torch.no_grad():
        every = model.all_exits(**rows.batch(range(60)))
        stored = (every.states, every.logits, model.policy(every.states))
    for rule in (ConsistentEE(0.5), MaxProbability(0.6), Entropy(0.8), Patience(1), Saturation(0.57)):
        assert len(exits_from_store(rule, *stored).unique()) >= 2, rule


def logits_of(*layers: list[float]) -> Tensor:
    """One instance, two classes; each layer's probabilities."""
    return torch.tensor([layers]).log()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (MaxProbability(0.5), 1),
        (MaxProbability(0.7), 2),
        (MaxProbability(0.9), 3),
        (MaxProbability(0.95), 4),
        (Entropy(0.7), 1),
        (Entropy(0.6), 3),
        (Entropy(0.0), 4),
        (Patience(1), 2),
        (Patience(2), 3),
        (Patience(3), 4),
        (Fixed(1), 1),
        (Fixed(3), 3),
        (Fixed(4), 4),
        (Fixed(5), 4),
    ],
    ids=repr,
)
def test_hand_worked_exits(rule, expected):
    # Entropies: .6730, .6109, .3251, .5004 nats; the argmax is class 0 throughout.
    logits = logits_of([0.6, 0.4], [0.7, 0.3], [0.9, 0.1], [0.8, 0.2])
    assert exits_from_store(rule, None, logits, None).tolist() == [expected]


def test_ties_and_edges():
    even = logits_of([0.5, 0.5], [0.5, 0.5])
    assert exits_from_store(MaxProbability(0.5), None, even, None).tolist() == [1], "reached is enough"
    assert exits_from_store(Entropy(math.log(2) - 1e-6), None, even, None).tolist() == [2]
    certain = torch.tensor([[[0.0, -math.inf], [0.0, 0.0]]])
    assert exits_from_store(Entropy(1e-6), None, certain, None).tolist() == [1], "p = 0 adds nothing"
    assert exits_from_store(MaxProbability(1.0), None, certain, None).tolist() == [1]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_policy_threshold_is_the_rule_of_the_method(threshold):
    torch.manual_seed(0)
    exit_logits = 2 * torch.randn(200, 5)
    exit_logits[0, 0] = 0.0  # pi = 0.5 exactly does not exceed 0.5
    found = exits_from_store(ConsistentEE(threshold), None, torch.zeros(200, 6, 2), exit_logits)
    assert torch.equal(found, threshold_exit(exit_logits.sigmoid(), threshold))
    assert not torch.equal(found, threshold_exit((exit_logits + 1).sigmoid(), threshold)) or threshold in (0.0, 1.0)


def test_oracles_hand_worked():
    correct = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=bool)
    assert first_correct(correct).tolist() == [1, 2, 1, 2, 3]
    assert memorized(correct).tolist() == [1, 2, 3, 3, 3]
    logits = np.array([[[1, 0], [0, 1], [1, 0]], [[0, 1], [0, 1], [1, 0]], [[0, 1], [1, 0], [1, 0]]], dtype=float)
    assert first_agreeing(logits).tolist() == [1, 3, 2]
    losses = np.array([[1.0, 0.5, 0.4], [1.0, 1.0, 1.0]])
    assert cheapest(losses, 0.2).tolist() == [2, 1]
    assert cheapest(losses, 0.0).tolist() == [3, 1]
    assert cheapest(losses, 1.0, cost=[5, 1, 2]).tolist() == [2, 2]
    assert set(ORACLES) == {"first_correct", "memorized", "first_agreeing"}


@pytest.mark.parametrize("oracle", [first_correct, memorized, first_agreeing])
def test_oracles_refuse_other_shapes(oracle):
    with pytest.raises(ValueError, match="must be"):
        oracle(np.zeros(3))


def test_registry_makes_each_by_its_word():
    made = {
        "consistentee": criterion("consistentee", threshold=0.7),
        "fixed": criterion("fixed", depth=2),
        "max_probability": criterion("max_probability", threshold=0.9),
        "entropy": criterion("entropy", threshold=0.1),
        "fastbert": criterion("fastbert", threshold=0.1),
        "pabee": criterion("pabee", patience=2),
        "pabee_regression": criterion("pabee_regression", threshold=0.1),
        "pcee": criterion("pcee", threshold=0.1),
        "calm_softmax": criterion("calm_softmax", threshold=0.5),
        "calm_saturation": criterion("calm_saturation", threshold=0.5),
        "beem": criterion("beem", threshold=0.5),
    }
    needs_fit = {"right_tool", "lte", "cat", "calm_meta", "palbert", "jei"}
    assert set(made) | needs_fit == set(CRITERIA)
    assert all(made[word].name == word for word in made)
    assert made["consistentee"] == ConsistentEE(0.7)
    for word in needs_fit:
        with pytest.raises(ConfigError, match=f"load_criterion\\(folder, '{word}'\\)"):
            criterion(word, threshold=0.5)


@pytest.mark.parametrize(
    ("name", "params", "told"),
    [
        ("entropie", {"threshold": 1.0}, "Did you mean 'entropy'"),
        ("entropy", {}, "given: none; accepted: threshold"),
        ("entropy", {"depth": 1}, "given: depth; accepted: threshold"),
        ("entropy", {"threshold": -1.0}, "0 or more"),
        ("entropy", {"threshold": float("nan")}, "0 or more"),
        ("entropy", {"threshold": "low"}, "wrong type"),
        ("max_probability", {"threshold": 2.0}, "accepted: 0 to 1"),
        ("consistentee", {"threshold": -0.5}, "accepted: 0 to 1"),
        ("fixed", {"depth": 0}, "a layer number from 1"),
        ("fixed", {"depth": 1.5}, "a layer number from 1"),
        ("fixed", {"depth": "two"}, "a layer number from 1"),
        ("DeeBERT", {"threshold": 1.0}, "Did you mean 'entropy'"),
        ("BERxiT", {}, "Did you mean 'lte'"),
        (7, {}, "criterion 7 is unknown"),
        ("entropy", {"threshold": True}, "wrong type"),
        ("entropy", {"threshold": [0.1, 0.2]}, r"\[0.1, 0.2\] has the wrong type \(list\); accepted: a number"),
        ("entropy", {"threshold": None}, "wrong type"),
        ("entropy", {"threshold": float("inf")}, "0 or more"),
        ("fastbert", {"threshold": 1.5}, "accepted: 0 to 1"),
        ("pabee", {}, "given: none; accepted: patience"),
        ("pabee", {"patience": 0}, "a whole number from 1"),
        ("pabee", {"patience": 2.0}, "a whole number from 1"),
        ("pabee", {"threshold": 2}, "given: threshold; accepted: patience"),
        ("pabee_regression", {"threshold": -0.1}, "0 or more"),
        ("pabee_regression", {"threshold": 0.1, "patience": True}, "a whole number from 1"),
        ("pcee", {"threshold": 0.1, "patience": "2"}, "a whole number from 1"),
        ("pcee", {"threshold": 1.1}, "accepted: 0 to 1"),
        ("calm_softmax", {"threshold": 1.1}, "accepted: 0 to 1"),
        ("calm_saturation", {"threshold": 0.5, "decay": -1}, "decay = -1; accepted: 0 or more"),
        ("beem", {"threshold": -1}, "0 or more"),
        ("beem", {"threshold": 1, "learned": {}}, "wrong type"),
        ("lte", {"learned": "folder"}, r"'folder' has the wrong type \(str\); accepted: what .*read_learned gives"),
    ],
)
def test_registry_explains_what_is_wrong(name, params, told):
    with pytest.raises(ConfigError, match=told):
        criterion(name, **params)


def test_missing_arrays_are_named():
    logits = torch.zeros(2, 3, 2)
    with pytest.raises(ValueError, match="exit_logits"):
        exits_from_store(ConsistentEE(), None, logits, None)
    with pytest.raises(ValueError, match="states"):
        exits_from_store(Saturation(0.57), None, logits, None)


@pytest.mark.parametrize(
    "shapes", [((4, 3, 2), (4, 3), (4, 2)), ((4, 2, 8), (4, 3, 2), (4, 2)), ((4, 3, 8), (4, 3, 2), (4, 3))]
)
def test_shapes_are_checked(shapes):
    with pytest.raises(ValueError, match="must be"):
        exits_from_store(Fixed(1), *(torch.zeros(shape) for shape in shapes))


def test_the_policy_has_no_say_at_the_last_layer():
    view = LayerView(3, 3, 1, torch.device("cpu"), lambda: torch.zeros(1, 2), lambda: torch.zeros(1, 2), pytest.fail)
    with pytest.raises(ValueError, match="forced"):
        view.exit_logit({})


def test_a_decided_policy_still_orders_its_rows():
    """Log-odds of 18 and more are pi = 1 in float32; thresholds tell them apart all the same."""
    odds = np.array([[18.0], [20.0], [25.0], [-40.0]], dtype=np.float32)
    logits = np.zeros((4, 2, 2), dtype=np.float32)
    for cut, expected in ((19.0, [2, 1, 1, 2]), (22.0, [2, 2, 1, 2]), (30.0, [2, 2, 2, 2]), (-50.0, [1, 1, 1, 1])):
        rule = ConsistentEE(1.0 / (1.0 + math.exp(-cut)))
        assert exits_from_store(rule, None, logits, odds).tolist() == expected
    curve = policy_curve([0, 0, 0, 0], logits, odds, "accuracy")
    assert [point.mean_exit_layer for point in curve] == [1.0, 1.25, 1.25, 1.5, 1.75, 2.0]
    for point in curve:
        left = exits_from_store(ConsistentEE(point.threshold), None, logits, odds)
        assert float(left.double().mean()) == point.mean_exit_layer
