from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rl_exit.method import action_entropy, exit_distribution, expected_return, log_exit_distribution, threshold_exit


def slow_distribution(pi: list[float]) -> list[float]:
    """P(exit at l) = pi_l prod_{j<l} (1 - pi_j), pi_L = 1."""
    result = []
    for layer in range(len(pi) + 1):
        probability = 1.0 if layer == len(pi) else pi[layer]
        for below in range(layer):
            probability *= 1.0 - pi[below]
        result.append(probability)
    return result


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distribution_by_hand() -> None:
    expected = [0.5, 0.125, 0.375]  # 1/2, 1/2 * 1/4, 1/2 * 3/4
    pi = torch.tensor([0.5, 0.25], dtype=torch.float64)
    assert exit_distribution(pi).tolist() == pytest.approx(expected)
    assert log_exit_distribution(pi.logit()).exp().tolist() == pytest.approx(expected)
    assert expected_return(pi.logit()[None], torch.tensor([[8.0, -8.0, 16.0]])).item() == pytest.approx(9.0)


@pytest.mark.parametrize("layers", [1, 2, 6, 12])
def test_distribution_equals_the_slow_twin(layers: int) -> None:
    logits = random_logits(20, layers - 1)
    expected = torch.tensor([slow_distribution(row) for row in logits.sigmoid().tolist()], dtype=torch.float64)
    for result in (exit_distribution(logits.sigmoid()), log_exit_distribution(logits).exp()):
        assert result.shape == (20, layers)
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(result.sum(-1), torch.ones(20, dtype=torch.float64))
    if layers > 1:
        off = log_exit_distribution(logits + 1e-6).exp()
        with pytest.raises(AssertionError):
            torch.testing.assert_close(off, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [50.0, 500.0])
def test_the_log_distribution_stays_finite_where_probabilities_vanish(size: float) -> None:
    logits = torch.tensor([[size, -size, size], [-size, -size, -size]], requires_grad=True)
    result = log_exit_distribution(logits)
    assert result[1].tolist() == pytest.approx([-size, -size, -size, 0.0])
    assert result[0].tolist() == pytest.approx([0.0, -2 * size, -size, -2 * size])
    result.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_the_gradient_of_the_expected_return() -> None:
    """dJ/da_l = pi_l (1 - pi_l) reach_l (R_l - value of staying), worked out by backward recursion in plain Python."""
    logits = random_logits(5, 4).requires_grad_()
    reward = random_logits(5, 5, seed=1)
    expected_return(logits, reward).sum().backward()
    for i in range(5):
        pi, gain = logits[i].sigmoid().tolist(), reward[i].tolist()
        value = gain[4]  # of being at layer L
        staying = [0.0] * 4
        for layer in range(3, -1, -1):
            staying[layer] = value
            value = pi[layer] * gain[layer] + (1 - pi[layer]) * value
        reach = 1.0
        expected = []
        for layer in range(4):
            expected.append(reach * pi[layer] * (1 - pi[layer]) * (gain[layer] - staying[layer]))
            reach *= 1 - pi[layer]
        assert logits.grad is not None
        assert logits.grad[i].tolist() == pytest.approx(expected, rel=1e-9)
        assert expected_return(logits[i : i + 1], reward[i : i + 1]).item() == pytest.approx(value, rel=1e-9)
        assert logits.grad[i].tolist() != pytest.approx([1.001 * part for part in expected], rel=1e-9)


@pytest.mark.parametrize(
    ("pi", "threshold", "layer"),
    [
        ([0.6, 0.9, 0.1], 0.5, 1),
        ([0.4, 0.9, 0.1], 0.5, 2),
        ([0.5, 0.5, 0.5], 0.5, 4),  # exactly 0.5 stays
        ([0.1, 0.1, 0.51], 0.5, 3),
        ([0.1, 0.1, 0.1], 0.0, 1),
        ([1.0, 1.0, 1.0], 1.0, 4),
        ([], 0.5, 1),
    ],
)
def test_threshold_exit(pi: list[float], threshold: float, layer: int) -> None:
    result = threshold_exit(torch.tensor([pi]), threshold)
    assert result.dtype == torch.int64 and result.tolist() == [layer]


def test_threshold_exit_equals_a_loop() -> None:
    pi = random_logits(200, 5).sigmoid()
    expected = [next((i + 1 for i, p in enumerate(row) if p > 0.6), 6) for row in pi.tolist()]
    assert threshold_exit(pi, 0.6).tolist() == expected
    assert len(set(expected)) == 6


def test_action_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [-math.log(3.0), 0.0]], dtype=torch.float64)
    half, quarter = math.log(2.0), -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    expected = ((half + 0.5 * quarter) + (quarter + 0.75 * half)) / 2
    assert float(action_entropy(logits)) == pytest.approx(expected, abs=1e-12)
    assert float(action_entropy(logits + 0.01)) != pytest.approx(expected, abs=1e-6)
    assert float(action_entropy(torch.tensor([[60.0, -60.0]]))) == pytest.approx(0.0, abs=1e-6)
