"""Criteria against an independent re-computation, at every threshold, by decisions and by scores."""

from __future__ import annotations

import itertools
from dataclasses import replace

import criteria_reference as reference
import numpy as np
import pytest
import torch

from rl_exit.criteria import CRITERIA, StoredSplit, criterion, exits_from_store, leaving_above, parameters
from rl_exit.criteria.stored import scores_from_store
from rl_exit.evaluation import exit_layers, threshold_curve, useful_thresholds

WORDS = sorted((set(CRITERIA) | {"beem_fitted"}) - {"pabee_regression"})


def exits(rule, split: StoredSplit) -> list[int]:
    return exits_from_store(rule, split.states, split.logits, split.exit_logits, batch_size=25).tolist()


def referred(rule, split: StoredSplit) -> list[int]:
    learned = getattr(rule, "learned", None)
    tensors = None if learned is None else {name: tensor.numpy() for name, tensor in learned.tensors.items()}
    return [one.exit(rule.name, tensors, **parameters(rule)) for one in reference.instances(split)]


def cuts_of(scores: np.ndarray) -> list[float]:
    """A few thresholds between observed scores, far enough from both that rounding decides nothing."""
    values = np.unique(scores[np.isfinite(scores)]).astype(np.float64)
    gaps = [(a + b) / 2 for a, b in itertools.pairwise(values) if b - a > 1e-4]
    return [gaps[i] for i in np.linspace(0, len(gaps) - 1, 7).round().astype(int)]


@pytest.mark.parametrize("word", WORDS)
def test_exits_and_scores_are_those_of_the_plain_rule(word, every, split):
    scores = scores_from_store(every[word], split, batch_size=17)
    assert scores.dtype == np.float32 and scores.shape == (60, 4)
    assert not np.isnan(scores).any()
    seen = set()
    for cut in cuts_of(scores):
        rule = leaving_above(every[word], cut)
        expected = referred(rule, split)
        assert exits(rule, split) == expected
        assert exit_layers(scores, cut).tolist() == expected
        seen |= {tuple(expected)}
    assert len(seen) >= 3, "the thresholds above decide something"


@pytest.mark.parametrize("word", WORDS)
def test_a_perturbed_state_or_logit_is_noticed(word, every, split):
    rng = np.random.default_rng(1)
    other = replace(
        split,
        states=split.states + 0.1 * rng.normal(size=split.states.shape).astype(np.float32),
        logits=split.logits + 0.3 * rng.normal(size=split.logits.shape).astype(np.float32),
        exit_logits=split.exit_logits + 0.1,
    )
    same = np.array_equal(scores_from_store(every[word], split), scores_from_store(every[word], other))
    assert same == (word == "fixed")


@pytest.mark.parametrize("word", WORDS)
def test_scores_do_not_depend_on_the_threshold(word, every, split):
    scores = scores_from_store(every[word], split)
    for value in (-np.inf, 0.3, 2.0):
        assert np.array_equal(scores_from_store(leaving_above(every[word], value), split), scores)


# ConsistentEE is compared as log-odds; rounding on the way from its threshold decides ties there.
@pytest.mark.parametrize("word", [word for word in WORDS if word != "consistentee"])
def test_ties_with_the_own_threshold_fall_as_the_rule_says(word, every, split):
    """The criterion at an observed score: >= leaves there, > and < do not."""
    scores = scores_from_store(every[word], split)
    rule = every[word]
    sign = -1.0 if getattr(rule, "comparison", ">") == "<" else 1.0
    low, high = getattr(rule, "bounds", (0.0, 1.0))
    swept = getattr(rule, "swept", "threshold")
    observed = np.unique(scores[:, 1])
    values = observed[np.isfinite(observed) & (sign * observed >= low) & (sign * observed <= high)]
    for value in values[:: max(len(values) // 5, 1)]:
        own = sign * float(value)
        at = replace(rule, **{swept: int(own) if swept != "threshold" else own})
        leaves = scores >= value if getattr(rule, "comparison", ">") == ">=" else scores > value
        expected = np.where(leaves.any(1), leaves.argmax(1) + 1, 5)
        assert exits(at, split) == expected.tolist()


def test_scores_feed_the_trade_off_curve(every, split):
    scores = scores_from_store(every["pcee"], split)
    assert np.isneginf(scores[:, 0]).all(), "patience 2: nobody can leave at layer 1"
    curve = threshold_curve(split.labels, split.logits.argmax(-1), scores, useful_thresholds(scores), "accuracy", 3)
    for point in curve[:: len(curve) // 6]:
        left = np.array(exits(leaving_above(every["pcee"], point.threshold), split))
        assert left.mean() == pytest.approx(point.mean_exit_layer)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_regression(patience):
    rng = np.random.default_rng(patience)
    logits = np.cumsum(rng.normal(size=(50, 6, 1)), 1).astype(np.float32)
    states = np.zeros((50, 6, 2), np.float32)
    for tau in (0.0, 0.3, 0.9, 2.0):
        rule = criterion("pabee_regression", threshold=tau, patience=patience)
        one_by_one = [reference.Instance(z, h, [0.5] * 5) for z, h in zip(logits, states, strict=True)]
        expected = [one.exit("pabee_regression", threshold=tau, patience=patience) for one in one_by_one]
        assert exits_from_store(rule, None, logits, None).tolist() == expected


@pytest.mark.parametrize("patience", [1, 2, 3, 4, 7])
def test_patience_values(split, patience):
    for rule in (criterion("pabee", patience=patience), criterion("pcee", threshold=0.6, patience=patience)):
        assert exits(rule, split) == referred(rule, split)
    assert (patience < 4) == (min(exits(criterion("pabee", patience=patience), split)) < 5)


def test_states_behind_a_function_and_selected_rows(every, split):
    rows = np.array([50, 3, 7, 7, 21])
    lazy = replace(split, states=lambda some: split.states[some])
    for word in ("palbert", "cat", "calm_saturation", "consistentee", "pabee"):
        whole = scores_from_store(every[word], split)
        np.testing.assert_allclose(scores_from_store(every[word], lazy, batch_size=7), whole, rtol=1e-5)
        for given in (split, lazy):
            np.testing.assert_allclose(scores_from_store(every[word], given.select(rows)), whole[rows], rtol=1e-5)
        left = exits_from_store(every[word], lazy.states, split.logits, split.exit_logits)
        assert left.tolist() == exits(every[word], split)


def test_what_a_split_must_be():
    logits = np.zeros((4, 3, 2), np.float32)
    made = StoredSplit.from_logits([0, 1, 0, 1], logits)
    assert made.num_instances == 4 and made.num_layers == 3 and made.num_classes == 2
    np.testing.assert_allclose(made.losses, np.log(2), rtol=1e-6)
    assert made.correct.tolist() == [[True] * 3, [False] * 3] * 2, "of equal logits the first class counts"
    with pytest.raises(ValueError, match="labels must be"):
        replace(made, labels=np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="states must be"):
        replace(made, states=np.zeros((4, 2, 5), np.float32))
    with pytest.raises(ValueError, match=r"logits must be \[N, L, C\] and labels \[N\]"):
        StoredSplit.from_logits([0, 1], logits)
    with pytest.raises(ValueError, match="reads states, which were not given"):
        made.states_of(np.arange(2))


def test_a_criterion_without_scores_is_told():
    class Odd:
        name = "odd"

        def start(self, batch_size, device):
            return {}

        def leave(self, layer, view, carry):
            return torch.zeros(view.batch_size, dtype=torch.bool)

    made = StoredSplit.from_logits([0], np.zeros((1, 3, 2)))
    for call in (lambda: scores_from_store(Odd(), made), lambda: leaving_above(Odd(), 0.5)):
        with pytest.raises(ValueError, match=r"criterion 'odd' has no scores; derive its class from .*Scored"):
            call()
