"""The depth pool with a goal: as many requests as possible answered within so many milliseconds.

First come, first served makes everybody late once a burst is longer than the goal. Here those that can no longer make
it wait until the others are through, and so do large ones that leave no room for smaller. Which ones is the rule of
Moore and Hodgson (J. M. Moore, "An n job, one machine sequencing algorithm for minimizing the number of late jobs",
Management Science 15, 1968): none leaves fewer late where the work of each is known and they run one by one. Texts of
the depth pool can be left between any two layers, so it is decided anew before each step.

Pure Python with the time passed in, as :mod:`rl_exit.serving.pool`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Generic

from rl_exit.serving.pool import Payload, PoolRules, RequestPool, Row

# Of the goal, for the way to the model and back: measured once with client and server on two busy cores, 6 to 8 ms in
# the median and 11 to 14 ms at the ninth decile.
WAY = 0.015  # seconds
MOST_WAY = 0.25  # never more than this share of the goal
OLD = 10  # goals after which a late request gets its turn, however many others could be in time;
TURN = 8  # one part in so many of the time is for those
PRIOR = 20.0  # texts that are taken to have run every layer, before any has been seen
RECENT = 0.1  # weight of the latest step in means
MEMORY = 10_000.0  # texts of a layer after which those seen before count half


def late_ones(due: Sequence[float], work: Sequence[float], now: float) -> set[int]:
    """Which of some jobs to leave behind, so that as few as possible are late (Moore and Hodgson 1968).

    Args:
        due: When each has to be done, seconds, rising.
        work: What each takes, seconds.
        now: Seconds.

    Returns:
        Numbers of the jobs that are late; the others, one after the other as they are due, are all in time.
    """
    late: set[int] = set()
    largest: list[tuple[float, int]] = []
    end = now
    for number, (by, takes) in enumerate(zip(due, work, strict=True)):
        if now + takes > by:
            late.add(number)
            continue
        end += takes
        heappush(largest, (-takes, number))
        if end > by:
            saved, dropped = heappop(largest)
            end += saved
            late.add(dropped)
    return late


class Expectation:
    """What is left to do for a row, learned from those before it.

    Args:
        num_layers: L.
        overhead: What a step costs beside its tokens, in tokens.

    Attributes:
        pace: Seconds of a token in a layer; None before the first step.
        remaining: Layers that a row waiting for layer l is still going to run, [L], by l - 1.
    """

    def __init__(self, num_layers: int, overhead: float) -> None:
        self.pace: float | None = None
        self._overhead = overhead
        self._company = 1.0
        self._ran = [PRIOR] * num_layers
        self._left = [0.0] * num_layers
        self.remaining = [float(num_layers - layer) for layer in range(num_layers)]

    def seconds(self, row: Row[Payload]) -> float:
        """What a row is still going to take, its share of what steps cost beside their tokens included."""
        tokens = row.length + self._overhead / self._company
        return (self.pace or 0.0) * tokens * self.remaining[row.layer - 1]

    def saw(self, layer: int, lengths: Sequence[int], left: int, seconds: float) -> None:
        """Learn from a step: its rows' lengths, how many of them left, and what it took."""
        pace = seconds / (self._overhead + sum(lengths))
        self.pace = pace if self.pace is None else self.pace + RECENT * (pace - self.pace)
        self._company += RECENT * (len(lengths) - self._company)
        self._ran[layer - 1] += len(lengths)
        self._left[layer - 1] += left
        if self._ran[layer - 1] > MEMORY:
            self._ran[layer - 1] /= 2
            self._left[layer - 1] /= 2
        further = 0.0
        for place in range(len(self._ran) - 1, -1, -1):
            further = 1.0 + further * (1.0 - self._left[place] / self._ran[place])
            self.remaining[place] = further


@dataclass(slots=True)
class _Inside(Generic[Payload]):
    """Rows of one request that wait, by their number in the pool."""

    arrived: float
    rows: dict[int, Row[Payload]] = field(default_factory=dict)


class GoalPool(RequestPool[Payload]):
    """Rows by the layer they wait for; those of requests that can still be in time go first, as they are due.

    A step runs the shallowest layer at which the request that is due first waits, and takes others along that wait
    there and can be in time. Late ones run when nobody else waits, by age. While one is older than ``OLD`` goals, one
    part in ``TURN`` of the time is for the oldest and whoever waits at its layer, by age.

    Args:
        num_layers: L.
        rules: With a finite ``goal``; ``deadline`` means nothing here.

    Attributes:
        expected: What is left to do for a row.
        allowed: Seconds in the pool of a request that is in time.
    """

    def __init__(self, num_layers: int, rules: PoolRules) -> None:
        super().__init__(num_layers, rules)
        self.allowed = rules.goal - min(WAY, MOST_WAY * rules.goal)
        self.expected = Expectation(num_layers, rules.overhead)
        self._inside: dict[Hashable, _Inside[Payload]] = {}  # may still be in time
        self._past: dict[Hashable, _Inside[Payload]] = {}  # can be no more
        self._turn_began: float | None = None  # of the step that runs, where it is for the old
        self._next_turn = 0.0

    def add(self, rows: Iterable[Row[Payload]], now: float) -> None:
        """See :meth:`.RequestPool.add`."""
        rows = list(rows)
        first = self._next
        super().add(rows, now)
        for number, row in enumerate(rows, start=first):
            request = _request_of(row)
            among = self._past if request in self._past else self._inside
            among.setdefault(request, _Inside(row.arrived)).rows[number] = row

    def drop(self, request: Hashable) -> None:
        """See :meth:`.RequestPool.drop`."""
        super().drop(request)
        self._inside.pop(request, None)
        self._past.pop(request, None)

    def take(self, now: float) -> list[Row[Payload]]:
        """See :meth:`.RequestPool.take`."""
        for key in [key for key, request in self._inside.items() if request.arrived + self.allowed < now]:
            self._past[key] = self._inside.pop(key)
        turn = now >= self._next_turn and self._old(now)
        self._turn_began = now if turn else None
        order = [] if turn else self._in_time(now)
        if not order:  # the turn of the old, or nobody can be in time
            order = sorted([*self._past.values(), *self._inside.values()], key=_arrival)
        if not order:
            return []
        layer = min(row.layer for row in order[0].rows.values())
        waiting = ((number, row) for one in order for number, row in one.rows.items() if row.layer == layer)
        taken = []
        for number in self._fitting(waiting):
            row = self._queues[layer - 1].remove(number)
            taken.append(row)
            request = _request_of(row)
            among = self._past if request in self._past else self._inside
            del among[request].rows[number]
            if not among[request].rows:
                del among[request]
        return sorted(taken, key=lambda row: -row.length)

    def _old(self, now: float) -> bool:
        """Whether a request has waited for very long."""
        return bool(self._past) and now - min(map(_arrival, self._past.values())) > OLD * self.rules.goal

    def _in_time(self, now: float) -> list[_Inside[Payload]]:
        """The requests that are not late, as they are due."""
        by_age = sorted(self._inside.values(), key=_arrival)
        work = [sum(map(self.expected.seconds, request.rows.values())) for request in by_age]
        late = late_ones([request.arrived + self.allowed for request in by_age], work, now)
        return [request for number, request in enumerate(by_age) if number not in late]

    def ran(self, rows: Sequence[Row[Payload]], layer: int, left: int, seconds: float) -> None:
        """See :meth:`.RequestPool.ran`: what is left to do for others is learned from it."""
        if self._turn_began is not None:
            self._next_turn = self._turn_began + TURN * seconds
        self.expected.saw(layer, [row.length for row in rows], left, seconds)

    def _fitting(self, rows: Iterable[tuple[int, Row[Payload]]]) -> list[int]:
        """Numbers of the first row and of those after it that fit, in their order: what they make the step pad pays for
        itself, or all of them run without padding."""
        rules = self.rules
        taken: list[int] = []
        longest = total = 0
        even = True  # what was padded so far has paid for itself
        for number, row in rows:
            count = len(taken) + 1
            most = max(longest, row.length)
            more = (most - longest) * len(taken) + most - row.length
            pays = even and more <= rules.overhead and self._small(most, count)
            if taken and not pays and not self._packed(total + row.length, most * count):
                continue
            even = pays or not taken
            taken.append(number)
            longest, total = most, total + row.length
            if count == rules.batch_size:
                break
        return taken


def _arrival(request: _Inside[Payload]) -> float:
    return request.arrived


def _request_of(row: Row[Payload]) -> Hashable:
    """Whose row it is; one without a request is on its own."""
    return row if row.request is None else row.request
