"""Which rows run next: rows of different requests wait at their layers, and one layer runs at a time.

Pure Python, and the time is passed in, so that every decision can be tested. A step (one layer on B rows of T tokens)
costs about ``overhead + B * T``, in units of the time of one token; the pool trades padding against overhead with it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rl_exit.errors import ConfigError

Payload = TypeVar("Payload")
MANY = 4  # packed steps' worth of tokens at a layer: then rows of one length are found, and nobody waits long for it


@dataclass(eq=False, slots=True)
class Row(Generic[Payload]):
    """A text on its way through the layers.

    Attributes:
        payload: What the caller keeps with it.
        length: Its tokens.
        arrived: When it came, in seconds of the caller's clock.
        layer: The layer that it waits for, 1..L.
        since: Since when it waits there.
        request: Whose it is: rows of one request are answered together. None: it is one by itself.
    """

    payload: Payload
    length: int
    arrived: float
    layer: int = 1
    since: float = 0.0
    request: Hashable = None


@dataclass(frozen=True)
class PoolRules:
    """What the pool is allowed.

    Attributes:
        batch_size: Most rows in a step; usually 8 to 64.
        deadline: Seconds that a row may wait at a layer for others to come along, while those run; 0 to 0.02.
        overhead: What a step costs beside its tokens, in tokens: a row is padded by others only where that costs less
            than a step of its own. 10 to 30 on a CPU, thousands on a GPU; infinity pads without limit.
        batch_tokens: Most tokens in a padded step, padding included; a single row may exceed it. On a CPU large steps
            fall out of the cache.
        packed_tokens: Most real tokens in a step that is run without padding (end to end, where attention grows with
            its square, or padded in attention alone): within it the length of a row is no reason to leave it out.
            0 where padding is computed.
        packed_area: Most rows times longest row in a step without padding, for what attention pads.
        goal: Seconds within which as many requests as possible are to be answered; infinity: they are answered as they
            came (:class:`rl_exit.serving.goal.GoalPool`).
    """

    batch_size: int = 32
    deadline: float = 0.0
    overhead: float = 16.0
    batch_tokens: int = 4096
    packed_tokens: int = 0
    packed_area: float = math.inf
    goal: float = math.inf

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_tokens < 1:
            raise ConfigError(
                f"batch_size = {self.batch_size}, batch_tokens = {self.batch_tokens}; accepted: whole numbers from 1"
            )
        if self.packed_tokens < 0:
            raise ConfigError(f"packed_tokens = {self.packed_tokens}; accepted: whole numbers from 0")
        if not self.packed_area >= 0:
            raise ConfigError(f"packed_area = {self.packed_area}; accepted: 0 or more")
        if not self.deadline >= 0 or not self.overhead >= 0:
            raise ConfigError(f"deadline = {self.deadline}, overhead = {self.overhead}; accepted: 0 or more")
        if not self.goal > 0:
            raise ConfigError(f"goal = {self.goal} seconds; accepted: more than 0")
        if self.deadline and self.goal < math.inf:
            raise ConfigError(f"deadline = {self.deadline}, goal = {self.goal}; accepted: one of the two")
        if math.isinf(self.overhead) and self.goal < math.inf:
            raise ConfigError(
                f"overhead = {self.overhead}, goal = {self.goal}; accepted: with a goal, a finite overhead"
            )


class _Queue(Generic[Payload]):
    """Rows that wait for one layer, by age and by length; ``tokens``: of all of them."""

    def __init__(self) -> None:
        self.tokens = 0
        self.by_age: OrderedDict[int, Row[Payload]] = OrderedDict()
        self.by_length: list[tuple[int, int]] = []  # (length, number of the row)

    def add(self, number: int, row: Row[Payload]) -> None:
        self.by_age[number] = row
        self.tokens += row.length
        insort(self.by_length, (row.length, number))

    def remove(self, number: int) -> Row[Payload]:
        row = self.by_age.pop(number)
        self.tokens -= row.length
        del self.by_length[bisect_left(self.by_length, (row.length, number))]
        return row

    def oldest(self) -> Row[Payload]:
        return next(iter(self.by_age.values()))


class RequestPool(Generic[Payload]):
    """Rows by the layer they wait for, and the decision which of them run next.

    Whenever the model is free and rows wait, some rows run (the model never idles beside waiting work). Which layer:

    1. a row has waited longer than the deadline: the layer of the one of these that arrived first;
    2. some layer has a full batch: the deepest of these, so that rows leave and memory is freed;
    3. otherwise the shallowest, so that its rows catch up with those that wait further on and run with them.

    The step begins with the row of that layer that has waited longest, and takes those along whose length is nearest to
    its own, or, where rows can run without padding and not many wait, those that came after it (see
    :class:`PoolRules`). No row starves: what has waited longest among the overdue is always in the next step.

    Args:
        num_layers: L.
        rules: What is allowed.
    """

    def __init__(self, num_layers: int, rules: PoolRules | None = None) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers {num_layers}; accepted: 1 or more")
        self.num_layers = num_layers
        self.rules = rules or PoolRules()
        self._queues: list[_Queue[Payload]] = [_Queue() for _ in range(num_layers)]
        self._next = 0

    def __len__(self) -> int:
        """Rows that wait."""
        return sum(self.waiting())

    def waiting(self) -> list[int]:
        """Rows that wait for each layer, [L]."""
        return [len(queue.by_age) for queue in self._queues]

    def add(self, rows: Iterable[Row[Payload]], now: float) -> None:
        """Let rows wait for ``row.layer``.

        Raises:
            ValueError: There is no such layer.
        """
        for row in rows:
            if not 1 <= row.layer <= self.num_layers:
                raise ValueError(f"layer {row.layer}; accepted: 1..{self.num_layers}")
            row.since = now
            self._queues[row.layer - 1].add(self._next, row)
            self._next += 1

    def drop(self, request: Hashable) -> None:
        """Forget the rows of a request that wait: nobody waits for their answer any more."""
        for queue in self._queues:
            for number in [number for number, row in queue.by_age.items() if row.request is request]:
                queue.remove(number)

    def take(self, now: float) -> list[Row[Payload]]:
        """Take the rows of the next step out of the pool.

        Returns:
            Rows that wait for the same layer, by their length, longest first; empty where nothing waits.
        """
        queue = self._choose(now)
        if queue is None:
            return []
        few = queue.tokens <= MANY * self.rules.packed_tokens
        numbers = self._oldest(queue) if few else self._companions(queue)
        return [queue.remove(number) for number in numbers]

    def ran(self, rows: Sequence[Row[Payload]], layer: int, left: int, seconds: float) -> None:
        """Told of a step: its rows, how many of them left, and what it took. Nothing is learned from it here."""

    def _choose(self, now: float) -> _Queue[Payload] | None:
        held = [queue for queue in self._queues if queue.by_age]
        if not held:
            return None
        # Within a queue rows are in the order in which they came to it, so the first is the one that waited longest.
        overdue = [queue for queue in held if now - queue.oldest().since >= self.rules.deadline]
        if overdue:
            return min(overdue, key=lambda queue: queue.oldest().arrived)
        full = [queue for queue in held if len(queue.by_age) >= self.rules.batch_size]
        return full[-1] if full else held[0]

    def _oldest(self, queue: _Queue[Payload]) -> list[int]:
        """Numbers of the rows that have waited longest, as many as run without padding, longest first."""
        rules, tokens, longest = self.rules, 0, 0
        taken: list[tuple[int, int]] = []
        for number, row in queue.by_age.items():
            tokens, longest = tokens + row.length, max(longest, row.length)
            small = len(taken) < rules.batch_size and self._packed(tokens, longest * (len(taken) + 1))
            if taken and not small:
                break
            taken.append((row.length, number))
        return [number for _, number in sorted(taken, reverse=True)]

    def _companions(self, queue: _Queue[Payload]) -> list[int]:
        """Numbers of the rows that run, longest first: the oldest, and those nearest to it in length that fit.

        One fits where its padding, or what it makes of the others', pays for itself and the step stays small enough;
        or where all of them are few enough tokens to run without padding.
        """
        rules, order = self.rules, queue.by_length
        number, first = next(iter(queue.by_age.items()))
        low = bisect_left(order, (first.length, number))
        high = low + 1  # order[low:high] runs
        longest = total = first.length
        even = True  # no row has more padding than pays for itself
        while (count := high - low) < rules.batch_size:
            near = []
            if low:
                near.append((longest - order[low - 1][0], order[low - 1][0], False))
            if high < len(order):
                near.append(((order[high][0] - longest) * count, order[high][0], True))
            fitting = (
                (length, above, pays)
                for padding, length, above in sorted(near)
                if (pays := even and padding <= rules.overhead and self._small(max(longest, length), count + 1))
                or self._packed(total + length, max(longest, length) * (count + 1))
            )
            found = next(fitting, None)
            if found is None:
                break
            length, above, even = found
            low, high = (low, high + 1) if above else (low - 1, high)
            longest, total = max(longest, length), total + length
        return [number for _, number in reversed(order[low:high])]

    def _packed(self, tokens: int, area: int) -> bool:
        """Whether a step without padding is small enough."""
        return tokens <= self.rules.packed_tokens and area <= self.rules.packed_area

    def _small(self, longest: int, rows: int) -> bool:
        """Whether a padded step is small enough."""
        return longest * rows <= self.rules.batch_tokens
