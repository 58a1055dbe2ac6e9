"""Which rows make up a batch: shuffled for training, sorted by length for inference."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

POOL = 32  # steps whose rows are grouped by length


def shuffled_batches(
    count: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    lengths: npt.ArrayLike | None = None,
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the batches of one epoch for one worker.

    The order is a permutation given by (seed, epoch) alone, so a resumed run sees the same batches, and the batches of
    all workers at one step together are the batch that a single process with ``batch_size * world`` would see.

    Args:
        count: N, number of instances.
        batch_size: Instances per batch and worker.
        seed: Seed of the run.
        epoch: Number of the pass over the data, from 0.
        rank: This worker, 0..world-1.
        world: Number of workers. With one worker every row comes exactly once. With more, all workers get equally many
            batches of equal size with disjoint rows, for which at most ``batch_size * world - 1`` rows of the epoch are
            left out (others in each epoch).
        lengths: [N], tokens of each row; rows of similar length then share a step, which saves padding: pools of
            32 steps are sorted by length and their steps come in random order.

    Yields:
        [B] int64 row numbers.

    Raises:
        ValueError: Nothing to batch, fewer rows than workers, or a rank outside 0..world-1.
    """
    steps = count_batches(count, batch_size, world)
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is outside 0..{world - 1}")
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(count).astype(np.int64, copy=False)
    # Fewer rows than one full step: one smaller batch for each worker rather than an epoch without any update.
    size = batch_size if world == 1 else min(batch_size, count // world)
    if world > 1:
        # Left out before any sorting: chance, not length, decides which rows miss this epoch.
        order = order[: steps * size * world]
    sequence = np.arange(steps)
    if lengths is not None:
        sizes = np.asarray(lengths)
        for start in range(0, len(order), POOL * size * world):
            pool = order[start : start + POOL * size * world]
            pool[:] = pool[np.argsort(sizes[pool], kind="stable")]
        sequence = rng.permutation(steps)
    for step in sequence.tolist():
        start = (step * world + rank) * size
        yield order[start : start + size]


def count_batches(count: int, batch_size: int, world: int = 1) -> int:
    """Number of batches that :func:`shuffled_batches` yields for each worker.

    Raises:
        ValueError: Nothing to batch, or fewer rows than workers.
    """
    if count < 1 or batch_size < 1 or world < 1:
        raise ValueError(f"count {count}, batch_size {batch_size}, world {world}: each must be at least 1")
    if world == 1:
        return -(-count // batch_size)
    if count < world:
        raise ValueError(f"{count} instances cannot be shared among {world} workers")
    return max(count // (batch_size * world), 1)


def length_sorted_batches(lengths: npt.ArrayLike, batch_size: int) -> list[npt.NDArray[np.int64]]:
    """Cut the rows into batches of similar length, so that little of a batch is padding.

    Args:
        lengths: [N] integer, tokens of each row.
        batch_size: Rows per batch; the last batch may be smaller.

    Returns:
        [B] int64 row numbers of each batch, longest rows first: the batch that needs most memory comes at the start.

    Raises:
        ValueError: batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").astype(np.int64, copy=False)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
