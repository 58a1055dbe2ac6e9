from __future__ import annotations

import numpy as np
import pytest

from rl_exit.method import layer_cost, memorized_layer, rewards


def slow_memorized(correct: list[list[bool]]) -> list[int]:
    """Eq. 7 word for word: the first layer from which every layer up to L is right; L where layer L is wrong."""
    result = []
    for row in correct:
        layer = len(row)
        while layer > 1 and row[layer - 1] and row[layer - 2]:
            layer -= 1
        result.append(layer)
    return result


def slow_rewards(losses, memorized, alpha, kind, cost=None) -> list[list[float]]:
    result = []
    for i, row in enumerate(losses):
        layers = len(row)
        gains = []
        for layer in range(1, layers + 1):
            price = layer if cost is None else cost[layer - 1]
            factor = 1.0 if kind == "vanilla" else 1.0 - memorized[i] / layers
            gains.append(-row[layer - 1] - alpha * factor * price)
        result.append(gains)
    return result


@pytest.mark.parametrize(
    ("correct", "expected"),
    [
        ("1111", 1),
        ("0111", 2),
        ("1011", 3),  # right at 1, but not from 1 on
        ("0001", 4),
        ("1110", 4),  # wrong at L
        ("0000", 4),  # never right
        ("0110", 4),
    ],
)
def test_memorized_layer_by_hand(correct: str, expected: int) -> None:
    assert memorized_layer([[flag == "1" for flag in correct]]).tolist() == [expected]


@pytest.mark.parametrize("layers", [1, 2, 3, 8])
def test_memorized_layer_of_every_pattern(layers: int) -> None:
    patterns = [[bool(code >> bit & 1) for bit in range(layers)] for code in range(2**layers)]
    result = memorized_layer(patterns)
    assert result.dtype == np.int64 and result.tolist() == slow_memorized(patterns)
    if layers > 1:
        first_right = [row.index(True) + 1 if any(row) else layers for row in patterns]
        assert result.tolist() != first_right  # the tempting wrong reading


def test_memorized_layer_takes_integers_and_no_rows() -> None:
    assert memorized_layer(np.array([[0, 1, 1]], dtype=np.uint8)).tolist() == [2]
    assert memorized_layer(np.zeros((0, 3))).shape == (0,)


@pytest.mark.parametrize("shape", [(3,), (3, 0), (1, 2, 3)])
def test_memorized_layer_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"correct must be \[N, L\]"):
        memorized_layer(np.zeros(shape))


def test_layer_cost_is_the_layer() -> None:
    assert layer_cost(3).tolist() == [1.0, 2.0, 3.0]


def test_rewards_by_hand() -> None:
    losses = [[2.0, 1.0, 0.5, 0.25]]
    assert rewards(losses, None, 0.1, "vanilla")[0] == pytest.approx([-2.1, -1.2, -0.8, -0.65])
    # m = 1: a layer costs 0.1 * (1 - 1/4) = 0.075
    assert rewards(losses, [1], 0.1, "hardness")[0] == pytest.approx([-2.075, -1.15, -0.725, -0.55])
    # m = L: layers are free
    assert rewards(losses, [4], 0.1, "hardness")[0] == pytest.approx([-2.0, -1.0, -0.5, -0.25])
    # half as dear
    assert rewards(losses, [2], 0.1, "hardness")[0] == pytest.approx([-2.05, -1.1, -0.65, -0.45])


def test_reward_of_being_right() -> None:
    correct = [[False, True, True, False]]
    found = rewards(np.zeros((1, 4)), None, 0.01, "correctness", correct=correct)
    assert found[0] == pytest.approx([-0.01, 0.98, 0.97, -0.04])
    priced = rewards(np.zeros((1, 4)), None, 0.1, "correctness", cost=[1.0, 1.5, 2.0, 4.0], correct=correct)
    assert priced[0] == pytest.approx([-0.1, 0.85, 0.8, -0.4])
    losses = [[2.0, 0.5, 0.25, 1.0]]
    both = rewards(losses, None, 0.1, "fidelity", cost=[1.0, 1.5, 2.0, 4.0], correct=correct)
    assert both[0] == pytest.approx([-2.1, 0.35, 0.55, -1.4])
    for missing in (None, [[True, False]]):
        for kind in ("correctness", "fidelity"):
            with pytest.raises(ValueError, match="needs correct"):
                rewards(np.zeros((1, 4)), None, 0.01, kind, correct=missing)


@pytest.mark.parametrize("kind", ["vanilla", "hardness"])
@pytest.mark.parametrize("cost", [None, [0.0, 0.5, 3.0, 3.5, 9.0]])
def test_rewards_equal_the_slow_twin(kind: str, cost: list[float] | None) -> None:
    rng = np.random.default_rng(0)
    losses, memorized = rng.exponential(size=(50, 5)), rng.integers(1, 6, 50)
    result = rewards(losses, memorized, 0.07, kind, cost)
    assert result.shape == (50, 5) and result.dtype == np.float32
    expected = np.array(slow_rewards(losses.tolist(), memorized.tolist(), 0.07, kind, cost))
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    for wrong in (
        slow_rewards(losses.tolist(), memorized.tolist(), 0.0701, kind, cost),
        slow_rewards(losses.tolist(), (memorized % 5 + 1).tolist(), 0.07, "hardness", cost),
    ):
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(result, np.array(wrong), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], [1], 0.1), r"losses must be \[N, L\]"),
        (([[1.0, 2.0]], None, 0.1), "needs the memorized layers"),
        (([[1.0, 2.0]], [0], 0.1), r"memorized must be \[1\] within 1..2"),
        (([[1.0, 2.0]], [3], 0.1), r"memorized must be \[1\] within 1..2"),
        (([[1.0, 2.0]], [1, 2], 0.1), r"memorized must be \[1\] within 1..2"),
        (
            ([[1.0, 2.0]], [1], 0.1, "speed"),
            "reward 'speed' is unknown; accepted: hardness, vanilla, correctness, fidelity",
        ),
        (([[1.0, 2.0]], [1], 0.1, "hardness", [1.0]), r"cost must be \[2\]"),
    ],
)
def test_rewards_refuse(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewards(*arguments)
