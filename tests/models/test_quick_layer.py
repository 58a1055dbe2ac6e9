"""A layer without its modules' calls gives what the modules give, and leaves alone whatever somebody has changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from rl_exit.models.backbones import quick_layer as module
from rl_exit.models.backbones import step_backbone
from rl_exit.models.backbones.quick_layer import quick_layer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
FAMILIES = (BertConfig, RobertaConfig, XLMRobertaConfig, CamembertConfig, ElectraConfig)


def model_of(kind: type, **options):
    torch.manual_seed(0)
    model = AutoModel.from_config(kind(**SIZES, **options)).eval()
    for weight in model.parameters():  # biases and norms too: as they are initialised, half of a mistake would not show
        nn.init.normal_(weight, std=0.3)
    return model


def layer_of(kind: type = BertConfig, **options):
    return model_of(kind, **options).encoder.layer[0]


HIDDEN = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(7) < torch.tensor([7, 2, 5])[:, None])[:, None, None, :]


@pytest.fixture
def padding_along(monkeypatch):
    """Padding is computed along however much there is, so that the numbers are the modules' own to the last digit."""
    monkeypatch.setattr(module, "FULL", 0.0)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("mask", [None, MASK])
@torch.inference_mode()
def test_it_is_the_layer(kind, mask, padding_along):
    layer = layer_of(kind)
    found, expected = quick_layer(layer, HIDDEN, mask), layer(HIDDEN, mask)
    assert found is not None
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    nn.init.normal_(layer.output.dense.bias, std=1.0)  # weights that change in place are followed
    assert not torch.equal(found, quick_layer(layer, HIDDEN, mask))
    torch.testing.assert_close(quick_layer(layer, HIDDEN, mask), layer(HIDDEN, mask), atol=0, rtol=0)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.inference_mode()
def test_padding_is_done_without(kind, monkeypatch):
    """Linears see the real tokens alone, what stands at padding is finite and reaches nobody."""
    layer, real = layer_of(kind), MASK[:, 0, 0]
    expected, shapes = layer(HIDDEN, MASK), []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda states, *weights: shapes.append(states.shape) or linear(states, *weights))
    found = quick_layer(layer, HIDDEN, MASK)
    assert {shape[0] for shape in shapes} == {14} and len(shapes) == 6
    assert found.shape == HIDDEN.shape and bool(found.isfinite().all())
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    others = torch.where(real[:, :, None], HIDDEN, torch.nan)
    assert quick_layer(layer, others, MASK).equal(found)
    monkeypatch.setattr(module, "FULL", 14 / 21 - 1e-6)
    torch.testing.assert_close(quick_layer(layer, HIDDEN, MASK), expected, atol=0, rtol=0)


@torch.inference_mode()
def test_padding_is_done_without_in_other_precisions():
    layer, real = layer_of(), MASK[:, 0, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = quick_layer(layer, HIDDEN, MASK), layer(HIDDEN, MASK)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found[real], expected[real], atol=0.05, rtol=0.05)
    layer, given = layer.to(torch.bfloat16), HIDDEN.to(torch.bfloat16)
    found, expected = quick_layer(layer, given, MASK), layer(given, MASK)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found[real], expected[real], atol=0.05, rtol=0.05)


@torch.inference_mode()
def test_masks_of_another_kind_are_left_to_the_attention():
    """Numbers that are added, as after a change of the attention while rows waited; and one that hides everything."""
    layer = layer_of()
    for mask in (torch.zeros(MASK.shape).masked_fill(~MASK, -1e9), torch.zeros_like(MASK)):
        torch.testing.assert_close(
            quick_layer(layer, HIDDEN, mask), layer(HIDDEN, mask), equal_nan=True, atol=0, rtol=0
        )


@torch.inference_mode()
def test_a_mask_that_hides_the_first_token_is_kept_to():
    """Not one that the engine makes, as it pads on the right."""
    layer, mask = layer_of(), MASK.flip(0, 3)
    found, expected = quick_layer(layer, HIDDEN, mask), layer(HIDDEN, mask)
    torch.testing.assert_close(found[mask[:, 0, 0]], expected[mask[:, 0, 0]], atol=1e-5, rtol=1e-5)


def _hook(layer):
    layer.attention.output.dense.register_forward_hook(lambda module, given, out: 2 * out)


def _hook_before(layer):
    layer.register_forward_pre_hook(lambda module, given: None)


def _replace(layer):
    class Adapted(nn.Linear):
        pass

    layer.attention.self.query.__class__ = Adapted


def _patch(layer):
    forward = layer.intermediate.forward
    layer.intermediate.forward = lambda states: forward(states) + 1.0


def _train(layer):
    layer.train()


def _dropout_alone(layer):
    """As for Monte Carlo dropout."""
    layer.output.dropout.train()


def _attention_dropout(layer):
    layer.attention.self.train()


def _hook_on_dropout(layer):
    layer.attention.output.dropout.register_forward_hook(lambda module, given, out: 2 * out)


def _parametrise(layer):
    nn.utils.parametrizations.weight_norm(layer.intermediate.dense)


def _without_parameters(layer):
    """As in the replicas of DataParallel."""
    weight = layer.output.LayerNorm._parameters.pop("weight")
    layer.output.LayerNorm.__dict__["weight"] = weight.detach()


def _compile(layer):
    layer.compile(backend="eager")


@pytest.mark.parametrize(
    "change",
    [
        *(_hook, _hook_before, _replace, _patch, _train, _compile),
        *(_dropout_alone, _attention_dropout, _hook_on_dropout, _parametrise, _without_parameters),
    ],
)
@torch.inference_mode()
def test_what_was_changed_runs_as_modules(change):
    layer = layer_of()
    change(layer)
    assert quick_layer(layer, HIDDEN, None) is None


@pytest.mark.parametrize(("kind", "options"), [(BertConfig, {"hidden_act": "relu"}), (DistilBertConfig, {})])
@torch.inference_mode()
def test_other_layers_run_as_modules(kind, options):
    if kind is DistilBertConfig:
        layer = AutoModel.from_config(kind(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=50)).eval()
        layer = layer.transformer.layer[0]
    else:
        layer = layer_of(kind, **options)
    assert quick_layer(layer, HIDDEN, None) is None


def test_gradients_go_through_the_modules():
    assert quick_layer(layer_of(), HIDDEN, None) is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_a_backbone_asks_where_it_may(attention, monkeypatch):
    """A hook inside a layer is called; the eager attention, whose mask is added, is never gone round."""
    from rl_exit.models.backbones import bert_like

    asked = []
    monkeypatch.setattr(bert_like, "quick_layer", lambda *given: asked.append(given) or quick_layer(*given))
    backbone = step_backbone(model_of(BertConfig, attn_implementation=attention))
    ids, mask = torch.randint(4, 50, (3, 7), generator=torch.Generator().manual_seed(2)), MASK[:, 0, 0].long()
    state = backbone.step(1, backbone.begin(ids, mask))
    assert len(asked) == (attention == "sdpa")
    real = mask.bool()
    expected = backbone.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(state.hidden[real], expected[real], atol=1e-5, rtol=0)
    layer = backbone.model.encoder.layer[0]
    assert layer._forward_hooks, "transformers' own hooks stay, or this shows nothing"
    assert quick_layer(layer, state.hidden, None) is not None, "and are in nobody's way"
    seen = []
    layer.intermediate.register_forward_hook(lambda *given: seen.append(given))
    backbone.step(1, backbone.begin(ids, mask))
    assert len(seen) == 1


@pytest.mark.parametrize("kind", FAMILIES)
@torch.inference_mode()
def test_in_other_precisions_and_under_a_mask_of_blocks(kind, padding_along):
    row = torch.repeat_interleave(torch.arange(3), torch.tensor([7, 2, 5]))
    block, flat = (row[:, None] == row)[None, None], HIDDEN.flatten(0, 1)[None, :14]
    layer = layer_of(kind)
    torch.testing.assert_close(quick_layer(layer, flat, block), layer(flat, block), atol=0, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(quick_layer(layer, HIDDEN, MASK), layer(HIDDEN, MASK), atol=0, rtol=0)
    layer = layer.to(torch.bfloat16)
    given = HIDDEN.to(torch.bfloat16)
    torch.testing.assert_close(quick_layer(layer, given, MASK), layer(given, MASK), atol=0, rtol=0)
