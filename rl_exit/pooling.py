"""Who runs next: survivors of several batches wait after their layer until there is a full batch of them.

A layer costs nearly as much for two rows as for eight, so a batch that has lost most of its rows wastes what its exits
saved. Rows that wait after the same layer are therefore run together, and layers saved become time saved at any batch
size. Answers do not change (:mod:`rl_exit.stepping`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch

from rl_exit.criteria.base import Criterion
from rl_exit.stepping import LayeredModel, Left, Survivors, advance, join

ENOUGH_TOKENS, MOST_TOKENS = 384, 768
"""On a CPU. Measured on MiniLM (H = 384) with one thread, microseconds a token and layer at best: 86 for 48 tokens, 62
for 96, 58 for 192, 51 to 53 from 384 to 1500, 59 for 3000. A group of enough tokens therefore gains nothing by waiting,
and would only be padded. What a pass writes must fit the caches too, where the measure above was of one group alone: a
file at batch size 128 took 26 % less time in parts of at most 1024 tokens, 28 % less in parts of 768 or 512."""


def limits(device: torch.device) -> tuple[int | None, int | None]:
    """From how many tokens on a group need not wait for rows, and how many run together at most; None: no limit."""
    return (ENOUGH_TOKENS, MOST_TOKENS) if device.type == "cpu" else (None, None)


def part_of(rows: int, longest: int, tokens: int | None) -> int:
    """How many of ``rows`` rows, padded to ``longest``, run together within ``tokens`` (one row at least).

    The size of even parts, as few as can be; None: all.
    """
    return rows if tokens is None else -(-rows // -(-rows // _fitting(longest, tokens)))


def _fitting(longest: int, tokens: int) -> int:
    return max(1, tokens // max(longest, 1))


class DepthPool:
    """Groups of rows that wait, by the number of layers they have run; first come, first served.

    Attributes:
        num_layers: L.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._groups: list[deque[Survivors]] = [deque() for _ in range(num_layers)]
        self._counts = [0] * num_layers
        self._tokens = [0] * num_layers  # with the padding that groups have of their own

    def __len__(self) -> int:
        """Rows that wait."""
        return sum(self._counts)

    def waiting(self, layer: int) -> int:
        """Rows that wait after ``layer`` (0: embedded only)."""
        return self._counts[layer]

    def put(self, group: Survivors) -> None:
        """Let a group wait after its layer."""
        layer, count = group.layer, len(group)
        self._groups[layer].append(group)
        self._counts[layer] += count
        self._tokens[layer] += count * group.longest

    def take(self, layer: int, most: int, tokens: int | None = None) -> Survivors:
        """Up to ``most`` of the rows that have waited longest after ``layer``, as one group.

        Args:
            layer: Where they wait.
            most: Rows.
            tokens: How many it has at most with its padding, if it has more than one row; the first that waits is cut
                into even parts if it has more. None: no limit.

        Raises:
            ValueError: Nobody waits there.
        """
        queue, taken, longest = self._groups[layer], 0, 0
        parts: list[Survivors] = []
        if not queue:
            raise ValueError(f"nobody waits after layer {layer}")
        while queue and taken < most:
            group = queue[0]
            longest = max(longest, group.longest)
            if parts:
                free = most - taken if tokens is None else min(most, _fitting(longest, tokens)) - taken
            else:
                free = part_of(min(most, len(group)), longest, tokens)
            if free < 1:
                break
            queue.popleft()
            self._tokens[layer] -= len(group) * group.longest
            cut = len(group) > free
            if cut:
                group, rest = group.split(free)
                queue.appendleft(rest)
                self._tokens[layer] += len(rest) * rest.longest
            parts.append(group)
            taken += len(group)
            if cut:
                break
        self._counts[layer] -= taken
        return join(parts)

    def ready(self, rows: int, tokens: int | None = None) -> int | None:
        """The deepest layer after which ``rows`` rows wait, or ``tokens`` tokens with their padding; None: nowhere."""
        for layer in reversed(range(self.num_layers)):
            if self._counts[layer] >= rows:
                return layer
            if tokens is not None and self._tokens[layer] >= tokens:
                return layer
        return None

    def shallowest(self) -> int | None:
        """The first layer after which anybody waits; None if nobody does."""
        return next((layer for layer, count in enumerate(self._counts) if count), None)


def run_pooled(
    model: LayeredModel, arrivals: Iterator[Callable[[], Survivors]], criterion: Criterion, batch_size: int
) -> Iterator[Left | None]:
    """Run batches until everybody has left, with survivors of different batches run together.

    Full batches run first, the deepest first of all, so that few rows wait at any time: at most ``L * batch_size``
    rows and one batch. On a CPU a group of enough tokens counts as full, and one of too many is cut
    (:func:`limits`). Without a full batch the next one enters; when none is left, the rest runs from the first layer
    up, so that it gathers on its way.

    Args:
        model: In evaluation mode, under ``torch.inference_mode()``.
        arrivals: Each gives one batch, embedded (:func:`rl_exit.stepping.enter`).
        criterion: Who leaves.
        batch_size: Rows that run together at most.

    Yields:
        After each layer of a group, who left there; None if nobody did.
    """
    pool = DepthPool(model.num_layers)
    enough, most = limits(model.device)
    while True:
        layer = pool.ready(batch_size, enough)
        if layer is None:
            batch = next(arrivals, None)
            if batch is not None:
                pool.put(batch())
                continue
            layer = pool.shallowest()
            if layer is None:
                return
        step = advance(model, pool.take(layer, batch_size, most), criterion)
        if step.inside is not None:
            pool.put(step.inside)
        yield step.left
