"""The policy on numpy agrees with its slow twin in torch."""

from __future__ import annotations

import pytest
import torch

from rl_exit.models.answers import NUM_ANSWERS, answer_figures
from rl_exit.models.policy import PolicyHeads
from rl_exit.models.quick_policy import QuickPolicy

LAYERS = 6


def heads(shared: bool) -> PolicyHeads:
    torch.manual_seed(0)
    made = PolicyHeads(LAYERS, NUM_ANSWERS, 16, shared)
    torch.nn.init.normal_(made.weight_out)
    torch.nn.init.normal_(made.bias_in)
    return made


def both(policy: PolicyHeads, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    quick, slow_memory, memory, slow, fast = QuickPolicy(policy, logits.shape[-1]), {}, {}, [], []
    with torch.inference_mode():
        for layer in range(1, LAYERS):
            figures = answer_figures(layer, LAYERS, logits[:, layer - 1], slow_memory)
            slow.append(policy.at(layer, figures))
            fast.append(quick.at(layer, logits[:, layer - 1], memory))
    return torch.stack(slow, 1), torch.stack(fast, 1)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("classes", [2, 5, 100])
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_log_odds_equal_those_of_torch(shared, classes, rows, scale):
    policy = heads(shared)
    logits = scale * torch.randn(rows, LAYERS, classes, generator=torch.Generator().manual_seed(rows))
    slow, fast = both(policy, logits)
    torch.testing.assert_close(fast, slow, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        policy.bias_in += 1e-2
    assert (both(policy, logits)[1] - slow).abs().max() > 1e-4, "weights that change in place are followed"


def test_ties_and_extremes_are_answered_alike():
    logits = torch.zeros(4, LAYERS, 3)
    logits[1, :, 1] = 1e4
    logits[2, ::2, 2], logits[2, 1::2, 0] = 5.0, 5.0
    logits[3, :, 0] = -1e4
    slow, fast = both(heads(True), logits)
    torch.testing.assert_close(fast, slow, atol=2e-5, rtol=1e-4)
    assert bool(fast.isfinite().all())


def test_memory_goes_with_its_row():
    policy = heads(True)
    logits = 3 * torch.randn(5, LAYERS, 4, generator=torch.Generator().manual_seed(1))
    expected, _ = both(policy, logits)
    quick, memory, rows = QuickPolicy(policy, 4), {}, torch.arange(5)
    with torch.inference_mode():
        for layer in range(1, LAYERS):
            found = quick.at(layer, logits[rows, layer - 1], memory)
            torch.testing.assert_close(found, expected[rows, layer - 1], atol=2e-5, rtol=1e-4)
            keep = torch.arange(len(rows)).flip(0)[: max(len(rows) - 1, 1)]
            rows, memory = rows[keep], {key: value[keep] for key, value in memory.items()}


def test_it_knows_when_the_heads_have_moved():
    policy = heads(True)
    quick = QuickPolicy(policy, 3)
    assert quick.serves(policy)
    policy.weight_in = torch.nn.Parameter(policy.weight_in.detach().clone())
    assert not quick.serves(policy)
