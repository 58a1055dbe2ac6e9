"""Every criterion in the live engine leaves where it leaves on stored arrays, and ``predict`` takes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from rl_exit import EarlyExitModel
from rl_exit.criteria import (
    CRITERIA,
    LEARNED,
    ConsistentEE,
    StoredSplit,
    criterion,
    exits_from_store,
    leaving_above,
    load_criterion,
    save_criterion,
)
from rl_exit.criteria.fitting import FitSettings, fit_criterion
from rl_exit.criteria.stored import scores_from_store
from rl_exit.data.instances import Instances
from rl_exit.errors import ConfigError, RunError
from rl_exit.inference import run_instances
from rl_exit.models.pretrained import find_source, load_tokenizer

COUNT = 70
PARAMS = {"fixed": {"depth": 3}, "pabee": {"patience": 2}}
WORDS = sorted(set(CRITERIA) - {"pabee_regression"})


@pytest.fixture(scope="module")
def rows() -> Instances:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, COUNT)
    return Instances(
        ids=np.arange(COUNT),
        labels=rng.integers(0, 3, COUNT),
        tokens=rng.integers(4, 20, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_types=None,
        pad_token_id=0,
    )


@pytest.fixture(scope="module")
def model(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory, rows: Instances) -> EarlyExitModel:
    """Six layers with wide weights, exits and policy centred on the rows, so that every rule has something to do."""
    tokenizer = load_tokenizer(find_source(str(tiny_backbone)))
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("deep") / "bert"
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = EarlyExitModel.from_backbone(str(folder), ("a", "b", "c"), pooling="mean", max_length=40)
    with torch.no_grad():
        for weight in made.backbone.model.parameters():
            weight *= 6 if weight.dim() == 2 else 1
        made.exits.weight *= 3
        every = made.all_exits(**rows.batch(range(COUNT)))
        made.exits.bias -= every.logits.mean(0)
        made.policy.weight_out *= 30
        made.policy.bias_out -= made.policy(every.states).quantile(0.6, dim=0)
    return made


@pytest.fixture(scope="module")
def split(model: EarlyExitModel, rows: Instances) -> StoredSplit:
    with torch.no_grad():
        every = model.all_exits(**rows.batch(range(COUNT)))
        odds = model.policy(every.states)
    return StoredSplit.from_logits(rows.labels, every.logits.numpy(), every.states.numpy(), odds.numpy())


@pytest.fixture(scope="module")
def folder(split: StoredSplit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All learned criteria, fitted on the rows."""
    target = tmp_path_factory.mktemp("fitted") / "criteria"
    for word in LEARNED:
        save_criterion(fit_criterion(word, split, settings=FitSettings(epochs=2, lr=2e-2)), target)
    return target


@pytest.mark.parametrize("word", WORDS)
def test_engine_and_store_leave_at_the_same_layers(word, model, rows, split, folder):
    params = PARAMS.get(word, {"threshold": 0.5})
    rule = load_criterion(folder, word, **params)
    scores = scores_from_store(rule, split)
    reached = np.unique(np.maximum.accumulate(scores, axis=1))
    reached = reached[np.isfinite(reached)]
    # A threshold in the middle of the widest of the central gaps: rounding of a live pass decides nothing.
    central = np.arange(len(reached) // 4, max(3 * len(reached) // 4, len(reached) // 4 + 1))
    central = central[central < len(reached) - 1]
    at = central[np.argmax(reached[central + 1] - reached[central])]
    rule = leaving_above(rule, float((reached[at] + reached[at + 1]) / 2))
    expected = exits_from_store(rule, split.states, split.logits, split.exit_logits)
    found = run_instances(model, rows, rule, batch_size=9)
    assert torch.equal(found.exit_layer, expected)
    assert len(expected.unique()) >= (1 if word == "fixed" else 2)
    picked = split.logits[np.arange(COUNT), expected.numpy() - 1]
    np.testing.assert_allclose(found.logits.numpy(), picked, atol=1e-3)


def test_a_rule_made_of_the_policys_is_asked_itself(model, rows):
    class Patient(ConsistentEE):
        def leave(self, layer, view, carry):
            return super().leave(layer, view, carry) & (layer >= 4)

    plain, patient = (run_instances(model, rows, rule(0.5)).exit_layer for rule in (ConsistentEE, Patient))
    assert (plain < 4).any() and (patient >= 4).all()


def test_predict_takes_a_criterion_by_word(model, folder):
    texts = ["the old cat", "my new hammer near the red saw", "dog"]
    for rule in (
        criterion("pabee", patience=2),
        load_criterion(folder, "lte"),
        load_criterion(folder, "cat", threshold=0.2),
    ):
        found = model.predict(texts, criterion=rule, batch_size=2)
        assert [1 <= one.exit_layer <= 6 for one in found] == [True] * 3
    assert [one.exit_layer for one in model.predict(texts, criterion=criterion("pabee", patience=6))] == [6] * 3
    assert min(one.exit_layer for one in model.predict(texts, criterion=criterion("pabee", patience=1))) >= 2
    assert [one.exit_layer for one in model.predict(texts, criterion=criterion("entropy", threshold=2.0))] == [1] * 3


def test_a_fit_for_another_model_is_refused(model, folder, split):
    other = StoredSplit.from_logits(split.labels, split.logits[:, :4], split.states[:, :4])
    for word in ("lte", "right_tool", "beem"):
        with pytest.raises(ConfigError, match=rf"'{word}' was learned on a model of 6 layers.*this one has 4"):
            scores_from_store(load_criterion(folder, word), other)
    narrow = StoredSplit.from_logits(split.labels, split.logits, split.states[:, :, :8])
    with pytest.raises(ConfigError, match="6 layers of width 16, this one has 6 layers of width 8"):
        scores_from_store(load_criterion(folder, "palbert"), narrow)


def test_regression_needs_numbers(split):
    with pytest.raises(ConfigError, match="one number, these give 3 classes"):
        scores_from_store(criterion("pabee_regression", threshold=0.1), split)


def test_load_tells_what_is_there(folder, tmp_path):
    assert load_criterion(tmp_path, "pabee", patience=3) == criterion("pabee", patience=3), "nothing to read"
    assert load_criterion(tmp_path, "beem", threshold=0.5) == criterion("beem", threshold=0.5)
    with pytest.raises(RunError, match=r"no learned criterion 'lte' here; found: none"):
        load_criterion(tmp_path, "lte")
    with pytest.raises(ConfigError, match="'loud' is unknown"):
        load_criterion(folder, "loud")
    with pytest.raises(ConfigError, match="accepted: learned, threshold"):
        load_criterion(folder, "lte", patience=2)
    with pytest.raises(ConfigError, match="has learned nothing"):
        save_criterion(criterion("pabee", patience=3), folder)
