"""A small stored split on which no criterion is trivial, and every criterion fitted on it."""

from __future__ import annotations

import numpy as np
import pytest

from rl_exit.criteria import LEARNED, StoredSplit, criterion
from rl_exit.criteria.fitting import FitSettings, fit_criterion

WITHOUT_FIT = {
    "consistentee": {"threshold": 0.5},
    "fixed": {"depth": 3},
    "entropy": {"threshold": 0.6},
    "fastbert": {"threshold": 0.5},
    "max_probability": {"threshold": 0.7},
    "pabee": {"patience": 2},
    "pcee": {"threshold": 0.6},
    "calm_softmax": {"threshold": 0.5},
    "calm_saturation": {"threshold": 0.4},
    "beem": {"threshold": 0.4},
}


def make_split(count: int, layers: int = 5, hidden: int = 6, classes: int = 3, seed: int = 0) -> StoredSplit:
    """Instances of which each becomes clear at a layer of its own."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    prototypes = np.random.default_rng(99).normal(size=(classes, hidden))
    clear = np.clip((np.arange(layers) + 1) / layers * 1.4 - rng.random(count)[:, None], 0, 1)
    noise = np.cumsum(rng.normal(size=(count, layers, hidden)), 1) / np.sqrt(np.arange(1, layers + 1))[:, None]
    states = (2 * clear[..., None] * prototypes[labels][:, None] + noise).astype(np.float32)
    logits = (states @ prototypes.T).astype(np.float32)
    return StoredSplit.from_logits(labels, logits, states, 2 * rng.normal(size=(count, layers - 1)))


@pytest.fixture(scope="session")
def split() -> StoredSplit:
    return make_split(60)


@pytest.fixture(scope="session")
def every():
    """Each criterion that reads classes, fitted where it learns; ``beem_fitted`` beside the plain one."""
    settings = FitSettings(epochs=3, batch_size=64, lr=1e-2)
    other = make_split(300, seed=1)
    made = {word: criterion(word, **params) for word, params in WITHOUT_FIT.items()}
    for word in LEARNED:
        made["beem_fitted" if word == "beem" else word] = fit_criterion(word, other, settings=settings)
    return made
