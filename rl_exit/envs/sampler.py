"""Whole trajectories by blocks of the state store: which instances, in what order, and how each block is drawn.

An epoch is a permutation of the instances by (seed, epoch), cut into *updates* of ``batch_size`` instances; an update
is cut into *blocks* of about ``block_rows``. Where an update has several blocks and the store several shards, each
block keeps to one group of shards, so that a runner can do with the shards of some groups. Block b of an epoch draws
from a generator seeded by (seed, epoch, b) alone, so the trajectories of an update are the same whoever draws its
blocks, in whatever order, however often. numpy alone: a sampling process imports neither torch nor Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_exit.envs.state_store import StateStore
from rl_exit.method.rewards import memorized_layer, rewards
from rl_exit.method.sampling import Trajectories, exit_probability, sample_trajectories

BLOCK_ROWS = 256
Rows = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
ArrayPolicy = Callable[[FloatArray], FloatArray]
"""States [B, L, H] -> exit logits [B, L-1]."""


@dataclass(frozen=True, eq=False)
class Block:
    """All that a draw depends on beside weights and exploration.

    Attributes:
        epoch: From 0.
        number: Within the epoch.
        rows: [B] int32, the instances, ascending: gathered shard by shard, in the order of memory.
        group: Group of shards that holds them.
    """

    epoch: int
    number: int
    rows: Rows
    group: int = 0


@dataclass(frozen=True)
class BlockPlan:
    """The order of the instances.

    Attributes:
        num_instances: N.
        batch_size: Instances per update; the last update of an epoch may have fewer.
        seed: Decides permutations and draws.
        block_rows: Instances in a block, about: up to 1.5 times as many where the store has groups; smaller blocks
            spread an update over more runners.
        bounds: First row of every group of shards after the first; none: one group.
    """

    num_instances: int
    batch_size: int
    seed: int
    block_rows: int = BLOCK_ROWS
    bounds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.num_instances, self.batch_size, self.block_rows) < 1 or self.seed < 0:
            raise ValueError(
                f"BlockPlan: num_instances={self.num_instances}, batch_size={self.batch_size}, seed={self.seed}, "
                f"block_rows={self.block_rows}; accepted: at least 1, 1, 0, 1"
            )
        if list(self.bounds) != sorted(set(self.bounds)) or not all(0 < b < self.num_instances for b in self.bounds):
            raise ValueError(f"BlockPlan: bounds={self.bounds}; accepted: ascending in 1..{self.num_instances - 1}")

    @classmethod
    def over(cls, store: StateStore, batch_size: int, seed: int, block_rows: int = BLOCK_ROWS) -> BlockPlan:
        """A plan whose groups of shards follow from the store and the sizes alone, not from who samples.

        As many groups as an update has blocks (or the store shards), so that blocks stay as large as they should be.
        """
        groups = min(len(store.shards), max(1, batch_size // block_rows))
        firsts = [part[0].first_row for part in _split(store.shards, groups)]
        return cls(store.num_instances, batch_size, seed, block_rows, tuple(firsts[1:]))

    @property
    def updates(self) -> int:
        """Updates in an epoch."""
        return -(-self.num_instances // self.batch_size)

    @property
    def groups(self) -> int:
        """Groups of shards."""
        return len(self.bounds) + 1

    def permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        """Order of the instances in an epoch, [N], read only."""
        return _permutation(self.num_instances, self.seed, epoch)

    def blocks(self, epoch: int, update: int) -> list[Block]:
        """The blocks of an update; together its instances, each once."""
        if not 0 <= update < self.updates:
            raise ValueError(f"update {update}; accepted: 0..{self.updates - 1}")
        start = update * self.batch_size
        rows = self.permutation(epoch)[start : start + self.batch_size].astype(np.int32)
        # No update has more parts than this, so numbers never meet.
        first = update * (self.groups + -(-self.batch_size // self.block_rows))
        if not self.bounds:
            parts = [(0, rows[at : at + self.block_rows]) for at in range(0, len(rows), self.block_rows)]
        else:
            group_of = np.searchsorted(self.bounds, rows, side="right")
            parts = []
            for group in np.unique(group_of).tolist():
                members = rows[group_of == group]
                number = max(1, round(len(members) / self.block_rows))
                parts += [(group, part) for part in np.array_split(members, number)]
        return [Block(epoch, first + at, np.sort(part), group) for at, (group, part) in enumerate(parts)]


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.flags.writeable = False
    return order


def _split(items: Sequence[Any], number: int) -> list[Sequence[Any]]:
    edges = [len(items) * at // number for at in range(number + 1)]
    return [items[start:stop] for start, stop in itertools.pairwise(edges)]


def block_seed(seed: int, block: Block) -> np.random.SeedSequence:
    """A block's own randomness, whoever draws it."""
    return np.random.SeedSequence([seed, block.epoch, block.number])


class StateReader:
    """Gathers blocks of states; the last one is kept, so sampler and learner of one process gather it once."""

    def __init__(self, store: StateStore) -> None:
        self.store = store
        self._rows: Rows | None = None
        self._states: FloatArray | None = None

    def gather(self, rows: npt.NDArray[np.integer]) -> FloatArray:
        """States of instances, [B, L, H] float32. Read only: the array may be handed out again."""
        wanted = np.asarray(rows, dtype=np.int32)
        if self._states is None or self._rows is None or not np.array_equal(wanted, self._rows):
            self._states = None
            self._states = self.store.states(wanted)
            self._rows = wanted
        return self._states


@dataclass(frozen=True)
class RewardTable:
    """Rewards of leaving at each layer, computed for the rows asked for: no array over the whole store is built.

    Attributes:
        store: Source of losses and correctness.
        kind: ``hardness`` (Eq. 4), ``vanilla`` (Eq. 3), ``correctness`` or ``fidelity``.
        alpha: Price of a layer, nats.
        cost: [L], cost of leaving at each layer; None: the layer's number.
    """

    store: StateStore
    kind: str
    alpha: float
    cost: tuple[float, ...] | None = None

    def __call__(self, rows: npt.NDArray[np.integer]) -> FloatArray:
        """Rewards [B, L] float32."""
        losses, correct = self.store.outcomes(rows)
        memorized = memorized_layer(correct) if self.kind == "hardness" else None
        return rewards(losses, memorized, self.alpha, self.kind, cost=self.cost, correct=correct)


@dataclass(frozen=True)
class BlockSampler:
    """Draws the trajectories of blocks: one gather, one policy pass and one draw each.

    Attributes:
        reader: States.
        table: Rewards.
        seed: Decides the draws.
        trajectories: K.
    """

    reader: StateReader
    table: RewardTable
    seed: int
    trajectories: int

    @classmethod
    def over(
        cls,
        store: StateStore,
        *,
        seed: int,
        trajectories: int,
        reward: str,
        alpha: float,
        cost: tuple[float, ...] | None = None,
    ) -> BlockSampler:
        """A sampler with a reader of its own."""
        return cls(StateReader(store), RewardTable(store, reward, alpha, cost), seed, trajectories)

    def draw(self, policy: ArrayPolicy, block: Block, epsilon: float) -> Trajectories:
        """Trajectories of one block.

        Args:
            policy: States [B, L, H] -> exit logits [B, L-1].
            block: From :meth:`BlockPlan.blocks`.
            epsilon: Exploration, in [0, 1].
        """
        pi = exit_probability(policy(self.reader.gather(block.rows)))
        generator = np.random.Generator(np.random.Philox(block_seed(self.seed, block)))
        return sample_trajectories(pi, self.table(block.rows), block.rows, self.trajectories, epsilon, generator)


def join(parts: Sequence[Trajectories]) -> Trajectories:
    """Blocks in order, as one batch.

    Raises:
        ValueError: No block.
    """
    if not parts:
        raise ValueError("join: at least one block of trajectories is needed")
    if len(parts) == 1:
        return parts[0]
    return Trajectories(
        instance=np.concatenate([part.instance for part in parts]),
        exit_layer=np.concatenate([part.exit_layer for part in parts]),
        log_prob=np.concatenate([part.log_prob for part in parts]),
        reward=np.concatenate([part.reward for part in parts]),
    )


def take(trajectories: Trajectories, index: npt.NDArray[np.integer] | slice) -> Trajectories:
    """The trajectories of some of the instances."""
    return Trajectories(
        instance=trajectories.instance[index],
        exit_layer=trajectories.exit_layer[index],
        log_prob=trajectories.log_prob[index],
        reward=trajectories.reward[index],
    )


def linear_schedule(start: float, end: float, step: int, steps: int) -> float:
    """Value at ``step`` of 0..steps-1 on the straight line from ``start`` to ``end``."""
    if steps <= 1:
        return start
    return start + (end - start) * min(step, steps - 1) / (steps - 1)
