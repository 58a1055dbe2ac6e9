"""Exit layers worked out by hand: ties, rows that never leave, rows that leave at the first layer, every criterion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_exit.criteria import Learned, criterion, exits_from_store, scores_from_store
from rl_exit.criteria.calm import decayed_threshold, largest_lambda
from rl_exit.criteria.heads import learned_head, make_head
from rl_exit.criteria.stored import StoredSplit


def exit_of(rule, *layers: list[float], states: list[list[float]] | None = None) -> int:
    """Exit layer of one instance, given each layer's probabilities (and states)."""
    kept = None if states is None else torch.tensor([states])
    return int(exits_from_store(rule, kept, torch.tensor([layers]).log(), None)[0])


A, B = [0.7, 0.3], [0.3, 0.7]
SURE = [0.99, 0.01]


@pytest.mark.parametrize(
    ("layers", "patience", "expected"),
    [
        ([A, A, A, A], 1, 2),
        ([A, A, A, A], 2, 3),
        ([A, A, A, A], 3, 4),  # L exits anyway
        ([A, B, B, B], 2, 4),  # the counter starts anew at the change
        ([A, B, A, B], 1, 4),  # never
        ([A, A, B, B, B, A], 2, 5),
        ([B, A, A, A, B], 2, 4),
        ([[0.5, 0.5], A, B, B], 1, 2),  # a tie counts as the first class
        ([[0.5, 0.5], B, A, A], 1, 4),
    ],
)
def test_pabee(layers, patience, expected):
    assert exit_of(criterion("pabee", patience=patience), *layers) == expected


@pytest.mark.parametrize(
    ("answers", "threshold", "patience", "expected"),
    [
        ([1.0, 1.25, 1.5, 1.75], 0.25, 1, 4),  # a difference of exactly tau is not below it
        ([1.0, 1.25, 1.5, 1.75], 0.26, 1, 2),
        ([1.0, 1.25, 1.5, 1.75], 0.26, 2, 3),
        ([1.0, 2.0, 2.1, 1.9], 0.3, 1, 3),
        ([1.0, 1.0, 3.0, 3.0, 3.0, 3.0], 0.5, 2, 5),
        ([1.0, 1.0, 1.0], 0.0, 1, 3),
    ],
)
def test_pabee_regression(answers, threshold, patience, expected):
    rule = criterion("pabee_regression", threshold=threshold, patience=patience)
    assert exits_from_store(rule, None, torch.tensor(answers).view(1, -1, 1), None).tolist() == [expected]


# Normalised entropies: A and B .8813, SURE .0808, even 1.
@pytest.mark.parametrize(
    ("layers", "threshold", "patience", "expected"),
    [
        ([SURE, SURE, SURE], 0.1, 1, 1),
        ([SURE, SURE, SURE], 0.1, 2, 2),
        ([SURE, A, SURE, SURE, SURE], 0.1, 2, 4),
        ([SURE, A, SURE, A, A], 0.1, 2, 5),
        ([A, A, A, A], 0.9, 2, 2),
        ([A, B, A, B], 0.9, 3, 3),  # the class does not matter
        ([[0.5, 0.5]] * 3, 1.0, 1, 3),  # exactly tau is not below it
        ([SURE, SURE, SURE], 0.0, 1, 3),
    ],
)
def test_pcee(layers, threshold, patience, expected):
    assert exit_of(criterion("pcee", threshold=threshold, patience=patience), *layers) == expected


@pytest.mark.parametrize(("threshold", "expected"), [(0.08, 3), (0.082, 2), (0.88, 2), (0.883, 1), (0.0, 3)])
def test_fastbert(threshold, expected):
    assert exit_of(criterion("fastbert", threshold=threshold), A, SURE, A) == expected


def test_fastbert_divides_by_ln_of_the_classes():
    even = [1 / 3] * 3
    assert exit_of(criterion("fastbert", threshold=0.99), even, even) == 2
    half = [0.5, 0.5, 0.0]  # ln 2 / ln 3 = .6309
    assert exit_of(criterion("fastbert", threshold=0.63), half, half) == 2
    assert exit_of(criterion("fastbert", threshold=0.632), half, half) == 1


@pytest.mark.parametrize(
    ("layers", "threshold", "expected"),
    [
        ([A, A, A, A], 0.07, 1),  # S = .07
        ([A, A, A, A], 0.2, 2),  # .07 + .14 = .21
        ([A, A, A, A], 0.42, 3),  # + .21 = .42 (a tie leaves; see below)
        ([A, A, A, A], 0.43, 4),
        ([A, B, B, B], 0.2, 3),  # .07; anew .14; .35
        ([A, B, A, B], 0.22, 4),  # anew at every layer: .07, .14, .21
        ([A, B, A, B], 0.2, 3),
        ([A, A, A, A], 0.0, 1),
    ],
)
def test_beem(layers, threshold, expected):
    if threshold == 0.42:
        threshold = float(np.float32(threshold) - np.float32(1e-6))
    assert exit_of(criterion("beem", threshold=threshold), *layers) == expected


def test_beem_with_the_accuracy_of_the_exits():
    learned = Learned("beem", 4, 0, 2, {"weight": torch.tensor([0.5, 0.6, 1.0])})
    for threshold, expected in ((0.35, 1), (0.36, 2), (0.77, 2), (0.78, 3), (1.48, 4)):  # .35, .77, 1.47
        at = threshold - 1e-6 if threshold in (0.35, 0.77) else threshold
        assert exit_of(criterion("beem", threshold=at, learned=learned), A, A, A, A) == expected


def test_right_tool():
    learned = Learned("right_tool", 3, 0, 2, {"temperature": torch.tensor([2.0, 0.5])})
    nine = [0.9, 0.1]  # odds 9: sqrt(9) = 3 -> .75 at T = 2; 81 -> .98780 at T = .5
    for threshold, expected in ((0.74, 1), (0.76, 2), (0.987, 2), (0.988, 3)):
        assert exit_of(criterion("right_tool", threshold=threshold, learned=learned), nine, nine, nine) == expected
    tie = torch.zeros(1, 3, 2)
    assert exits_from_store(criterion("right_tool", threshold=0.5, learned=learned), None, tie, None).tolist() == [1]


# lambda_t with decay 4, L = 4: .9 lambda + .1, + .036788, + .013534 at layers 1, 2, 3. Margins: A .4, SURE .98.
@pytest.mark.parametrize(
    ("layers", "threshold", "decay", "expected"),
    [
        ([A, A, A, A], 0.33, 4.0, 1),  # .397
        ([A, A, A, A], 0.34, 4.0, 2),  # .406, .3428
        ([A, A, A, A], 0.41, 4.0, 3),  # .469, .4058, .3825
        ([A, A, A, A], 0.43, 4.0, 4),  # .487, .4238, .4005
        ([A, A, A, A], 0.33, 0.0, 1),
        ([A, A, A, A], 0.34, 0.0, 4),  # .406 at every layer
        ([A, SURE, A, A], 1.0, 4.0, 2),  # .9368 at layer 2
        ([SURE, SURE, SURE, SURE], 1.0, 0.0, 4),
        ([[1.0, 0.0], A, A, A], 1.0, 4.0, 1),  # a margin of 1 reaches lambda_t = 1
        ([[0.52, 0.48], A, A, A], 0.0, 4.0, 2),  # even lambda = 0 asks for .1 at layer 1
    ],
)
def test_calm_softmax(layers, threshold, decay, expected):
    assert exit_of(criterion("calm_softmax", threshold=threshold, decay=decay), *layers) == expected


def test_calm_scores_are_the_largest_lambda():
    confidence = torch.tensor([-1.0, 0.05, 0.1, 0.4, 0.55, 0.999999, 1.0, 1.1])
    for layer in (1, 2, 5):
        score = largest_lambda(confidence, (layer - 1) / 6, 4.0)
        for value, best in zip(confidence.tolist(), score.tolist(), strict=True):
            steps = [k / 1000 for k in range(1001) if value >= decayed_threshold(k / 1000, (layer - 1) / 6, 4.0) - 1e-7]
            assert best == (pytest.approx(max(steps), abs=1.001e-3) if steps else -math.inf)
    assert decayed_threshold(0.5, 0.0, 4.0) == pytest.approx(0.55), "and a confidence of .55 gives back .5"
    assert largest_lambda(torch.tensor([0.55]), 0.0, 4.0).item() == 0.5
    assert decayed_threshold(1.2, 0.0, 4.0) == 1.0 and decayed_threshold(-1.0, 0.0, 4.0) == 0.0


def test_calm_saturation():
    states = [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]  # cosines 1, .7071, .7071
    for threshold, decay, expected in ((1.0, 4.0, 2), (0.0, 4.0, 2)):
        assert (
            exit_of(criterion("calm_saturation", threshold=threshold, decay=decay), *[A] * 4, states=states) == expected
        )
    turned = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]  # 0, .7071
    for threshold, expected in ((0.77, 3), (0.771, 4)):  # lambda_t = .9 lambda + .013534
        assert exit_of(criterion("calm_saturation", threshold=threshold), *[A] * 4, states=turned) == expected
    opposite = [[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    assert exit_of(criterion("calm_saturation", threshold=0.0), *[A] * 4, states=opposite) == 4, "-1 never leaves"


def with_weights(word: str, num_layers: int, hidden_size: int, weights: dict[str, Tensor]) -> Learned:
    """A head of zeros but for the given tensors."""
    head = make_head(word, num_layers, hidden_size, 2)
    state = {name: torch.zeros_like(tensor) for name, tensor in head.state_dict().items()}
    for name, tensor in weights.items():
        assert state[name].shape == tensor.shape, name
        state[name] = tensor
    head.load_state_dict(state)
    return learned_head(word, head, num_layers, hidden_size, 2)


LINEAR = {"linear.weight": torch.tensor([[1.0, -1.0]]), "linear.bias": torch.tensor([-1.0])}
# h_1 - h_2 - 1 = -1, 0, 1: sigmoid .2689, .5, .7311
STATES = [[0.0, 0.0], [2.0, 1.0], [2.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, 1), (0.26, 1), (0.27, 2), (0.5, 3), (0.74, 4), (1.0, 4)])
def test_lte(threshold, expected):
    learned = with_weights("lte", 4, 2, LINEAR)
    rule = criterion("lte", threshold=threshold, learned=learned)
    assert exit_of(rule, *[A] * 4, states=STATES) == expected, "0.5 at layer 2 does not exceed 0.5"


@pytest.mark.parametrize(("threshold", "expected"), [(0.18, 1), (0.19, 2), (0.51, 2), (0.52, 3), (0.79, 3), (0.8, 4)])
def test_calm_meta(threshold, expected):
    learned = with_weights("calm_meta", 4, 2, LINEAR)  # lambda_t = .9 lambda + .1, .0368, .0135
    rule = criterion("calm_meta", threshold=threshold, learned=learned)
    assert exit_of(rule, *[A] * 4, states=STATES) == expected


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.2, 1), (0.26, 1), (0.27, 2), (0.63, 2), (0.64, 3), (0.9, 3), (0.91, 4), (1.0, 4)],
)
def test_palbert(threshold, expected):
    # One unit of the hidden layer saturates with h_1 (weight 20): tanh = 0, 1, 1. lambda = .2689, .5, .7311 through the
    # per-layer part of a second unit. CDF: .2689, 1 - .7311 * .5 = .6345, 1 - .36553 * .2689 = .9017.
    width = 64
    layer = torch.zeros(3, width)
    layer[0, 0], layer[2, 0] = -20.0, 20.0
    out = torch.zeros(1, width)
    out[0, 0] = 1.0
    learned = with_weights("palbert", 4, 2, {"layer": layer, "out.weight": out})
    rule = criterion("palbert", threshold=threshold, learned=learned)
    assert exit_of(rule, *[A] * 4, states=STATES) == expected


def test_palbert_reads_the_state_before():
    first, out = torch.zeros(64, 4), torch.zeros(1, 64)
    first[0, 2], out[0, 0] = 20.0, 5.0  # the first component of h_{l-1}; sigmoid(5) = .9933
    learned = with_weights("palbert", 4, 2, {"first.weight": first, "out.weight": out})
    rule = criterion("palbert", threshold=0.9, learned=learned)
    # CDF: .5 (h_0 = 0), .75 (h_1 = 0), then h_2 = 2 comes into play.
    assert exit_of(rule, *[A] * 4, states=STATES) == 3
    assert exit_of(rule, *[A] * 4, states=[[1.0, 0.0], *STATES[1:]]) == 2


def test_cat_reads_what_the_paper_says():
    """Features: one-hot 2, pooled 32, pmax, margin, history 1 (L = 4), l/L; each is let through alone."""
    probabilities = [[0.2, 0.8], [0.6, 0.4], [0.3, 0.7], A]
    states = [[0.5, 0.0], [0.0, 0.0], [-0.5, 0.0], [0.0, 0.0]]
    expected = {
        0: [0.0, 1.0, 0.0],  # says class 0
        1: [1.0, 0.0, 1.0],
        2: [math.tanh(0.5), 0.0, -math.tanh(0.5)],
        34: [0.8, 0.6, 0.7],
        35: [0.6, 0.2, 0.4],
        36: [0.0, 0.0, 0.4],  # at layer 3: what layer 2 gave to class 1; layer 1 is left out
        37: [0.25, 0.5, 0.75],
    }
    for feature, values in expected.items():
        pool, hidden, out = torch.zeros(32, 2), torch.zeros(32, 38), torch.zeros(1, 32)
        pool[0, 0], hidden[0, feature], out[0, 0] = 1.0, 1.0, 1.0
        learned = with_weights("cat", 4, 2, {"pool.weight": pool, "hidden.weight": hidden, "out.weight": out})
        logits = np.log(np.array([probabilities], dtype=np.float32))
        split = StoredSplit.from_logits([0], logits, np.array([states], dtype=np.float32))
        found = scores_from_store(criterion("cat", learned=learned), split)[0]
        np.testing.assert_allclose(found, [1 / (1 + math.exp(-math.tanh(v))) for v in values], atol=1e-6)


def test_cat_leaves_above_its_threshold_only():
    learned = with_weights("cat", 3, 2, {})
    even = torch.zeros(1, 3, 2)
    for threshold, expected in ((0.5, 3), (0.49, 1), (1.0, 3)):
        rule = criterion("cat", learned=learned, threshold=threshold)
        assert exits_from_store(rule, torch.zeros(1, 3, 2), even, None).tolist() == [expected]


def test_jei():
    # The gate of layer 1 is shut (bias -1), the gate of layer 2 reads pmax, the gate of layer 3 the state.
    pmax, state, out = torch.zeros(32, 6), torch.zeros(32, 6), torch.zeros(1, 32)
    pmax[0, 2], state[0, 0], out[0, 0] = 1.0, 1.0, 1.0
    learned = with_weights(
        "jei",
        4,
        2,
        {
            "out.0.bias": torch.tensor([-1.0]),  # .2689
            "first.1.weight": pmax,
            "out.1.weight": out,  # sigmoid(.7) = .6682
            "first.2.weight": state,
            "out.2.weight": out,  # sigmoid(2) = .8808
        },
    )
    for threshold, expected in ((0.26, 1), (0.27, 2), (0.66, 2), (0.67, 3), (0.89, 4)):
        assert exit_of(criterion("jei", learned=learned, threshold=threshold), *[A] * 4, states=STATES) == expected


def test_fixed_scores_count_the_layers():
    split = StoredSplit.from_logits([0, 1], np.zeros((2, 4, 2)))
    assert scores_from_store(criterion("fixed", depth=2), split).tolist() == [[1.0, 2.0, 3.0]] * 2
