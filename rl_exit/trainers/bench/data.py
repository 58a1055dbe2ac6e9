"""A random state store: speed does not depend on what the states mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rl_exit.envs.state_store import StateStore, StateStoreWriter

SHARD = 8192


def random_store(path: Path, num_instances: int, num_layers: int, hidden_size: int, seed: int = 0) -> StateStore:
    """Write a float32 store of normal states and falling losses, 4 classes.

    Args:
        path: Folder of the store.
        num_instances: N.
        num_layers: L.
        hidden_size: H.
        seed: Decides the content.
    """
    rng = np.random.default_rng(seed)
    fall = np.linspace(1.5, 0.3, num_layers, dtype=np.float32)
    count = min(SHARD, num_instances)
    # Drawn once and written again and again: numbers cost more time than the disk.
    states = rng.standard_normal((count, num_layers, hidden_size), dtype=np.float32)
    with StateStoreWriter(path, num_layers, hidden_size, 4, "float32", SHARD) as writer:
        for start in range(0, num_instances, SHARD):
            count = min(SHARD, num_instances - start)
            writer.append(
                np.arange(start, start + count),
                np.zeros(count, dtype=np.int64),
                states[:count],
                rng.exponential(1.0, (count, num_layers)).astype(np.float32) * fall,
                rng.random((count, num_layers)) < 0.6,
                rng.standard_normal((count, num_layers, 4), dtype=np.float32),
            )
    return StateStore.open(path)
