"""Fitting on frozen exits: what is learned is right, repeatable, and leaves the world as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from rl_exit.criteria import LEARNED, StoredSplit
from rl_exit.criteria.fitting import FitSettings, fit_criterion, fit_temperatures
from rl_exit.criteria.stored import scores_from_store
from rl_exit.errors import ConfigError, RunError

QUICK = FitSettings(epochs=4, batch_size=64, lr=2e-2)


def learnable(count: int, seed: int) -> StoredSplit:
    """Component 0 of a state, far from unit scale, tells how clear the exit's answer is, component 1 which it is."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    clear = rng.random((count, 4)) < np.array([0.3, 0.5, 0.7, 1.0])
    side = np.where(clear, 2.0 * labels[:, None] - 1.0, rng.choice([-1.0, 1.0], (count, 4)))
    states = np.stack([30.0 * clear + 100.0, side, rng.normal(size=(count, 4))], -1).astype(np.float32)
    logits = np.stack([-side, side], -1) * np.where(clear, 2.0, 0.2)[..., None]
    return StoredSplit.from_logits(labels, logits, states)


@pytest.mark.parametrize("word", LEARNED)
def test_same_seed_same_tensors_and_no_trace(word):
    split = learnable(120, 0)
    state = torch.get_rng_state()
    first, again = (fit_criterion(word, split, seed=3, settings=QUICK) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in first.learned.tensors.items():
        assert torch.equal(tensor, again.learned.tensors[name]), name
    if word not in ("right_tool", "beem"):
        other = fit_criterion(word, split, seed=4, settings=QUICK)
        assert any(not torch.equal(t, other.learned.tensors[n]) for n, t in first.learned.tensors.items())
        history = first.learned.notes["loss_by_epoch"]
        assert len(history) == 4 and history[-1] < history[0]
        assert first.learned.notes["fitted_on"] == 120


@pytest.mark.parametrize("word", ["lte", "calm_meta", "cat", "jei", "palbert"])
def test_heads_tell_clear_instances_from_unclear_ones(word):
    """On new instances; the states have a mean of 100, so this also holds that their scale is taken care of."""
    rule = fit_criterion(word, learnable(400, 0), settings=FitSettings(epochs=8, batch_size=64, lr=2e-2))
    new = learnable(200, 1)
    clear = np.abs(new.logits[:, 0, 0]) > 1
    score = scores_from_store(rule, new)[:, 0]
    assert (score[clear][:, None] > score[~clear]).mean() > 0.9


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperatures_undo_a_known_one(temperature):
    rng = np.random.default_rng(0)
    true = rng.normal(size=(4000, 1, 3)).astype(np.float32) * 2
    p = np.exp(true[:, 0]) / np.exp(true[:, 0]).sum(-1, keepdims=True)
    labels = (p.cumsum(-1) > rng.random((4000, 1))).argmax(-1)
    found = fit_temperatures(true * temperature, labels)
    assert found.item() == pytest.approx(temperature, rel=0.1)
    best = minimize_scalar(
        lambda t: F.cross_entropy(
            torch.from_numpy(true[:, 0] * temperature).double() / t, torch.from_numpy(labels)
        ).item(),
        bounds=(0.1, 10),
        method="bounded",
    )
    assert found.item() == pytest.approx(best.x, rel=1e-3), "another optimiser finds the same"


def test_temperatures_stay_finite_where_every_answer_is_right():
    logits = np.array([[[2.0, 0.0]], [[0.0, 2.0]]], dtype=np.float32)
    assert 0.01 <= fit_temperatures(logits, np.array([0, 1])).item() < 1
    assert 1 < fit_temperatures(logits, np.array([1, 0])).item() <= 100


def test_beem_weights_are_the_accuracies():
    split = learnable(200, 0)
    rule = fit_criterion("beem", split, threshold=0.7)
    np.testing.assert_allclose(rule.learned.tensors["weight"], split.correct[:, :3].mean(0), rtol=1e-6)
    assert rule.threshold == 0.7


def test_more_instances_than_wanted_are_sampled():
    split = learnable(200, 0)
    rule = fit_criterion("lte", split, settings=replace(QUICK, max_instances=50))
    assert rule.learned.notes["fitted_on"] == 50


def test_gates_are_more_open_at_a_higher_price():
    split = learnable(200, 0)
    low, high = (
        scores_from_store(fit_criterion("jei", split, settings=replace(QUICK, gate_price=price)), split).mean()
        for price in (0.05, 3.0)
    )
    assert high > low + 0.1


def test_what_cannot_be_fitted():
    split = learnable(20, 0)
    with pytest.raises(ConfigError, match=r"'entropy' is not fitted; accepted: right_tool, lte"):
        fit_criterion("entropy", split)
    with pytest.raises(ConfigError, match="accepted: learned, threshold"):
        fit_criterion("lte", split, settings=QUICK, patience=2)
    with pytest.raises(ConfigError, match="threshold = 3; accepted: 0 to 1"):
        fit_criterion("right_tool", split, threshold=3)
    with pytest.raises(ValueError, match="reads states, which were not given"):
        fit_criterion("lte", replace(split, states=None))
    with pytest.raises(ValueError, match="at least one instance"):
        fit_criterion("beem", split.select(np.arange(0)))
    broken = replace(split, states=np.full_like(split.states, np.nan))
    with pytest.raises(RunError, match="fitting criterion 'lte' diverged"):
        fit_criterion("lte", broken, settings=QUICK)
