"""Pooled answers: against a plain re-computation, fitted to data of known weights, in a saved model and in stores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rl_exit.envs.state_store import StateStore, StateStoreWriter
from rl_exit.errors import ModelError
from rl_exit.evaluation import evaluate
from rl_exit.measurement import losses_of
from rl_exit.models.answer_pool import AnswerPool, fit_answer_pool
from rl_exit.models.answers import all_answer_figures
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.policy_store import derive, fitted_pool, policy_store
from rl_exit.trainers.store_evaluation import answers_of, evaluate_store, exit_logits_of

LAYERS, CLASSES = 4, 3


@pytest.fixture
def pool() -> AnswerPool:
    pool = AnswerPool(LAYERS, CLASSES)
    generator = torch.Generator().manual_seed(3)
    for name, value in pool.named_buffers():
        value.add_(torch.rand(value.shape, generator=generator), alpha=1.0 if name == "below" else 0.5)
    return pool


def _logits(count: int = 60) -> torch.Tensor:
    return 2.0 * torch.randn(count, LAYERS, CLASSES, generator=torch.Generator().manual_seed(0))


def test_answers_equal_a_plain_recomputation(pool):
    logits = _logits()
    found = pool(logits)
    own, below, bias = (getattr(pool, name).tolist() for name in ("own", "below", "bias"))
    for row, answer in zip(logits.tolist(), found.tolist(), strict=True):
        said = [0.0] * CLASSES
        for at in range(LAYERS - 1):
            said = [own[at] * row[at][c] + (below[at] * said[c] if at else 0.0) + bias[at][c] for c in range(CLASSES)]
            assert answer[at] == pytest.approx(said, abs=1e-5)
        assert answer[-1] == row[-1], "the last exit speaks for itself"
    pool.below[1] += 0.01
    assert not torch.allclose(pool(logits), found, atol=1e-5)


def test_a_fresh_pool_answers_as_the_exits_do():
    logits = _logits()
    assert torch.equal(AnswerPool(LAYERS, CLASSES)(logits), logits)
    with pytest.raises(ValueError, match="at least 2, 2"):
        AnswerPool(1, 2)


def test_memory_survives_rows_that_leave(pool):
    logits = _logits()
    expected, memory, inside = pool(logits), {}, torch.arange(len(logits))
    for layer in range(1, LAYERS + 1):
        assert torch.equal(pool.at(layer, logits[inside, layer - 1], memory), expected[inside, layer - 1])
        staying = torch.arange(len(inside)) % 3 != 0
        inside = inside[staying]
        memory = {name: value[staying] for name, value in memory.items()}


def _noisy(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exits with independent noise of equal size: the best answer weighs all of them alike."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 2, (count,), generator=generator)
    sign = (2.0 * labels - 1.0)[:, None] * torch.ones(count, LAYERS)
    seen = sign + 1.5 * torch.randn(count, LAYERS, generator=generator)
    return torch.stack([torch.zeros_like(seen), seen], -1), labels


def test_the_fit_finds_the_weights_of_independent_evidence():
    logits, labels = _noisy(20_000)
    pool = fit_answer_pool(logits, labels, ridge=0.0)
    # ln p(x|1)/p(x|0) = 2 x / 1.5^2 for each exit, summed up.
    best = 2.0 / 1.5**2
    torch.testing.assert_close(pool.own, torch.full((LAYERS - 1,), best), atol=0.05, rtol=0)
    torch.testing.assert_close(pool.below[1:], torch.ones(LAYERS - 2), atol=0.08, rtol=0)
    plain = (logits.argmax(-1) == labels[:, None]).float().mean(0)
    better = (pool(logits).argmax(-1) == labels[:, None]).float().mean(0)
    assert better[2] > plain[2] + 0.08
    again = fit_answer_pool(logits, labels, ridge=0.0)
    assert all(torch.equal(a, b) for a, b in zip(pool.buffers(), again.buffers(), strict=True))


def test_ridge_keeps_few_instances_near_the_exits():
    logits, labels = _noisy(40)
    strong, weak = (fit_answer_pool(logits, labels, ridge=value) for value in (100.0, 1e-6))
    assert (strong.below.abs().max(), strong.bias.abs().max()) < (0.01, 0.01)
    assert weak.below.abs().max() > 0.1
    truth = labels[:, None].expand(-1, LAYERS)
    losses = [F.cross_entropy(pool(logits).transpose(1, 2), truth) for pool in (weak, strong)]
    assert losses[0] < losses[1]


def test_it_is_saved_with_the_model(tmp_path, tiny_backbone):
    made = EarlyExitModel.from_backbone(
        str(tiny_backbone), ("a", "b"), max_length=32, policy_inputs="answers", policy_answer="pooled"
    )
    made.answer_pool.below.fill_(0.25)
    made.save_pretrained(tmp_path / "model")
    read = EarlyExitModel.from_pretrained(tmp_path / "model")
    assert read.config.policy_answer == "pooled" and torch.equal(read.answer_pool.below, made.answer_pool.below)
    assert not any("answer_pool" in name for name, _ in made.named_parameters()), "no objective trains it"
    plain = EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b"), max_length=32)
    assert plain.answer_pool is None and plain.answers(_logits()) is not None
    with pytest.raises(ModelError, match="accepted: exit, pooled"):
        EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b"), max_length=32, policy_answer="all")


@pytest.fixture
def store(tmp_path) -> StateStore:
    rng = np.random.default_rng(0)
    logits, labels = (array.numpy() for array in _noisy(500))
    states = rng.normal(size=(500, LAYERS, 5)).astype(np.float32)
    with StateStoreWriter(tmp_path / "store", LAYERS, 5, 2, shard_size=128) as writer:
        writer.append(
            np.arange(500), labels, states, losses_of(logits, labels), logits.argmax(-1) == labels[:, None], logits
        )
    return StateStore.open(tmp_path / "store")


@pytest.mark.parametrize("inputs", ["answers", "state"])
def test_the_policy_reads_and_is_rewarded_for_the_pooled_answers(store, tmp_path, inputs):
    pool = fitted_pool(store, None)
    answers = pool(torch.tensor(np.array(store.logits)))
    derived = derive(store, inputs, tmp_path / "derived", pool)
    rows = np.arange(500)
    right = answers.argmax(-1).numpy() == np.array(store.labels)[:, None]
    np.testing.assert_array_equal(derived.correct, right)
    assert not np.array_equal(right, store.correct)
    np.testing.assert_allclose(derived.losses, losses_of(answers.numpy(), np.array(store.labels)), atol=1e-6)
    read = all_answer_figures(answers).numpy() if inputs == "answers" else store.states(rows)
    np.testing.assert_array_equal(derived.states(rows), read)
    with policy_store(store_path := tmp_path / "store", inputs, pool) as path:
        assert path != store_path and path.is_dir()


def test_a_split_is_scored_by_the_pooled_answers_and_held_against_the_exits(store):
    pool = fitted_pool(store, np.arange(250))
    assert not torch.equal(pool.own, fitted_pool(store, None).own), "only the instances named"
    torch.manual_seed(0)
    heads = PolicyHeads(LAYERS, 12, 8, shared=True)
    found = evaluate_store(store, heads, "accuracy", 0.3, "answers", pool)
    odds = exit_logits_of(store, heads, "answers", pool)
    labels, answers = np.array(store.labels), answers_of(store, pool)
    left = 1 + np.concatenate([odds > np.log(0.3 / 0.7), np.ones((500, 1), bool)], 1).argmax(1)
    assert found.score == (answers[np.arange(500), left - 1].argmax(-1) == labels).mean()
    assert found.full_depth_score == found.curve[-1].score == np.mean(store.correct[:, -1])
    assert found.exit_scores == pytest.approx(store.correct.mean(0))
    assert answers_of(store, None) is not None
    with pytest.raises(ValueError, match="do not fit logits"):
        evaluate(labels, store.logits, store.losses, odds, "accuracy", 0.5, answers[:, :2])
