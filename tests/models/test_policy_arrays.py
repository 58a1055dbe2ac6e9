"""The policy on plain arrays equals the module, outputs and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl_exit.models.policy import PolicyHeads
from rl_exit.models.policy_arrays import NAMES, backward, exit_logits, forward


def heads(layers: int, hidden: int, width: int, seed: int, shared: bool = False) -> PolicyHeads:
    torch.manual_seed(seed)
    made = PolicyHeads(layers, hidden, width, shared)
    torch.nn.init.normal_(made.bias_in)
    torch.nn.init.normal_(made.weight_out)
    return made


def arrays(policy: PolicyHeads) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in policy.state_dict().items()}


SIZES = [(2, 3, 1, 1), (5, 16, 8, 7), (12, 96, 64, 40)]


@pytest.mark.parametrize(("layers", "hidden", "width", "batch"), SIZES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shared", [False, True])
def test_logits_equal_the_modules(layers: int, hidden: int, width: int, batch: int, scale: float, shared: bool) -> None:
    policy = heads(layers, hidden, width, 0, shared)
    states = (scale * torch.randn(batch, layers, hidden)).numpy()
    states[0, 0] = 0
    expected = policy(states).detach().numpy()
    for layer in range(1, layers):
        at = policy.at(layer, states[:, layer - 1]).detach().numpy()
        np.testing.assert_allclose(at, expected[:, layer - 1], atol=1e-5, rtol=1e-5)
    for given in (states, states[:, :-1]):
        np.testing.assert_allclose(exit_logits(arrays(policy), given), expected, atol=1e-5, rtol=1e-5)
    off = arrays(policy) | {"bias_in": arrays(policy)["bias_in"] + 0.001}
    assert not np.allclose(exit_logits(off, states), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layers", "hidden", "width", "batch"), SIZES)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_equal_autograd(layers: int, hidden: int, width: int, batch: int, number: int, shared: bool) -> None:
    sets = [heads(layers, hidden, width, seed, shared) for seed in range(number)]
    states = torch.randn(batch, layers, hidden)
    weights = [torch.randn(batch, layers - 1) for _ in sets]
    sum((policy(states) * weight).sum() for policy, weight in zip(sets, weights, strict=True)).backward()
    outputs, activations = forward([arrays(policy) for policy in sets], states.numpy())
    found = backward([arrays(policy) for policy in sets], activations, [weight.numpy() for weight in weights])
    for policy, output, gradients in zip(sets, outputs, found, strict=True):
        np.testing.assert_allclose(output, policy(states).detach().numpy(), atol=1e-5, rtol=1e-5)
        assert set(gradients) == set(NAMES)
        for name, parameter in policy.named_parameters():
            expected = parameter.grad.numpy()
            np.testing.assert_allclose(gradients[name], expected, atol=1e-4, rtol=1e-4)
            assert not np.allclose(gradients[name] * 1.01, expected, atol=1e-4, rtol=1e-4)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"accepted: \[B, 5 or 4, 16\]"):
        exit_logits(arrays(heads(5, 16, 8, 0)), np.zeros((3, 6, 16), np.float32))
