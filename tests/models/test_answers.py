"""The policy's view of the exits' answers, against a plain re-computation, and as a store of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rl_exit.envs.state_store import StateStore, StateStoreWriter
from rl_exit.models.answers import (
    NAMES,
    NUM_ANSWERS,
    all_answer_figures,
    answer_figures,
    every_policy_input,
    input_size,
    policy_input,
)
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.policy_store import derive, policy_store, stored_policy_input
from rl_exit.trainers.store_evaluation import exit_logits_of

LAYERS, CLASSES = 5, 4


@pytest.fixture
def logits() -> torch.Tensor:
    return 3.0 * torch.randn(40, LAYERS, CLASSES, generator=torch.Generator().manual_seed(0))


def _softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def _slow(rows: list[list[float]]) -> list[dict[str, float]]:
    """Figures of one instance, layer by layer, in words of plain Python."""
    found = []
    shares = [_softmax(row) for row in rows]
    answers = [max(range(len(p)), key=lambda c: p[c]) for p in shares]
    entropies = [-sum(x * math.log(x) for x in p) / math.log(len(p)) for p in shares]
    for at, p in enumerate(shares):
        mine, below = answers[at], range(at)
        run = 0
        while run < at and answers[at - run - 1] == mine:
            run += 1
        ordered = sorted(p, reverse=True)
        found.append(
            {
                "log_odds": max(-10.0, min(10.0, math.log(p[mine] / (1 - p[mine])))) / 3,
                "margin": ordered[0] - ordered[1],
                "entropy": entropies[at],
                "log_entropy": math.log(max(entropies[at], 1e-6)) / 3,
                "same_as_before": float(at > 0 and answers[at - 1] == mine),
                "share_of_layers": sum(answers[j] == mine for j in below) / at if at else 0.0,
                "probability_before": shares[at - 1][mine] if at else 0.0,
                "mean_probability": sum(shares[j][mine] for j in below) / at if at else 0.0,
                "entropy_before": entropies[at - 1] if at else 0.0,
                "change": sum(abs(a - b) for a, b in zip(p, shares[at - 1], strict=True)) / 2 if at else 0.0,
                "run": run / len(rows),
                "one": 1.0,
            }
        )
    return found


def test_figures_equal_a_plain_recomputation(logits):
    figures = all_answer_figures(logits)
    assert figures.shape == (40, LAYERS, NUM_ANSWERS) and figures.dtype == torch.float32
    slow = [[[layer[name] for name in NAMES] for layer in _slow(one)] for one in logits.double().tolist()]
    np.testing.assert_allclose(figures.numpy(), slow, atol=2e-5, rtol=5e-5)
    slow[7][3][NAMES.index("change")] += 1e-3
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(figures.numpy(), slow, atol=2e-5, rtol=5e-5)


def test_memory_survives_rows_that_leave(logits):
    expected = all_answer_figures(logits)
    memory: dict[str, torch.Tensor] = {}
    inside = torch.arange(len(logits))
    for layer in range(1, LAYERS + 1):
        found = answer_figures(layer, LAYERS, logits[inside, layer - 1], memory)
        # Not bit by bit: with other rows beside it a row may take another path through the processor's vectors.
        torch.testing.assert_close(found, expected[inside, layer - 1], atol=1e-6, rtol=1e-5)
        if layer > 1:
            assert not torch.allclose(found, expected[inside, layer - 2], atol=1e-6, rtol=1e-5)
        staying = torch.arange(len(inside)) % 3 != 0
        inside = inside[staying]
        memory = {name: value[staying] for name, value in memory.items()}


def test_figures_know_no_class_by_name(logits):
    shuffled = logits[..., torch.tensor([2, 0, 3, 1])]
    torch.testing.assert_close(all_answer_figures(shuffled), all_answer_figures(logits), atol=1e-5, rtol=1e-5)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4], [0.0, 0.0], [-1e4, 1e4]]])
    assert bool(all_answer_figures(logits).isfinite().all())


def test_both_weighs_state_and_figures_alike(logits):
    states = 30.0 * torch.randn(40, LAYERS, 48)
    given = every_policy_input("both", states, logits)
    assert given.shape[-1] == input_size("both", 48) == 48 + NUM_ANSWERS
    assert given[..., :48].square().mean(-1).sqrt().allclose(torch.ones(40, LAYERS), atol=1e-5)
    torch.testing.assert_close(given[..., 48:], 2.0 * all_answer_figures(logits))  # sqrt(48 / 12)
    assert policy_input("state", states, None) is states


@pytest.mark.parametrize("inputs", ["answers", "both"])
def test_the_derived_store_gives_the_policys_input(tmp_path, inputs):
    rng = np.random.default_rng(0)
    count, hidden = 50, 6
    logits = rng.normal(size=(count, LAYERS, CLASSES)).astype(np.float32)
    states = rng.normal(size=(count, LAYERS, hidden)).astype(np.float32)
    labels = rng.integers(0, CLASSES, count)
    losses = rng.random((count, LAYERS)).astype(np.float32)
    with StateStoreWriter(tmp_path / "store", LAYERS, hidden, CLASSES, shard_size=16) as writer:
        writer.append(np.arange(count), labels, states, losses, logits.argmax(-1) == labels[:, None], logits)
    store = StateStore.open(tmp_path / "store")
    expected = every_policy_input(inputs, torch.from_numpy(states), torch.from_numpy(logits))
    rows = np.arange(count)
    torch.testing.assert_close(stored_policy_input(store, inputs, rows), expected, atol=1e-6, rtol=1e-5)
    derived = derive(store, inputs, tmp_path / "derived")
    np.testing.assert_allclose(derived.states(rows), expected.numpy(), atol=1e-6, rtol=1e-5)
    np.testing.assert_array_equal(derived.losses, losses)
    np.testing.assert_array_equal(derived.correct, store.correct)
    heads = PolicyHeads(LAYERS, input_size(inputs, hidden), 8)
    with torch.inference_mode():
        found, other = exit_logits_of(store, heads, inputs), heads(expected.flip(0)).numpy()
        np.testing.assert_allclose(found, heads(expected).numpy(), atol=1e-5, rtol=1e-5)
        assert not np.allclose(found, other, atol=1e-5, rtol=1e-5)


def test_the_derived_store_is_there_for_the_phase_only(tmp_path):
    with StateStoreWriter(tmp_path / "s", 2, 3, 2) as writer:
        writer.append([0], [1], np.ones((1, 2, 3)), np.ones((1, 2)), np.ones((1, 2), bool), np.ones((1, 2, 2)))
    with policy_store(tmp_path / "s", "state") as path:
        assert path == tmp_path / "s"
    with pytest.raises(RuntimeError), policy_store(tmp_path / "s", "answers") as path:
        assert StateStore.open(path).hidden_size == NUM_ANSWERS
        raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
