"""A model cut to a depth answers as the whole one does there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from rl_exit import EarlyExitModel
from rl_exit.criteria import Fixed
from rl_exit.errors import ConfigError
from rl_exit.models.prune import pruned

TEXTS = ["the red cat", "saw", "my old hammer lost near a big dog", "drill under the horse"]


@pytest.fixture(scope="module")
def model(tiny_backbone: Path) -> EarlyExitModel:
    return EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b"), policy_inputs="answers", policy_shared=True)


def same(found: list, expected: list) -> None:
    for one, two in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(two.probabilities, abs=1e-5)


def test_it_answers_as_exit_d(model, tmp_path):
    expected = model.predict(TEXTS, criterion=Fixed(2))
    small = pruned(model, 2)
    assert (small.num_layers, model.num_layers) == (2, 3)
    assert small.num_parameters() < model.num_parameters()
    same(small.predict(TEXTS), expected)
    assert {answer.exit_layer for answer in small.predict(TEXTS)} == {2}
    small.save_pretrained(tmp_path / "small")
    same(EarlyExitModel.from_pretrained(tmp_path / "small").predict(TEXTS), expected)
    other = model.predict(TEXTS, threshold=1.0)
    assert other[0].probabilities != pytest.approx(expected[0].probabilities, abs=1e-4), "depths must be told apart"


def test_decoders_can_be_cut(tmp_path, tiny_backbone):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    )
    LlamaModel(config).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(tmp_path / "llama")
    whole = EarlyExitModel.from_backbone(str(tmp_path / "llama"), ("a", "b"), policy_shared=False)
    small = pruned(whole, 3)
    same(small.predict(TEXTS), whole.predict(TEXTS, criterion=Fixed(3)))
    small.save_pretrained(tmp_path / "small")
    same(EarlyExitModel.from_pretrained(tmp_path / "small").predict(TEXTS), small.predict(TEXTS))


@pytest.mark.parametrize("depth", [0, 1, 3, 2.0, True])
def test_a_depth_out_of_range_is_refused(model, depth):
    with pytest.raises(ConfigError, match=r"can be cut to 2\.\.2"):
        pruned(model, depth)
