from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from rl_exit.errors import ConfigError, RunError
from rl_exit.evaluation import (
    CURVE_POINTS,
    CurvePoint,
    SplitResult,
    check_metric,
    choose_threshold,
    evaluate,
    exit_layers,
    policy_curve,
    score,
    threshold_curve,
    useful_thresholds,
)
from rl_exit.method import exit_probability, threshold_exit


def random_split(seed: int, count: int, layers: int, classes: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, layers, classes)).astype(np.float32)
    logits[np.arange(count), :, labels] += np.linspace(0, 2, layers)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(count), :, labels]
    exit_logits = (2 * rng.normal(size=(count, layers - 1))).astype(np.float32)
    return {"labels": labels, "logits": logits, "losses": losses, "exit_logits": exit_logits}


def slow_exits(pi: np.ndarray, threshold: float) -> list[int]:
    """One instance, one layer at a time: the rule of inference, on pi and threshold in float32 like the engine."""
    out = []
    for row in np.asarray(pi, dtype=np.float32):
        layer = len(row) + 1
        for index, value in enumerate(row):
            if value > np.float32(threshold):
                layer = index + 1
                break
        out.append(layer)
    return out


# Four instances, three layers, two classes; the winner of each exit is written out.
GUESS = np.array([[1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 1]])
LABELS = np.array([1, 1, 1, 0])
PI = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.4], [0.1, 0.1]])


def hand_worked(metric: str = "accuracy", threshold: float = 0.5) -> SplitResult:
    logits = np.where(GUESS[..., None] == np.arange(2), 2.0, 0.0)
    losses = np.tile([3.0, 2.0, 1.0], (4, 1))
    return evaluate(LABELS, logits, losses, np.log(PI / (1 - PI)), metric, threshold)


def test_hand_worked_example() -> None:
    result = hand_worked()
    # Exit layers 1, 2, 3, 3: guesses 1 (right), 1 (right), 1 (right), 1 (wrong).
    assert result.exit_histogram == (1, 1, 2)
    assert result.score == 0.75
    assert result.mean_exit_layer == 2.25
    assert result.saved_layers == 0.25
    # Each exit for everyone: right are {0}, {0, 1, 3}, {0, 2}.
    assert result.exit_scores == (0.25, 0.75, 0.5)
    assert result.full_depth_score == 0.5
    assert result.exit_losses == (3.0, 2.0, 1.0)
    # First correct layers 1, 2, 3, 2: all right at a mean of 2.
    assert (result.oracle_score, result.oracle_mean_exit_layer) == (1.0, 2.0)
    assert result.oracle_saved_layers == pytest.approx(1 / 3)
    # Memorized layers: 1, 3 (wrong at L), 3, 3 (wrong at L).
    assert result.histogram_by_memorized == ((1, 0, 0), (0, 0, 0), (0, 1, 2))
    assert result.histogram_by_class == ((0, 0, 1), (1, 1, 1))


def test_hand_worked_curve() -> None:
    points = {round(point.mean_exit_layer, 6): point for point in hand_worked().curve}
    # Running maxima (.9 .9) (.2 .8) (.3 .4) (.1 .1). Below .1 all leave at 1; above .9 nobody leaves early.
    assert points[1.0].threshold == 0.0 and points[1.0].score == 0.25
    assert points[3.0].score == 0.5
    # Between .1 and .2: exits 1 1 1 3, right 1 0 0 0. Between .4 and .8: 1 2 3 3, right 1 1 1 0.
    assert 0.1 < points[1.5].threshold < 0.2 and points[1.5].score == 0.25
    assert 0.4 < points[2.25].threshold < 0.8 and points[2.25].score == 0.75
    # Between .2 and .3: 1 2 1 3; .3 to .4: 1 2 2 3; .8 to .9: 1 3 3 3. Nothing else exists.
    assert sorted(points) == [1.0, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0]


def test_hand_worked_f1() -> None:
    result = hand_worked("f1")
    # Guesses 1 1 1 1 against 1 1 1 0: precision 3/4, recall 1.
    assert result.score == pytest.approx(6 / 7)
    assert result.oracle_score == 1.0


@pytest.mark.parametrize("metric", ["accuracy", "f1", "mcc"])
@pytest.mark.parametrize(("seed", "count", "layers"), [(0, 1, 3), (1, 7, 2), (2, 60, 6), (3, 40, 12), (4, 9, 1)])
def test_curve_equals_the_plain_loop(metric: str, seed: int, count: int, layers: int) -> None:
    classes = 2 if metric == "f1" else 5
    split = random_split(seed, count, layers, classes)
    pi, guess = exit_probability(split["exit_logits"]), split["logits"].argmax(-1)
    curve = policy_curve(split["labels"], split["logits"], split["exit_logits"], metric)
    for point in curve[:: max(1, len(curve) // 40)]:
        left = slow_exits(pi, point.threshold)
        chosen = [guess[row, layer - 1] for row, layer in enumerate(left)]
        assert point.mean_exit_layer == pytest.approx(sum(left) / count, abs=1e-12)
        assert point.score == pytest.approx(score(metric, split["labels"], chosen), abs=1e-12)


def test_curve_test_sees_one_wrong_instance() -> None:
    split = random_split(5, 60, 6, 5)
    curve = policy_curve(split["labels"], split["logits"], split["exit_logits"], "accuracy")
    moved = split["labels"].copy()
    moved[0] = (moved[0] + 1) % 5
    other = policy_curve(moved, split["logits"], split["exit_logits"], "accuracy")
    assert any(abs(a.score - b.score) > 1e-3 for a, b in zip(curve, other, strict=True))


@pytest.mark.parametrize("metric", ["accuracy", "f1", "mcc"])
def test_evaluate_lies_on_its_curve(metric: str) -> None:
    split = random_split(6, 200, 6, 2)
    result = evaluate(**split, metric=metric, threshold=0.37)
    point = next(point for point in result.curve if point.threshold == pytest.approx(0.37, abs=1e-6))
    assert point.score == pytest.approx(result.score, abs=1e-12)
    assert point.mean_exit_layer == pytest.approx(result.mean_exit_layer, abs=1e-12)
    assert result.curve[-1].score == pytest.approx(result.full_depth_score, abs=1e-12)
    assert result.curve[-1].mean_exit_layer == 6.0
    assert result.curve[0].mean_exit_layer == 1.0


def test_curve_stays_where_pi_equals_the_threshold() -> None:
    # Logit 0 is pi = 0.5 exactly, and 0.5 > 0.5 is false; -1000 is pi = 0, which threshold 0 does not pass either.
    logits = np.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    curve = policy_curve([0, 1], logits, [[0.0], [-1000.0]], "accuracy", 0.5)
    means = {point.threshold: point.mean_exit_layer for point in curve}
    assert means[0.5] == 2.0
    assert means[0.0] == 1.0  # however small, pi is above 0


def test_every_useful_threshold_of_a_small_split() -> None:
    pi = exit_probability(random_split(7, 12, 5, 3)["exit_logits"])
    cuts = useful_thresholds(pi)
    every = {tuple(slow_exits(pi, value)) for value in [-1.0, *pi.ravel().tolist()]}
    found = {tuple(exit_layers(pi, value)) for value in [-1.0, 1.0, *cuts.tolist()]}
    assert found == every
    missing_one = {tuple(exit_layers(pi, value)) for value in [-1.0, 1.0, *cuts[1:].tolist()]}
    assert missing_one != every


def test_thresholds_are_even_in_mean_exit_layer() -> None:
    rng = np.random.default_rng(0)
    # Sharply peaked probabilities: an even grid over [0, 1] would leave most of the range out.
    pi = exit_probability(rng.normal(size=(5000, 11)) * 3 - 6)
    cuts = useful_thresholds(pi)
    assert len(cuts) <= CURVE_POINTS and (np.diff(cuts) > 0).all()
    widest = _widest_step(pi, cuts)
    assert widest < 2 * 11 / CURVE_POINTS
    assert _widest_step(pi, np.linspace(0, 1, CURVE_POINTS)) > 5 * widest


def _widest_step(pi: np.ndarray, cuts: np.ndarray) -> float:
    labels = np.zeros(len(pi), dtype=np.int64)
    curve = threshold_curve(labels, np.zeros((len(pi), pi.shape[1] + 1), dtype=np.int64), pi, cuts, "accuracy", 2)
    return float(np.diff([point.mean_exit_layer for point in curve]).max())


def test_thresholds_separate_neighbouring_float32() -> None:
    low = np.float32(0.7)
    high = np.nextafter(low, np.float32(1))
    cuts = useful_thresholds([[low], [high]])
    assert exit_layers([[low], [high]], float(cuts[0])).tolist() == [2, 1]


def test_exit_layers_are_those_of_the_engine() -> None:
    logits = random_split(8, 300, 7, 2)["exit_logits"]
    pi = torch.sigmoid(torch.tensor(logits))
    for cut in (0.0, *useful_thresholds(exit_probability(logits))[::20], 1.0):
        assert exit_layers(pi.numpy(), cut).tolist() == threshold_exit(pi, float(cut)).tolist()
        assert exit_layers(exit_probability(logits), cut).tolist() == threshold_exit(pi, float(cut)).tolist()


def test_saturated_probabilities() -> None:
    pi = exit_probability(np.array([[1000.0, -1000.0]]))
    assert pi.tolist() == [[1.0, 0.0]]
    assert exit_layers(pi, 1.0).tolist() == [3]
    assert exit_layers(pi, 0.999).tolist() == [1]


def test_oracle_takes_the_last_layer_where_nothing_is_right() -> None:
    logits = np.array([[[1.0, 0.0]] * 3])
    result = evaluate([1], logits, np.ones((1, 3)), np.zeros((1, 2)), "accuracy", 0.5)
    assert (result.oracle_score, result.oracle_mean_exit_layer) == (0.0, 3.0)


def test_json_round_trip() -> None:
    result = evaluate(**random_split(9, 50, 4, 3), metric="mcc", threshold=0.5)
    tree = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert SplitResult.from_dict(tree) == result
    assert SplitResult.from_dict({**tree, "later": 1}) == result
    assert SplitResult.from_dict({**tree, "seconds_with_exits": 2.5}).seconds_with_exits == 2.5
    assert SplitResult.from_dict({**tree, "score": tree["score"] + 1e-9}) != result
    with pytest.raises(ValueError, match="exit_scores missing"):
        SplitResult.from_dict({key: value for key, value in tree.items() if key != "exit_scores"})
    with pytest.raises(ValueError, match="4 entries"):
        SplitResult.from_dict({**tree, "exit_losses": [1.0]})


CURVE = [
    CurvePoint(0.1, 0.60, 1.5),
    CurvePoint(0.4, 0.795, 2.5),
    CurvePoint(0.5, 0.80, 2.5),
    CurvePoint(0.6, 0.80, 2.5),
    CurvePoint(0.8, 0.81, 3.5),
    CurvePoint(1.0, 0.805, 6.0),
]


@pytest.mark.parametrize(
    ("full", "tolerance", "expected"),
    [
        (0.805, 0.01, 0.6),  # fewest layers; of equal ones the better score, then the higher threshold
        (0.805, 0.005, 0.6),  # 0.805 - 0.005 is 0.8 up to rounding and counts as reached
        (0.805, 0.0, 0.8),
        (0.805, 1.0, 0.1),
        (0.99, 0.0, 0.8),  # nothing is good enough: the best score
    ],
)
def test_choose_threshold(full: float, tolerance: float, expected: float) -> None:
    assert choose_threshold(CURVE, full, tolerance) == expected
    assert choose_threshold(CURVE[::-1], full, tolerance) == expected
    assert choose_threshold([list(point) for point in CURVE], full, tolerance) == expected  # type: ignore[misc]


def test_choose_threshold_without_any_good_point_prefers_fewer_layers() -> None:
    curve = [CurvePoint(0.2, 0.7, 3.0), CurvePoint(0.5, 0.7, 2.0), CurvePoint(0.6, 0.7, 2.0), CurvePoint(0.9, 0.6, 1.0)]
    assert choose_threshold(curve, 0.9, 0.0) == 0.6


def test_choose_threshold_forgives_rounding_only() -> None:
    assert 0.8 - 0.1 > 0.7  # in floating point
    curve = [CurvePoint(0.5, 0.7, 2.0), CurvePoint(1.0, 0.8, 6.0)]
    assert choose_threshold(curve, 0.8, 0.1) == 0.5
    assert choose_threshold([CurvePoint(0.5, 0.69999, 2.0), curve[1]], 0.8, 0.1) == 1.0


@pytest.mark.parametrize(("curve", "tolerance"), [([], 0.1), (CURVE, -0.1)])
def test_choose_threshold_refuses(curve: list[CurvePoint], tolerance: float) -> None:
    with pytest.raises(ValueError, match="are needed"):
        choose_threshold(curve, 0.8, tolerance)


def test_chosen_threshold_keeps_its_promise() -> None:
    split = random_split(10, 400, 6, 4)
    result = evaluate(**split, metric="accuracy", threshold=0.5)
    chosen = choose_threshold(result.curve, result.full_depth_score, 0.02)
    again = evaluate(**split, metric="accuracy", threshold=chosen)
    assert again.score >= again.full_depth_score - 0.02 - 1e-9
    assert not any(
        point.mean_exit_layer < again.mean_exit_layer - 1e-9 and point.score >= again.full_depth_score - 0.02
        for point in result.curve
    )


def test_metric_must_fit_the_task() -> None:
    check_metric("f1", 2)
    with pytest.raises(ConfigError, match=r"two classes.*has 5"):
        check_metric("f1", 5)
    with pytest.raises(ConfigError, match="accepted: accuracy, f1, mcc"):
        check_metric("auc", 2)
    with pytest.raises(ValueError, match="unknown"):
        score("auc", [1], [1])


def test_f1_without_positives_is_zero() -> None:
    assert score("f1", [0, 0], [0, 0]) == 0.0


@pytest.mark.parametrize("name", ["logits", "losses", "exit_logits"])
def test_diverged_numbers_are_reported(name: str) -> None:
    split = random_split(11, 10, 3, 2)
    split[name] = split[name].copy()
    split[name].flat[0] = np.nan
    with pytest.raises(RunError, match="not finite"):
        evaluate(**split, metric="accuracy", threshold=0.5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", np.zeros(9, dtype=np.int64), "do not fit"),
        ("labels", np.full(10, 2), "must be in 0..1"),
        ("losses", np.zeros((10, 2)), "do not fit"),
        ("exit_logits", np.zeros((10, 3)), "do not fit"),
        ("logits", np.zeros((0, 3, 2)), "none of them 0"),
    ],
)
def test_bad_shapes(name: str, value: np.ndarray, message: str) -> None:
    split = {**random_split(12, 10, 3, 2), name: value}
    with pytest.raises(ValueError, match=message):
        evaluate(**split, metric="accuracy", threshold=0.5)
