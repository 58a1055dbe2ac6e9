"""Embeddings in compiled code give what the modules give, and leave alone whatever somebody has changed."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from rl_exit import native
from rl_exit.data.instances import Instances
from rl_exit.models.backbones import SteppedBackbone, step_backbone
from rl_exit.models.backbones import embeddings as subject
from rl_exit.models.backbones.embeddings import Ragged
from rl_exit.stepping import enter, enter_instances

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
FAMILIES = (BertConfig, RobertaConfig, XLMRobertaConfig, CamembertConfig, ElectraConfig)
PADDING = 1
LENGTHS = (7, 0, 3, 12)

pytestmark = pytest.mark.skipif(native.library(subject.SOURCE) is None, reason="no C compiler here")


def backbone_of(kind: type = BertConfig, hidden_size: int = 36, **options):
    """36 is no multiple of a vector."""
    torch.manual_seed(0)
    shape = {"max_position_embeddings": 20, "type_vocab_size": 2, "pad_token_id": PADDING}
    model = AutoModel.from_config(kind(**SIZES | shape | {"hidden_size": hidden_size} | options)).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return step_backbone(model)


def instances_of(segments: bool = True, seed: int = 0) -> Instances:
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *LENGTHS])
    tokens = rng.integers(2, 50, offsets[-1]).astype(np.int32)
    tokens[2] = PADDING  # within a text: RoBERTa does not count it
    kinds = rng.integers(0, 2, offsets[-1]).astype(np.int8) if segments else None
    count = len(LENGTHS)
    return Instances(np.arange(count), np.zeros(count, np.int64), tokens, offsets, kinds, PADDING)


def rows_of(instances: Instances, rows=(0, 1, 2, 3)) -> Ragged:
    chosen = np.array(rows)
    parts = instances.tokens, instances.token_types, instances.offsets[chosen], instances.lengths[chosen]
    return Ragged(*parts, instances.pad_token_id)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("hidden_size", [36, 64])
@torch.inference_mode()
def test_it_is_the_module(kind, segments, hidden_size):
    backbone, instances = backbone_of(kind, hidden_size), instances_of(segments)
    for rows in (range(4), [3], [1], [2, 0], [1, 1]):
        found, expected = backbone.begin_rows(rows_of(instances, rows)), backbone.begin(**instances.batch(list(rows)))
        assert found is not None and found.hidden.shape == expected.hidden.shape
        assert torch.equal(found.lengths, expected.lengths) and found.padded == expected.padded
        for row, length in enumerate(expected.lengths.tolist()):
            real = max(length, 1)
            torch.testing.assert_close(found.hidden[row, :real], expected.hidden[row, :real], atol=2e-6, rtol=2e-6)
        mine, theirs = found.masks[None], expected.masks[None]
        assert (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs))


@torch.inference_mode()
def test_padding_is_zero_and_a_wider_embedding_is_projected():
    instances = instances_of()
    found = backbone_of().begin_rows(rows_of(instances))
    for row, length in enumerate(LENGTHS):
        assert found.hidden[row, max(length, 1) :].eq(0).all()
    narrow = backbone_of(ElectraConfig, embedding_size=20)
    state, expected = narrow.begin_rows(rows_of(instances, [0])), narrow.begin(**instances.batch([0]))
    torch.testing.assert_close(state.hidden, expected.hidden, atol=2e-6, rtol=2e-6)


@torch.inference_mode()
def test_weights_that_change_are_followed():
    backbone, instances = backbone_of(), instances_of()
    parts, rows = backbone.model.embeddings, rows_of(instances, [0])

    def agree():
        expected = backbone.begin(**instances.batch([0])).hidden
        torch.testing.assert_close(backbone.begin_rows(rows).hidden, expected, atol=2e-6, rtol=2e-6)

    agree()
    parts.word_embeddings.weight.normal_()
    agree()
    parts.LayerNorm.bias = nn.Parameter(torch.randn(36))
    agree()
    parts.position_embeddings.weight.data = torch.randn(20, 36)
    agree()
    parts.LayerNorm.eps = 1.0
    agree()
    parts.word_embeddings = nn.Embedding(60, 36).eval()
    agree()
    weight = parts.position_embeddings.weight
    weight.data = torch.randn(13, 36)  # fewer than the module says
    agree()
    weight.data = weight.data[:5]  # the same place, fewer still
    with pytest.raises(IndexError, match="5 positions"):
        backbone.begin_rows(rows)
    weight.data = torch.randn(20, 36).t().contiguous().t()
    assert backbone.begin_rows(rows) is None, "not contiguous"
    weight.data = weight.data.contiguous()
    agree()
    other = copy.deepcopy(backbone)
    before = backbone.begin_rows(rows).hidden
    other.model.embeddings.word_embeddings.weight.normal_()
    expected = other.begin(**instances.batch([0])).hidden
    torch.testing.assert_close(other.begin_rows(rows).hidden, expected, atol=2e-6, rtol=2e-6)
    assert torch.equal(backbone.begin_rows(rows).hidden, before) and not torch.equal(before, expected)


@torch.inference_mode()
def test_another_default_type_changes_nothing():
    backbone, rows = backbone_of(), rows_of(instances_of())
    expected = backbone.begin_rows(rows).hidden
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = backbone.begin_rows(rows).hidden
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def _hook(parts):
    parts.word_embeddings.register_forward_hook(lambda module, given, out: 2 * out)


def _hook_before(parts):
    parts.register_forward_pre_hook(lambda module, given: None)


def _adapt(parts):
    class Adapted(nn.Embedding):
        pass

    parts.word_embeddings.__class__ = Adapted


def _patch(parts):
    forward = parts.LayerNorm.forward
    parts.LayerNorm.forward = lambda states: forward(states) + 1.0


def _dropout_alone(parts):
    parts.dropout.train()


def _bound(parts):
    parts.word_embeddings = nn.Embedding(50, 36, max_norm=1.0)


def _light(parts):
    parts.word_embeddings.to(torch.bfloat16)


def _dropout_and_more(parts):
    parts.dropout = nn.Sequential(nn.Dropout(), nn.Linear(36, 36)).eval()


def _add(parts):
    parts.extra = nn.Linear(2, 2)


CHANGES = (_hook, _hook_before, _adapt, _patch, _dropout_alone, _dropout_and_more, _bound, _light, _add)


@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig])
@pytest.mark.parametrize("change", CHANGES)
@torch.inference_mode()
def test_what_was_changed_runs_as_modules(change, kind):
    backbone, instances = backbone_of(kind), instances_of()
    parts, rows, batch = backbone.model.embeddings, rows_of(instances, [0]), instances.batch([0])
    assert backbone.begin_rows(rows) is not None
    change(parts)
    if change is _bound:
        parts.word_embeddings.eval()
    assert backbone.begin_rows(rows) is None
    torch.manual_seed(0)
    expected = parts(input_ids=batch["input_ids"], token_type_ids=batch["token_type_ids"])
    torch.manual_seed(0)
    torch.testing.assert_close(backbone.begin(**batch).hidden, expected, atol=2e-6, rtol=2e-6)


@torch.inference_mode()
def test_a_bound_that_is_set_later_counts():
    backbone, rows = backbone_of(), rows_of(instances_of())
    assert backbone.begin_rows(rows) is not None
    backbone.model.embeddings.word_embeddings.max_norm = 1.0
    assert backbone.begin_rows(rows) is None


@torch.inference_mode()
def test_a_backbone_that_begins_otherwise_is_asked():
    class Other(SteppedBackbone):
        def begin(self, *args, **words):
            return super().begin(*args, **words)

    backbone = backbone_of()
    other = Other(backbone.model, backbone._family)
    assert other.begin_rows(rows_of(instances_of())) is None


@torch.inference_mode()
def test_where_it_cannot_be_had(monkeypatch):
    rows = rows_of(instances_of())
    assert backbone_of(DistilBertConfig, dim=36, n_layers=2, n_heads=4).begin_rows(rows) is None
    with torch.inference_mode(False):
        assert backbone_of().begin_rows(rows) is None, "gradients are wanted"
    monkeypatch.setattr(subject, "_function", lambda: None)
    assert backbone_of().begin_rows(rows) is None


@torch.inference_mode()
def test_numbers_outside_the_tables_are_refused():
    backbone, instances = backbone_of(), instances_of()
    for name, value in (("tokens", 50), ("tokens", -1), ("token_types", 2), ("token_types", -1)):
        wrong = getattr(instances, name).copy()
        wrong[4] = value
        with pytest.raises(IndexError, match="50 tokens, 2 segments and 20 positions"):
            backbone.begin_rows(rows_of(replace(instances, **{name: wrong})))
    long = Instances(np.arange(1), np.zeros(1, np.int64), np.full(21, 5, np.int32), np.array([0, 21]), None, PADDING)
    with pytest.raises(IndexError, match="20 positions"):
        backbone.begin_rows(rows_of(long, [0]))


@torch.inference_mode()
def test_instances_enter_as_their_batch_does(monkeypatch):
    class Model:
        backbone, device = backbone_of(), torch.device("cpu")

    class Rule:
        def start(self, batch_size, device):
            return {"memory": torch.zeros(batch_size)}

    instances, rows = instances_of(), np.array([3, 0, 2])
    # Arrays with gaps, as a caller may have cut them out of larger ones.
    gaps = replace(instances, tokens=np.repeat(instances.tokens, 2)[::2], token_types=instances.token_types.copy())
    expected = enter(Model, instances.batch(rows), Rule(), rows)
    for given in (instances, gaps):
        found = enter_instances(Model, given, Rule(), rows)
        assert found.layer == 0 and found.rows.tolist() == rows.tolist() and len(found.carry["memory"]) == 3
        for mine, theirs, length in zip(found.state.hidden, expected.state.hidden, (12, 7, 3), strict=True):
            torch.testing.assert_close(mine[:length], theirs[:length], atol=2e-6, rtol=2e-6)
    for wrong, error in (([4], IndexError), ([-1], IndexError), ([], ValueError)):
        with pytest.raises(error):
            enter_instances(Model, instances, Rule(), np.array(wrong, dtype=np.int64))
    monkeypatch.setattr(subject, "_function", lambda: None)
    again = enter_instances(Model, instances, Rule(), rows)
    assert torch.equal(again.state.hidden, expected.state.hidden)
