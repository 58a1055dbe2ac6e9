"""Random stores for the environment tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rl_exit.envs import StateBlock, StateStore, StateStoreWriter


def random_block(count: int = 20, layers: int = 4, hidden: int = 8, classes: int = 3, seed: int = 0) -> StateBlock:
    rng = np.random.default_rng(seed)
    return StateBlock(
        ids=rng.permutation(count).astype(np.int64) + 1000,
        labels=rng.integers(0, classes, count),
        losses=rng.exponential(size=(count, layers)).astype(np.float32),
        correct=rng.random((count, layers)) > 0.4,
        logits=rng.standard_normal((count, layers, classes)).astype(np.float32),
        states=rng.standard_normal((count, layers, hidden)).astype(np.float32),
    )


def write_store(
    path: Path, block: StateBlock, shard_size: int = 7, dtype: str = "float32", step: int = 6
) -> StateStore:
    """Write a block in pieces that do not fit the shards."""
    count, layers, hidden = block.states.shape
    writer = StateStoreWriter(path, layers, hidden, block.logits.shape[2], dtype, shard_size, instances="i", model="m")
    for start in range(0, count, step):
        writer.append(**{name: column[start : start + step] for name, column in vars(block).items()})
    return writer.close()


@pytest.fixture
def block() -> StateBlock:
    return random_block()


@pytest.fixture
def store(tmp_path: Path, block: StateBlock) -> StateStore:
    """20 instances in 3 shards of 7, 7 and 6; L=4, H=8, C=3."""
    return write_store(tmp_path / "store", block)


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., StateStore]:
    """Write a store of the given block under a fresh name."""
    made = iter(range(1000))

    def make(block: StateBlock, **settings: object) -> StateStore:
        return write_store(tmp_path / f"store-{next(made)}", block, **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_block() -> Callable[..., StateBlock]:
    return random_block
