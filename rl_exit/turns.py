"""Times passes over the same rows against each other, a slice of each in turn.

A machine that others use too changes its speed within seconds, and a whole pass lasts seconds: timed one after the
other, passes are compared across such changes. Here every pass advances by a slice of its rows, then waits while the
others do the same slice, in an order that changes, so that whatever slows the machine slows them all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Pass = Callable[[], Iterator[int]]
"""Starts a pass over all rows; what it yields are the rows that are done so far, rising to all of them."""
SLICES = 16


@dataclass(frozen=True)
class Turns:
    """Seconds of each pass, by name, float64 [rounds, slices].

    Attributes:
        wall: By the clock on the wall.
        processor: Of this process's processor time.
    """

    wall: Mapping[str, npt.NDArray[np.float64]]
    processor: Mapping[str, npt.NDArray[np.float64]]


def in_turn(
    passes: Mapping[str, Pass],
    total: int,
    rounds: int,
    slices: int = SLICES,
    seed: int = 0,
    after_round: Callable[[int], None] = lambda number: None,
) -> Turns:
    """Run passes in turn, ``rounds`` times after once that is not counted.

    Args:
        passes: By name.
        total: N, the rows of each, at least 1.
        rounds: Rounds that count, at least 1.
        slices: Parts of a pass, at most N; a part ends when at least its share of the rows is done.
        seed: Of the order in which passes take their turn.
        after_round: Told the number of rounds done, the first one included.

    Raises:
        RuntimeError: A pass has ended before its last row.
    """
    rng, names = np.random.default_rng(seed), list(passes)
    slices = min(slices, total)
    taken = {name: np.zeros((2, rounds, slices)) for name in names}
    for number in range(1 + rounds):
        running = {name: _Running(passes[name](), total) for name in names}
        for part in range(slices):
            goal = total * (part + 1) // slices if part < slices - 1 else None
            for place in rng.permutation(len(names)):
                name = names[place]
                started, busy = time.perf_counter(), time.process_time()
                running[name].advance(goal)
                if number:
                    spent = time.perf_counter() - started, time.process_time() - busy
                    taken[name][:, number - 1, part] = spent
        after_round(number + 1)
    return Turns({name: taken[name][0] for name in names}, {name: taken[name][1] for name in names})


def ratio(above: npt.NDArray[np.float64], below: npt.NDArray[np.float64]) -> float:
    """Median over the rounds of how many times as long one pass took as another, from seconds [rounds, slices]."""
    return statistics.median((above.sum(1) / below.sum(1)).tolist())


class _Running:
    """A pass on its way."""

    def __init__(self, rows: Iterator[int], total: int) -> None:
        self._rows, self._total = rows, total
        self._done = 0

    def advance(self, goal: int | None) -> None:
        """Until so many rows are done; None: to the end, what comes after the last row included."""
        while goal is None or self._done < goal:
            done = next(self._rows, None)
            if done is None:
                break
            self._done = done
        if goal is None and self._done != self._total:
            raise RuntimeError(f"a pass has ended after {self._done} of {self._total} rows")
