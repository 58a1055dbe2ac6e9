"""Paired bootstrap: instances are drawn anew, the same ones for all methods and seeds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

REPLICATES = 1000
LEVEL = 0.95


def resamples(num_instances: int, replicates: int = REPLICATES, seed: int = 0) -> npt.NDArray[np.float32]:
    """How often each instance counts in each replicate.

    Args:
        num_instances: N.
        replicates: R, 0 or more; at least 1000 for intervals that are reported.
        seed: Equal seeds give equal draws.

    Returns:
        [N, 1+R] float32. Column 0 is all ones (the split as it is), every other column a draw of N with replacement.
    """
    rng = np.random.default_rng((seed, num_instances))
    out = np.ones((num_instances, 1 + replicates), dtype=np.float32)
    for column in range(1, 1 + replicates):
        drawn = rng.integers(0, num_instances, num_instances)
        out[:, column] = np.bincount(drawn, minlength=num_instances)
    return out


def interval(values: npt.ArrayLike, level: float = LEVEL) -> list[float] | None:
    """Percentile interval of a figure.

    Args:
        values: [1+R], column 0 being the figure of the split itself, which is left out.
        level: Share of the replicates inside.

    Returns:
        [low, high], None without replicates.
    """
    draws = np.asarray(values, dtype=np.float64)[1:]
    if not len(draws):
        return None
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]
