"""Thresholds with a guarantee: the exact rules by hand, and that the guarantee holds over many draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rl_exit.criteria import StoredSplit, criterion, exits_from_store, scores_from_store
from rl_exit.criteria.calibration import (
    binomial_p,
    calibrated,
    conformal,
    conformal_threshold,
    hoeffding_bentkus_p,
    learn_then_test,
)
from rl_exit.errors import ConfigError


def test_conformal_by_hand():
    scores = np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4], [0.5, 0.5]])
    disagree = np.array([[1, 0], [1, 1], [0, 1], [1, 1], [0, 0]], dtype=bool)
    # Largest score of a disagreeing exit: .1, .8, .7, .6, none. Ranked with infinity: .1 .6 .7 .8 inf.
    for eps, expected in ((0.99, 0.6), (0.75, 0.6), (0.74, 0.7), (0.5, 0.7), (0.3, 0.8), (0.25, 0.8), (0.2, math.inf)):
        assert conformal_threshold(scores, disagree, eps) == expected, eps
    assert conformal_threshold(scores, np.zeros((5, 2), bool), 0.5) == math.inf
    # Another score of a disagreeing exit gives another threshold; one of an agreeing exit does not.
    changed = scores.copy()
    changed[2, 1] = 0.75
    assert conformal_threshold(changed, disagree, 0.5) == 0.75
    changed = scores.copy()
    changed[2, 0] = 0.99
    assert conformal_threshold(changed, disagree, 0.5) == 0.7


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 11])
def test_conformal_is_the_published_quantile(count):
    rng = np.random.default_rng(count)
    scores = rng.random((count, 4))
    disagree = rng.random((count, 4)) < 0.7
    worst = [max(s[d]) for s, d in zip(scores, disagree, strict=True) if d.any()]
    for eps in (0.05, 0.1, 0.31, 0.5, 0.9):
        # numpy cannot interpolate next to infinity without a warning; a number above all does as well.
        expected = np.quantile([*worst, 9.0], 1 - eps, method="higher")
        assert conformal_threshold(scores, disagree, eps) == (expected if expected < 9 else math.inf)


def test_conformal_keeps_its_promise():
    rng = np.random.default_rng(0)
    eps, kept = 0.2, []
    for _ in range(200):
        scores = rng.random((80, 3))
        disagree = rng.random((80, 3)) < 1 - scores  # surer exits agree more often
        cut = conformal_threshold(scores[:50], disagree[:50], eps)
        leave = scores[50:] > cut
        first = leave.argmax(1)
        bad = leave[np.arange(30), first] & disagree[50:][np.arange(30), first]
        kept.append(1 - bad.mean())
    assert np.mean(kept) > 1 - eps
    assert np.mean(kept) < 1, "not by leaving nobody"


def test_conformal_of_a_criterion(every, split):
    wide, tight = (conformal(every["cat"], split, eps) for eps in (0.9, 0.2))
    assert wide.threshold < tight.threshold <= 1.0
    scores = scores_from_store(every["cat"], split)
    said = split.logits.argmax(-1)
    assert wide.threshold == pytest.approx(conformal_threshold(scores, said[:, :-1] != said[:, -1:], 0.9))
    never = conformal(every["cat"], split.select(np.arange(3)), 0.01)
    assert never.threshold == 1.0
    assert set(exits_from_store(never, split.states, split.logits, None).tolist()) == {5}


def test_p_values_by_hand():
    # P(Bin(4, .5) <= 1) = 5/16; P(Bin(10, .2) <= 0) = .8^10
    assert binomial_p(0.25, 4, 0.5) == pytest.approx(5 / 16)
    assert binomial_p(0.0, 10, 0.2) == pytest.approx(0.8**10)
    apart = 0.1 * math.log(0.1 / 0.3) + 0.9 * math.log(0.9 / 0.7)
    total = sum(math.comb(50, k) * 0.3**k * 0.7 ** (50 - k) for k in range(6))
    assert hoeffding_bentkus_p(0.1, 50, 0.3) == pytest.approx(min(math.exp(-50 * apart), math.e * total))
    assert hoeffding_bentkus_p(0.5, 50, 0.3) == 1.0
    assert hoeffding_bentkus_p(0.0, 20, 0.1) == pytest.approx(0.9**20)
    for mean in (0.0, 0.1, 0.2, 0.3):
        assert hoeffding_bentkus_p(mean, 50, 0.3) >= binomial_p(mean, 50, 0.3) - 1e-12, "the exact one is the sharper"


def test_learn_then_test_stops_at_the_first_failure():
    def row(wrong: int) -> list[float]:
        return [1.0] * wrong + [0.0] * (100 - wrong)

    # P(Bin(100, .1) <= k): k = 4: .0237, 5: .0576
    assert learn_then_test([row(0), row(4), row(5), row(0)], 0.1, 0.05) == 1, "what comes after a failure is not tested"
    assert learn_then_test([row(0), row(4), row(5), row(0)], 0.1, 0.06) == 3
    assert learn_then_test([row(9), row(0)], 0.1, 0.05) is None
    graded = [[0.0] * 100, [0.05] * 100, [0.5] * 100]
    assert learn_then_test(graded, 0.2, 0.05) == 1


def test_learn_then_test_keeps_its_promise():
    """Over many calibration sets, the chosen setting's true risk exceeds delta no oftener than the level."""
    rng = np.random.default_rng(0)
    true, failures = np.linspace(0, 0.4, 21), 0
    for _ in range(400):
        draw = rng.random(60) < true[:, None]
        best = learn_then_test(draw.astype(float), 0.2, 0.1)
        failures += best is not None and true[best] > 0.2
    assert 0 < failures / 400 <= 0.1 + 0.03


def test_calibrated_calm(every, split):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 4, 3)) * np.arange(1, 5)[:, None]
    logits[:, 1:] += 3 * np.eye(3)[logits[:, 3].argmax(-1)][:, None]
    big = StoredSplit.from_logits(np.zeros(400, int), logits)
    loose, strict = (calibrated(criterion("calm_softmax", threshold=0.5), big, delta) for delta in (0.4, 0.1))
    assert 0 < loose.threshold < strict.threshold <= 1
    said = big.logits.argmax(-1)
    for rule, delta in ((loose, 0.4), (strict, 0.1)):
        left = exits_from_store(rule, None, big.logits, None).numpy()
        other = said[np.arange(400), left - 1] != said[:, -1]
        assert binomial_p(other.mean(), 400, delta) <= 0.05
        nearer = criterion("calm_softmax", threshold=rule.threshold - 0.01)
        left = exits_from_store(nearer, None, big.logits, None).numpy()
        assert binomial_p((said[np.arange(400), left - 1] != said[:, -1]).mean(), 400, delta) > 0.05
    coarse = calibrated(criterion("calm_softmax", threshold=0.5), big, 0.1, grid=[0.2, 1.0, 0.9])
    assert coarse.threshold in (0.9, 1.0)
    with pytest.raises(ConfigError, match=r"no threshold keeps the risk below 0\.01 with confidence 0\.95 on 60"):
        calibrated(every["calm_meta"], split, 0.01)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan, "0.1", True])
def test_shares_are_checked(value):
    with pytest.raises(ConfigError, match="accepted: a number between 0 and 1"):
        conformal_threshold([[0.1]], [[True]], value)
    with pytest.raises(ConfigError, match="accepted: a number between 0 and 1"):
        learn_then_test([[0.0]], 0.1, value)


def test_other_input_is_refused(every, split):
    with pytest.raises(ValueError, match=r"must both be \[N, L-1\]"):
        conformal_threshold([0.1], [True], 0.1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        learn_then_test([[2.0]], 0.1, 0.1)
    with pytest.raises(ConfigError, match="accepted: a CALM criterion"):
        calibrated(every["cat"], split, 0.1)
