"""Curves and operating points against closed form, plain loops and scikit-learn."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics

from rl_exit.comparison.bootstrap import interval, resamples
from rl_exit.comparison.evidence import Scores, Split
from rl_exit.comparison.figures import area_under, first_reaching, full_depth, measure_at, measure_method
from rl_exit.comparison.tally import Measured, cuts_of, measure_once, tally


def random_split(seed: int, count: int, layers: int, classes: int) -> tuple[Split, np.ndarray]:
    """Exits that get better with depth, scores that know a little."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    right = rng.random((count, layers)) < np.linspace(0.5, 0.9, layers)
    predictions = np.where(right, labels[:, None], rng.integers(0, classes, (count, layers)))
    scores = (right[:, :-1] + rng.normal(0, 0.7, (count, layers - 1))).astype(np.float32)
    return Split(np.arange(count), labels, predictions, classes), scores


def slow_layers(scores: np.ndarray, cut: float) -> list[int]:
    out = []
    for row in scores:
        layer = len(row) + 1
        for index, value in enumerate(row):
            if value > cut or cut == -math.inf:
                layer = index + 1
                break
        out.append(layer)
    return out


def sklearn_score(metric: str, labels: np.ndarray, guess: np.ndarray, weights: np.ndarray) -> float:
    kept = np.repeat(np.arange(len(labels)), weights.astype(int))  # a real resample: rows repeated
    truth, answer = labels[kept], guess[kept]
    if metric == "accuracy":
        return float(metrics.accuracy_score(truth, answer))
    if metric == "f1":
        return float(metrics.f1_score(truth, answer, zero_division=0.0))
    return float(metrics.matthews_corrcoef(truth, answer))


@pytest.mark.parametrize("costs", [None, np.array([0.7, 1.9, 2.85, 4.0])])
@pytest.mark.parametrize(("metric", "classes"), [("accuracy", 4), ("f1", 2), ("mcc", 2), ("mcc", 5)])
def test_every_cut_of_every_replicate_agrees_with_plain_loops(
    metric: str, classes: int, costs: np.ndarray | None
) -> None:
    split, scores = random_split(1, 40, 4, classes)
    split = replace(split, costs=costs)
    paid = np.arange(1.0, 5.0) if costs is None else costs
    scores[::3] = scores[::3].round()  # ties
    weights, cuts = resamples(40, 3, seed=5), cuts_of(scores)
    found = tally(split, scores, cuts, metric).measure(weights)
    assert found.score.shape == found.saved.shape == (len(cuts), 4)
    for index, cut in enumerate(cuts):
        left = np.array(slow_layers(scores, cut))
        guess = split.predictions[np.arange(40), left - 1]
        for column in range(4):
            w = weights[:, column]
            assert found.saved[index, column] == pytest.approx(1 - (paid[left - 1] * w).sum() / 40 / 4)
            assert found.score[index, column] == pytest.approx(sklearn_score(metric, split.labels, guess, w))
    once = measure_once(split, left, weights, metric)[1]
    assert once == pytest.approx(found.saved[-1], abs=1e-12), "the last cut is the last of the loop"
    assert found.saved[0] == pytest.approx(1 - paid[0] / 4) and found.saved[-1] == pytest.approx(0.0, abs=1e-12)


def test_the_cuts_are_all_that_make_a_difference() -> None:
    split, scores = random_split(2, 30, 5, 3)
    scores = scores.round(1)
    ones = np.ones((30, 1), dtype=np.float32)
    exact = tally(split, scores, cuts_of(scores), "accuracy").measure(ones)
    seen = {(round(s, 9), round(a, 9)) for s, a in zip(exact.saved[:, 0], exact.score[:, 0], strict=True)}
    for cut in [*np.linspace(-3, 4, 200), *scores.ravel()]:
        left = np.array(slow_layers(scores, float(cut)))
        score, saved = measure_once(split, left, ones, "accuracy")
        assert (round(float(saved[0]), 9), round(float(score[0]), 9)) in seen


def test_cuts_lie_between_neighbours_and_survive_infinities() -> None:
    assert cuts_of(np.array([[1.0, 3.0], [2.0, 0.0]])).tolist() == [-math.inf, 1.5, 2.5, math.inf]
    assert cuts_of(np.array([[1.0], [1.0]])).tolist() == [-math.inf, math.inf]
    # Unreachable and certain exits: above -2 all but the unreachable leave, above -1 the certain one only.
    assert cuts_of(np.array([[-math.inf], [math.inf], [-1.0]])).tolist() == [-math.inf, -2.0, -1.0, math.inf]
    assert cuts_of(np.array([[-math.inf], [math.inf]])).tolist() == [-math.inf, 0.0, math.inf]
    low = np.float32(0.5)
    assert cuts_of(np.array([[low], [np.nextafter(low, np.float32(1))]])).tolist() == [-math.inf, 0.5, math.inf]
    with pytest.raises(ValueError, match="NaN"):
        cuts_of(np.array([[math.nan]]))


def test_many_values_are_thinned_evenly_in_saved_layers() -> None:
    split, scores = random_split(3, 2000, 6, 3)
    cuts = cuts_of(scores, most=500)
    assert 400 <= len(cuts) <= 502
    found = tally(split, scores, cuts, "accuracy").measure(np.ones((2000, 1), dtype=np.float32))
    assert np.diff(-found.saved[:, 0]).max() < 0.01


# Three instances, three layers. The first is right at 1 and 3, the second from 2 on, the third never.
HAND = Split(np.arange(3), np.array([1, 1, 0]), np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1]]), 2)
HAND_SCORES = np.array([[3.0, 0.0], [1.0, 2.0], [0.0, 0.0]], dtype=np.float32)


def test_hand_worked_operating_points_and_area() -> None:
    ones = np.ones((3, 1), dtype=np.float32)
    reference = full_depth(HAND, ones, "accuracy")
    assert reference == pytest.approx(2 / 3)
    # Cuts -inf .5 1.5 2.5 inf: exits 111, 113, 123, 133, 333; right 1, 1, 2, 2, 2; layers 3, 5, 6, 7, 9.
    found = measure_method(Scores(HAND_SCORES), HAND, ones, reference, "accuracy")
    assert found.curve[:, 0] == pytest.approx([2 / 3, 4 / 9, 1 / 3, 2 / 9, 0], abs=1e-12)
    assert found.curve[:, 1] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3])
    point = found.points["no_loss"]
    assert (point.saved[0], point.score[0], point.threshold, point.reached) == pytest.approx((1 / 3, 2 / 3, 1.5, True))
    # Best score 2/3 up to a third of the layers, 1/3 from there to 2/3: the mean is 1/2.
    assert found.area[0] == pytest.approx(0.5)


def test_no_threshold_reaches_the_bar() -> None:
    ones = np.ones((3, 1), dtype=np.float32)
    found = measure_method(Scores(HAND_SCORES), HAND, ones, np.array([0.9]), "accuracy").points["within_1"]
    assert (found.saved[0], found.threshold, found.reached) == (pytest.approx(0.0, abs=1e-12), None, False)
    assert found.score[0] == pytest.approx(2 / 3)  # that of never leaving early


def test_the_bar_is_met_exactly_and_missed_by_little() -> None:
    measured = Measured(np.array([[0.5], [0.8], [0.7], [0.9]]), np.array([[0.75], [0.5], [0.25], [0.0]]))
    assert first_reaching(measured, np.array([0.8])) == [1]
    assert first_reaching(measured, np.array([0.8 + 1e-6])) == [3]
    # With more than 0 and up to .5 saved the best is .8 (the .9 saves nothing), from there to .75 it is .5.
    assert area_under(measured) == pytest.approx((0.8 * 0.25 + 0.8 * 0.25 + 0.5 * 0.25) / 0.75)


def test_selection_is_redone_in_every_replicate() -> None:
    split, scores = random_split(4, 60, 4, 3)
    weights = resamples(60, 5, seed=1)
    reference = full_depth(split, weights, "accuracy")
    found = measure_method(Scores(scores), split, weights, reference, "accuracy")
    for column in range(6):
        kept = np.repeat(np.arange(60), weights[:, column].astype(int))
        again = Split(split.ids[kept], split.labels[kept], split.predictions[kept], 3)
        ones = np.ones((60, 1), dtype=np.float32)
        bar = full_depth(again, ones, "accuracy")
        assert bar == pytest.approx(reference[column])
        # The resample taken as data of its own, at the cuts of the whole.
        alone = measure_at(scores[kept], cuts_of(scores), again, ones, bar, "accuracy")
        for name in ("no_loss", "within_1"):
            assert alone.points[name].saved[0] == pytest.approx(found.points[name].saved[column])
            assert alone.points[name].score[0] == pytest.approx(found.points[name].score[column])
        assert alone.area[0] == pytest.approx(found.area[column])
    assert len(set(found.points["no_loss"].saved.round(9))) > 1


def test_a_threshold_chosen_on_dev_is_measured_on_test() -> None:
    split, scores = random_split(5, 50, 4, 3)
    dev, dev_scores = random_split(6, 40, 4, 3)
    weights, dev_weights = resamples(50, 4, 1), resamples(40, 4, 2)
    bar, dev_bar = full_depth(split, weights, "accuracy"), full_depth(dev, dev_weights, "accuracy")
    found = measure_method(Scores(scores, dev_scores), split, weights, bar, "accuracy", (dev, dev_weights, dev_bar))
    for name in ("no_loss", "within_1"):
        threshold = found.on_dev[name].threshold
        assert threshold is not None and found.transferred[name].threshold == threshold
        left = np.array(slow_layers(scores, threshold))
        score, saved = measure_once(split, left, weights[:, :1], "accuracy")
        assert found.transferred[name].score[0] == pytest.approx(score[0])
        assert found.transferred[name].saved[0] == pytest.approx(saved[0])
        best = measure_method(Scores(dev_scores), dev, dev_weights, dev_bar, "accuracy").points[name]
        assert found.on_dev[name].saved == pytest.approx(best.saved)
    # What was chosen elsewhere can miss the bar; what was chosen here cannot.
    assert found.transferred["no_loss"].saved[0] != found.points["no_loss"].saved[0]


def test_resamples_are_draws_with_replacement_and_repeat_under_a_seed() -> None:
    weights = resamples(500, 400, seed=3)
    assert (weights[:, 0] == 1).all() and (weights.sum(axis=0) == 500).all()
    assert np.array_equal(weights, resamples(500, 400, seed=3))
    assert not np.array_equal(weights, resamples(500, 400, seed=4))
    # The share of instances left out of a draw tends to 1/e.
    assert (weights[:, 1:] == 0).mean() == pytest.approx(math.exp(-1), abs=0.01)


def test_interval_leaves_the_split_itself_out() -> None:
    assert interval(np.array([99.0, *range(101)])) == pytest.approx([2.5, 97.5])
    assert interval(np.array([99.0])) is None


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels = np.ones(200, dtype=np.int64)
        split = Split(np.arange(200), labels, (rng.random((200, 1)) < 0.7).astype(np.int64), 2)
        low, high = interval(full_depth(split, resamples(200, 200, seed), "accuracy")) or (0, 0)
        covered += low <= 0.7 <= high
    assert 51 <= covered <= 60  # 57 expected; wider or narrower intervals fail


def test_wrong_shapes_and_metrics_are_refused() -> None:
    split, scores = random_split(7, 10, 3, 2)
    with pytest.raises(ValueError, match=r"accepted: \(10, 2\)"):
        tally(split, scores[:, :1], cuts_of(scores), "accuracy")
    with pytest.raises(ValueError, match="metric 'auc' is unknown"):
        tally(split, scores, cuts_of(scores), "auc")
    with pytest.raises(ValueError, match="N > 0"):
        Split(np.arange(3), np.zeros(2, int), np.zeros((2, 2), int), 2)


def test_thousand_replicates_of_many_instances_are_quick() -> None:
    split, scores = random_split(8, 2000, 12, 3)
    weights = resamples(2000, 1000)
    reference = full_depth(split, weights, "accuracy")
    started = time.process_time()
    measure_method(Scores(scores), split, weights, reference, "accuracy")
    # 20 criteria on 20000 instances in a minute leave 3 s for one: here a tenth of the instances, 0.3 s when quiet.
    assert time.process_time() - started < 3.0
