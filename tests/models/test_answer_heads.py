"""The policy's own answers: against a plain re-computation, fitted and cross-fitted, in a saved model and in stores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rl_exit.config import PolicyConfig
from rl_exit.data.instances import Instances
from rl_exit.envs.state_store import StateStore, StateStoreWriter
from rl_exit.errors import ModelError
from rl_exit.evaluation import evaluate
from rl_exit.measurement import losses_of
from rl_exit.models.answer_heads import AnswerHeads, fit_answer_heads
from rl_exit.models.answers import all_answer_figures
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.policy_store import answer_ids, derive, fit_answers, policy_store
from rl_exit.trainers.store_evaluation import answers_of, evaluate_store, exit_logits_of

LAYERS, CLASSES, HIDDEN, COUNT = 3, 2, 6, 800


@pytest.fixture
def heads() -> AnswerHeads:
    heads = AnswerHeads(LAYERS, HIDDEN, CLASSES, width=4)
    generator = torch.Generator().manual_seed(3)
    for value in heads.buffers():
        value.add_(torch.randn(value.shape, generator=generator))
    return heads


def _data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States of which the exits at layers 1 and 2 read one direction only, those of layer 2 all there is to read."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, COUNT)
    states = rng.normal(size=(COUNT, LAYERS, HIDDEN)).astype(np.float32)
    states[:, :, 0] += 0.7 * (2 * labels[:, None] - 1)
    states[:, 0, 1] += 1.5 * (2 * labels - 1)  # the exit of layer 1 does not see it
    logits = np.stack([-states[:, :, 0], states[:, :, 0]], -1) * 0.7
    return states, logits.astype(np.float32), labels


def test_answers_equal_a_plain_recomputation(heads):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, LAYERS, HIDDEN, generator=generator)
    logits = torch.randn(9, LAYERS, CLASSES, generator=generator)
    found = heads(states, logits)
    w = {name: value.tolist() for name, value in heads.named_buffers()}

    def slow(row: int, at: int) -> list[float]:
        inner = [
            sum(states[row, at, h].item() * w["weight_in"][at][h][k] for h in range(HIDDEN)) + w["bias_in"][at][k]
            for k in range(4)
        ]
        bent = [0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in inner]
        return [
            w["scale"][at] * logits[row, at, c].item()
            + sum(bent[k] * w["weight_out"][at][k][c] for k in range(4))
            + w["bias_out"][at][c]
            for c in range(CLASSES)
        ]

    for row in range(9):
        for at in range(LAYERS - 1):
            assert found[row, at].tolist() == pytest.approx(slow(row, at), abs=1e-4)
        assert torch.equal(found[row, -1], logits[row, -1]), "the last exit speaks for itself"
    heads.weight_out[0, 0, 0] += 0.05
    assert not torch.allclose(heads(states, logits)[:, 0], found[:, 0], atol=1e-4)


def test_fresh_heads_answer_as_the_exits_do():
    states, logits, _ = (torch.from_numpy(array) for array in _data())
    assert torch.equal(AnswerHeads(LAYERS, HIDDEN, CLASSES)(states, logits), logits)
    with pytest.raises(ValueError, match="at least 2, 1, 2, 1"):
        AnswerHeads(1, 3, 2)


def test_the_fit_reads_what_the_exit_leaves_unread():
    states, logits, labels = _data()
    fitted = fit_answer_heads(lambda rows: states[rows], logits, labels, HIDDEN, seed=5)
    right = (fitted.answers.argmax(-1) == labels[:, None]).mean(0)
    plain = (logits.argmax(-1) == labels[:, None]).mean(0)
    assert fitted.better[0] and right[0] > plain[0] + 0.1
    assert right[0] < 0.99 and right[2] == plain[2]
    again = fit_answer_heads(lambda rows: states[rows], logits, labels, HIDDEN, seed=5)
    assert np.array_equal(again.answers, fitted.answers)
    assert all(torch.equal(a, b) for a, b in zip(again.heads.buffers(), fitted.heads.buffers(), strict=True))
    other = fit_answer_heads(lambda rows: states[rows], logits, labels, HIDDEN, seed=6)
    assert not np.array_equal(other.answers, fitted.answers)


def test_no_answer_comes_from_heads_that_know_the_instance():
    """Where labels are noise, cross-fitted answers are right by chance, and the exit keeps the word."""
    states, logits, labels = _data()
    noise = np.random.default_rng(9).permutation(labels)
    fitted = fit_answer_heads(lambda rows: states[rows], np.zeros_like(logits), noise, HIDDEN, seed=0, epochs=60)
    own = fitted.heads(torch.from_numpy(states), torch.zeros(logits.shape))
    assert not any(fitted.better) and not fitted.answers.any() and not own.any()


def test_few_instances_leave_the_exits_as_they_are():
    states, logits, labels = (array[:5] for array in _data())
    fitted = fit_answer_heads(lambda rows: states[rows], logits, labels, HIDDEN, seed=0)
    assert fitted.better == (False, False) and np.array_equal(fitted.answers, logits)


def test_they_are_saved_with_the_model(tmp_path, tiny_backbone):
    made = EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b"), max_length=32, policy_answer="own")
    made.answer_heads.bias_out.fill_(0.25)
    made.save_pretrained(tmp_path / "model")
    read = EarlyExitModel.from_pretrained(tmp_path / "model")
    assert read.config.policy_answer == "own" and torch.equal(read.answer_heads.bias_out, made.answer_heads.bias_out)
    assert not any("answer_heads" in name for name, _ in made.named_parameters()), "no objective trains them"
    plain = EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b"), max_length=32)
    assert plain.answer_heads is None
    with pytest.raises(ModelError, match="accepted: exit, own"):
        EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b"), max_length=32, policy_answer="all")


@pytest.fixture
def store(tmp_path) -> StateStore:
    states, logits, labels = _data()
    right = logits.argmax(-1) == labels[:, None]
    with StateStoreWriter(tmp_path / "store", LAYERS, HIDDEN, CLASSES, shard_size=256) as writer:
        writer.append(np.arange(COUNT), labels, states, losses_of(logits, labels), right, logits)
    return StateStore.open(tmp_path / "store")


@pytest.mark.parametrize("inputs", ["answers", "state"])
def test_the_policy_reads_and_is_rewarded_for_its_own_answers(store, tmp_path, inputs):
    answers = fit_answers(store, 0).answers
    derived = derive(store, inputs, tmp_path / "derived", answers)
    rows, labels = np.arange(COUNT), np.array(store.labels)
    right = answers.argmax(-1) == labels[:, None]
    np.testing.assert_array_equal(derived.correct, right)
    assert right[:, 0].mean() > np.mean(store.correct[:, 0]) + 0.1
    np.testing.assert_allclose(derived.losses, losses_of(answers, labels), atol=1e-6)
    read = all_answer_figures(torch.from_numpy(answers)).numpy() if inputs == "answers" else store.states(rows)
    np.testing.assert_array_equal(derived.states(rows), read)
    with policy_store(tmp_path / "store", inputs, answers) as path:
        assert path != tmp_path / "store" and path.is_dir()


def test_heads_are_fitted_to_the_instances_named_and_answer_for_all(store):
    ids = np.arange(0, COUNT, 2)
    states, logits, labels = _data()
    alone = fit_answer_heads(lambda rows: states[ids[rows]], logits[ids], labels[ids], HIDDEN, seed=4)
    found = fit_answers(store, 4, ids)
    assert np.array_equal(found.answers[ids], alone.answers)
    others = np.setdiff1d(np.arange(COUNT), ids)
    told = alone.heads(torch.from_numpy(states[others]), torch.from_numpy(logits[others]))
    np.testing.assert_allclose(found.answers[others], told.numpy(), atol=1e-5)
    assert not np.allclose(found.answers, fit_answers(store, 4).answers)


def test_a_run_says_which_instances_answers_are_fitted_to(tmp_path):
    assert answer_ids(tmp_path, PolicyConfig()) is None, "none were kept"
    (tmp_path / "data").mkdir()
    ends = np.array([0, 2, 3])
    kept = Instances(np.array([3, 7]), np.array([0, 1]), np.array([5, 6, 7], dtype=np.int32), ends, None, 0)
    kept.save(tmp_path / "data" / "held.arrow")
    assert answer_ids(tmp_path, PolicyConfig()).tolist() == [3, 7]
    assert answer_ids(tmp_path, PolicyConfig(answer_on="all", instances="all")) is None


def test_a_split_is_scored_by_the_policys_answers_and_held_against_the_exits(store):
    answers = answers_of(store, fit_answers(store, 0).heads)
    torch.manual_seed(0)
    policy = PolicyHeads(LAYERS, 12, 8, shared=True)
    odds = exit_logits_of(store, policy, "answers", answers)
    found = evaluate_store(store, odds, "accuracy", 0.3, answers)
    labels = np.array(store.labels)
    left = 1 + np.concatenate([odds > np.log(0.3 / 0.7), np.ones((COUNT, 1), bool)], 1).argmax(1)
    assert found.score == (answers[np.arange(COUNT), left - 1].argmax(-1) == labels).mean()
    assert found.full_depth_score == found.curve[-1].score == np.mean(store.correct[:, -1])
    assert found.exit_scores == pytest.approx(store.correct.mean(0))
    assert answers_of(store, None) is None
    with pytest.raises(ValueError, match="do not fit logits"):
        evaluate(labels, store.logits, store.losses, odds, "accuracy", 0.5, answers[:, :2])
