"""State stores for tests of the policy phase."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rl_exit.envs.state_store import StateStore, StateStoreWriter
from rl_exit.method import expected_return, rewards
from rl_exit.models.policy import PolicyHeads


def random_store(
    path: Path, count: int = 96, layers: int = 5, hidden: int = 12, seed: int = 0, shard_size: int | None = None
) -> StateStore:
    """States and losses without meaning."""
    rng = np.random.default_rng(seed)
    writer = StateStoreWriter(path, layers, hidden, 3, "float32", shard_size or max(1, count // 2))
    writer.append(
        np.arange(count),
        rng.integers(0, 3, count),
        rng.standard_normal((count, layers, hidden), dtype=np.float32),
        rng.exponential(1.0, (count, layers)).astype(np.float32),
        rng.random((count, layers)) < 0.6,
        rng.standard_normal((count, layers, 3), dtype=np.float32),
    )
    return writer.close()


def solvable_store(path: Path, count: int = 256, layers: int = 4, hidden: int = 16, seed: int = 0) -> StateStore:
    """An MDP with known best exits: an instance of kind k is best left at layer k, and every state tells its kind.

    CE is 0 at the best layer and grows by 1 with every layer of distance (reward vanilla, alpha 0: the best return is
    0).
    """
    rng = np.random.default_rng(seed)
    kind = np.arange(count) % layers + 1
    signs = rng.standard_normal((layers, layers, hidden)).astype(np.float32)  # one per (kind, layer)
    states = signs[kind - 1] + 0.1 * rng.standard_normal((count, layers, hidden)).astype(np.float32)
    losses = np.abs(kind[:, None] - np.arange(1, layers + 1)).astype(np.float32)
    writer = StateStoreWriter(path, layers, hidden, 2, "float32", 1024)
    writer.append(
        np.arange(count), np.zeros(count, int), states, losses, losses == 0, np.zeros((count, layers, 2), np.float32)
    )
    return writer.close()


def heads(store: StateStore, width: int = 16, seed: int = 0) -> PolicyHeads:
    """Fresh policy heads for a store."""
    torch.manual_seed(seed)
    return PolicyHeads(store.num_layers, store.hidden_size, width)


def reward_table(store: StateStore, kind: str = "vanilla", alpha: float = 0.0) -> torch.Tensor:
    """Rewards of the whole store, [N, L]."""
    return torch.from_numpy(rewards(store.losses, store.memorized(), alpha, kind))


def share_of_best(store: StateStore, weights: dict[str, torch.Tensor], width: int = 16) -> float:
    """How much of the way from leaving anywhere (uniformly) to the best exit of every instance; 1 is the best."""
    policy = heads(store, width)
    policy.load_state_dict(weights)
    table = reward_table(store)
    with torch.no_grad():
        reached = expected_return(policy(store.states(store.rows)), table).mean()
    best, anywhere = table.max(1).values.mean(), table.mean()
    return float((reached - anywhere) / (best - anywhere))
