"""Times passes over the same rows against each other, a slice of each in turn.

A machine that others use too changes its speed within seconds, and a whole pass lasts seconds: timed one after the
other, passes are compared across such changes. Here every pass advances by a slice, a tenth of a second of the longest,
then waits while the others do their share, in an order that changes, so that whatever slows the machine slows them all.
(Measured on a virtual machine that others share: stretches of 3 s next to each other differ by 9 %, of 0.1 s by 6 %, of
which a pass holds thirty times as many, so that chance weighs an eighth.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

Pass = Callable[[], Iterator[Any]]
"""Starts a pass over all rows, which yields after each piece of its work; best small ones, and always the same."""
SLICE_SECONDS = 0.1


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
    rounds: int,
    slice_seconds: float = SLICE_SECONDS,
    seed: int = 0,
    after_round: Callable[[int], None] = lambda number: None,
    settle: Callable[[], Any] = lambda: None,
) -> Turns:
    """Run passes in turn, ``rounds`` times, after one run of each that is not counted.

    Args:
        passes: By name, at least one.
        rounds: Rounds that count, at least 1.
        slice_seconds: What a slice of the longest pass lasts, about; a piece of work is not cut. All passes are cut
            into as many slices, each of about the same share of the pieces of its pass.
        seed: Of the order in which passes take their turn.
        after_round: Told the number of rounds done, the first one included.
        settle: Waits until work is done that was only begun, as on a GPU; called at the end of each slice.

    Raises:
        RuntimeError: A pass has not done the same pieces again.
    """
    pieces, seconds = {}, {}
    for name, start in passes.items():
        began = time.perf_counter()
        pieces[name] = sum(1 for _ in start())
        settle()
        seconds[name] = time.perf_counter() - began
    after_round(1)
    slices = max(1, min(round(max(seconds.values()) / slice_seconds), max(pieces.values())))
    rng, names = np.random.default_rng(seed), list(passes)
    taken = {name: np.zeros((2, rounds, slices)) for name in names}
    for number in range(rounds):
        running, did = {name: passes[name]() for name in names}, dict.fromkeys(names, 0)
        for part in range(slices):
            for place in rng.permutation(len(names)):
                name = names[place]
                done, goal = (pieces[name] * share // slices for share in (part, part + 1))
                began, busy = time.perf_counter(), time.process_time()
                # The last slice runs to the end, what comes after the last piece included.
                did[name] += sum(1 for _ in islice(running[name], None if part == slices - 1 else goal - done))
                settle()
                taken[name][:, number, part] = time.perf_counter() - began, time.process_time() - busy
        if did != pieces:
            raise RuntimeError(f"passes of {pieces} pieces have done {did} in round {number + 1}")
        after_round(2 + number)
    return Turns({name: taken[name][0] for name in names}, {name: taken[name][1] for name in names})


def ratio(above: npt.NDArray[np.float64], below: npt.NDArray[np.float64]) -> float:
    """Median over the rounds of how many times as long one pass took as another, from seconds [rounds, slices]."""
    return statistics.median((above.sum(1) / below.sum(1)).tolist())
