"""A sampling actor: draws blocks of trajectories on any node, with numpy alone.

This module must import neither torch nor RLlib: together they cost every process 200 MB of its own, and a sampler needs
nothing of them (a test holds it). An actor keeps no state that matters: it can be restarted at any time, and any actor
can draw any block, to the same result.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from rl_exit.envs.manifest import MANIFEST
from rl_exit.envs.sampler import Block, BlockSampler, FloatArray
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import RunError
from rl_exit.models.policy_arrays import Weights, exit_logits

Columns = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""(exit_layer, log_prob, reward), each [B, K]: all that is sent back of a block, whose rows the asker knows."""


@dataclass(frozen=True)
class SamplerSettings:
    """What an actor is told once.

    Attributes:
        path: Folder of the state store.
        manifest: Text of its manifest: another store at the same path of another node must not be taken for it.
        transport: ``path``, ``objects``, or ``auto``: the path where it can be opened.
        seed: Decides the draws.
        trajectories: K.
        reward: Name of the reward.
        alpha: Price of a layer.
        cost: [L], cost of leaving at each layer; None: the layer's number.
    """

    path: str
    manifest: str
    transport: str
    seed: int
    trajectories: int
    reward: str
    alpha: float
    cost: tuple[float, ...] | None = None


class SamplerActor:
    """Made a Ray actor by :class:`~rl_exit.trainers.rllib.pool.SamplerPool`.

    Args:
        settings: See there.

    Raises:
        RunError: The store must be read by its path, which is not here.
    """

    def __init__(self, settings: SamplerSettings) -> None:
        self._settings = settings
        self._sampler = self._over(StateStore.parse(settings.manifest, settings.path))
        self._uses_path = settings.transport != "objects" and self._has_path()
        if settings.transport == "path" and not self._uses_path:
            raise RunError(
                f"{settings.path}: this state store is not on node {os.uname().nodename}; sampling.transport=objects "
                "(or auto) hands it over through Ray's object store"
            )

    def hello(self) -> bool:
        """Whether this actor reads the store by its path; if not, shards must come with the blocks."""
        return self._uses_path

    def draw(
        self, weights: Weights, blocks: Sequence[Block], epsilon: float, shards: Mapping[int, Any] | None = None
    ) -> list[Columns]:
        """Draw blocks.

        Args:
            weights: Of the policy.
            blocks: Any blocks.
            epsilon: Exploration.
            shards: Number -> reference to the bytes of each shard that the blocks touch; None reads the path.
        """
        self._map(blocks, shards)

        def policy(states: FloatArray) -> FloatArray:
            return exit_logits(weights, states)

        drawn = [self._sampler.draw(policy, block, epsilon) for block in blocks]
        return [(part.exit_layer, part.log_prob, part.reward) for part in drawn]

    def usage(self) -> dict[str, Any]:
        """``private_mb``: memory of this process alone; ``shards``: those mapped; ``node``: its Ray id; ``pid``."""
        return {
            "private_mb": private_megabytes(),
            "shards": list(self._sampler.reader.store.mapped_shards),
            "node": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
        }

    def _map(self, blocks: Sequence[Block], shards: Mapping[int, Any] | None) -> None:
        """Map the shards that the blocks touch and that are not mapped yet."""
        store = self._sampler.reader.store
        wanted = store.shards_of(np.concatenate([block.rows for block in blocks]))
        missing = [index for index in wanted if index not in store.mapped_shards]
        if missing:
            found = ray.get([shards[index] for index in missing]) if shards is not None else [None] * len(missing)
            self._sampler = self._over(store.mapping(dict(zip(missing, found, strict=True))))

    def _over(self, store: StateStore) -> BlockSampler:
        s = self._settings
        return BlockSampler.over(
            store, seed=s.seed, trajectories=s.trajectories, reward=s.reward, alpha=s.alpha, cost=s.cost
        )

    def _has_path(self) -> bool:
        try:
            return (Path(self._settings.path) / MANIFEST).read_text(encoding="utf-8") == self._settings.manifest
        except (OSError, UnicodeDecodeError):
            return False


def private_megabytes() -> float:
    """Memory of this process that it shares with none, 10^6 bytes (Linux; nan elsewhere).

    Neither mapped files nor Ray's object store count: all runners of a node share one copy of those.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon"))
