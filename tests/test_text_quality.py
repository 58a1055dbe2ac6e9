"""Rouge-L against hand-worked pairs and BERTScore against its definition."""

from __future__ import annotations

import pytest
import torch

from rl_exit.errors import ModelError
from rl_exit.text_quality import BertScore, rouge_l


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat, sat!", "the cat sat", 1.0),
        ("police kill the gunman", "police killed the gunman", 2 * 3 / 8),  # Lin (2004): a subsequence of 3
        ("the gunman kill police", "police killed the gunman", 2 * 2 / 8),
        ("a b c d e", "a x b y c", 2 * 3 / 10),
        ("", "word", 0.0),
        ("", "", 1.0),
        ("a a a", "a", 2 * 1 / 4),
    ],
)
def test_rouge_l_by_hand(candidate, reference, expected):
    assert rouge_l(candidate, reference) == pytest.approx(expected)
    assert rouge_l(reference, candidate) == pytest.approx(expected)


def test_bert_f_matches_every_token_with_its_nearest(tiny_backbone):
    score = BertScore(str(tiny_backbone))
    same, other, turned, empty = score.f1(
        ["the cat", "the cat", "cat the", ""], ["the cat", "old drill", "the cat", "a"]
    )
    assert same == pytest.approx(1.0, abs=1e-5) and other < same and turned < same and empty == 0.0
    tokens = score._tokenizer(["the cat", "old drill"], return_tensors="pt")
    with torch.no_grad():
        hidden = torch.nn.functional.normalize(score._model(**tokens).last_hidden_state[:, 1:-1], dim=-1)
    alike = hidden[0] @ hidden[1].t()
    p, r = alike.max(1).values.mean(), alike.max(0).values.mean()
    assert other == pytest.approx(float(2 * p * r / (p + r)), abs=1e-5)
    with pytest.raises(ModelError):
        BertScore("/no/such/encoder")


def test_the_default_encoder_is_the_installed_minilm():
    score = BertScore("minilm")
    same, near, far = score.f1(
        ["The cat sat on the mat."] * 3,
        ["The cat sat on the mat.", "A cat was sitting on a rug.", "Interest rates rose by two points."],
    )
    assert same == pytest.approx(1.0, abs=1e-4) and far < near < same
