"""Policy heads: the stacked form equals one MLP per layer, whatever the source and the scale of the states."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from rl_exit.method import exit_distribution
from rl_exit.models.policy import PolicyHeads


def heads(layers: int = 5, hidden: int = 16, width: int = 8, seed: int = 0) -> PolicyHeads:
    torch.manual_seed(seed)
    return PolicyHeads(layers, hidden, width)


def reference(policy: PolicyHeads, states: torch.Tensor) -> torch.Tensor:
    """Slow twin: layer by layer, instance by instance, from the docstring."""
    rows = []
    for row in states:
        logits = []
        for index in range(policy.num_layers - 1):
            state = row[index] / row[index].square().mean().sqrt()
            hidden = torch.tanh(state @ policy.weight_in[index] + policy.bias_in[index])
            logits.append(hidden @ policy.weight_out[index] + policy.bias_out[index])
        rows.append(torch.stack(logits))
    return torch.stack(rows)


@pytest.mark.parametrize(("layers", "hidden", "width", "batch"), [(2, 3, 1, 1), (5, 16, 8, 7), (12, 32, 64, 4)])
def test_stacked_equals_one_mlp_per_layer(layers, hidden, width, batch):
    policy = heads(layers, hidden, width)
    torch.nn.init.normal_(policy.bias_in)
    states = torch.randn(batch, layers, hidden)
    expected = reference(policy, states)
    assert policy(states).shape == (batch, layers - 1)
    torch.testing.assert_close(policy(states), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(policy(states[:, :-1]), expected, atol=1e-5, rtol=0)
    for layer in range(1, layers):
        torch.testing.assert_close(policy.at(layer, states[:, layer - 1]), expected[:, layer - 1], atol=1e-5, rtol=0)
    moved = states.clone()
    moved[0, 0] *= -1
    assert not torch.allclose(policy(moved), expected, atol=1e-5, rtol=0)


def test_layer_l_is_not_read():
    policy, states = heads(), torch.randn(3, 5, 16)
    changed = states.clone()
    changed[:, -1] = 1e6
    torch.testing.assert_close(policy(states), policy(changed), atol=0, rtol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_initial_policy_spreads_exits_at_any_scale(scale):
    """P(exit at l) starts near 1/L at every layer; with the usual zero biases half would leave at layer 1."""
    policy = heads(layers=6, hidden=64, width=64)
    states = scale * torch.randn(500, 6, 64)
    mean = exit_distribution(policy(states).sigmoid()).mean(0)
    torch.testing.assert_close(mean, torch.full((6,), 1 / 6), atol=0.02, rtol=0)
    policy.bias_out.data.zero_()
    assert exit_distribution(policy(states).sigmoid()).mean(0)[0] > 0.4


def test_read_only_arrays_pass_without_warning():
    policy = heads()
    array = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
    expected = policy(torch.from_numpy(array.copy()))
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(policy(array), expected, atol=0, rtol=0)
        torch.testing.assert_close(policy.at(1, array[:, 0]), expected[:, 0], atol=1e-6, rtol=0)


def test_half_precision_states_are_read_in_the_parameters_dtype():
    policy, states = heads(), torch.randn(3, 5, 16)
    assert policy(states.half()).dtype == torch.float32
    torch.testing.assert_close(policy(states.half()), policy(states.half().float()), atol=0, rtol=0)


def test_gradients_reach_every_parameter_and_zero_states_are_finite():
    policy = heads()
    states = torch.randn(4, 5, 16)
    states[0] = 0
    states.requires_grad_()
    policy(states).sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    assert states.grad is not None and states.grad.isfinite().all()


def test_weights_follow_the_seed():
    first, again, other = heads(seed=1), heads(seed=1), heads(seed=2)
    assert torch.equal(first.weight_in, again.weight_in)
    assert not torch.equal(first.weight_in, other.weight_in)


@pytest.mark.parametrize("shape", [(3, 16), (3, 6, 16), (3, 5, 15), (3, 3, 16)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"accepted: \[B, 5 or 4, 16\]"):
        heads()(torch.zeros(shape))


@pytest.mark.parametrize("layer", [0, 5, 6])
def test_no_head_outside_the_policy_layers(layer):
    with pytest.raises(ValueError, match=r"accepted: 1\.\.4"):
        heads().at(layer, torch.zeros(1, 16))


def test_one_layer_has_nothing_to_decide():
    with pytest.raises(ValueError, match="at least 2"):
        PolicyHeads(1, 4, 4)


def test_importing_the_policy_brings_no_transformers():
    code = (
        "import sys, rl_exit.models.policy, rl_exit.models.exits; "
        "bad = {'transformers', 'peft', 'ray', 'datasets'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
