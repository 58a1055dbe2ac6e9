"""Exit classifiers: stacked equals separate linear layers; dropout only in training."""

import pytest
import torch

from rl_exit.models.exits import ExitHeads


def exits(dropout: float = 0.0) -> ExitHeads:
    torch.manual_seed(0)
    return ExitHeads(4, 8, 3, dropout)


def test_stacked_equals_one_linear_layer_per_exit():
    heads, states = exits(), torch.randn(5, 4, 8)
    expected = torch.stack(
        [torch.nn.functional.linear(states[:, i], heads.weight[i].t(), heads.bias[i]) for i in range(4)], 1
    )
    assert heads(states).shape == (5, 4, 3)
    torch.testing.assert_close(heads(states), expected, atol=1e-6, rtol=0)
    for layer in range(1, 5):
        torch.testing.assert_close(heads.at(layer, states[:, layer - 1]), expected[:, layer - 1], atol=1e-6, rtol=0)
    heads.bias.data[2, 0] += 1e-3
    assert not torch.allclose(heads(states), expected, atol=1e-6, rtol=0)


def test_exits_do_not_read_each_other():
    heads, states = exits(), torch.randn(2, 4, 8, requires_grad=True)
    heads(states)[:, 1].sum().backward()
    assert states.grad is not None
    assert states.grad[:, 1].abs().sum() > 0
    assert states.grad[:, [0, 2, 3]].abs().sum() == 0


def test_dropout_acts_in_training_only():
    heads, states = exits(0.5), torch.randn(64, 4, 8)
    heads.eval()
    torch.testing.assert_close(heads(states), heads(states), atol=0, rtol=0)
    heads.train()
    assert not torch.allclose(heads(states), heads(states))


@pytest.mark.parametrize("shape", [(2, 8), (2, 3, 8), (2, 4, 7)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"accepted: \[B, 4, 8\]"):
        exits()(torch.zeros(shape))


@pytest.mark.parametrize("layer", [0, 5])
def test_no_exit_outside_the_layers(layer):
    with pytest.raises(ValueError, match=r"accepted: 1\.\.4"):
        exits().at(layer, torch.zeros(1, 8))


@pytest.mark.parametrize("bad", [{"num_classes": 1}, {"num_layers": 0}, {"dropout": 1.5}])
def test_impossible_sizes_are_refused(bad):
    sizes = {"num_layers": 4, "hidden_size": 8, "num_classes": 3, "dropout": 0.1} | bad
    with pytest.raises(ValueError, match="accepted"):
        ExitHeads(**sizes)
