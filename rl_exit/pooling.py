"""Who runs next: survivors of several batches wait after their layer until there is a full batch of them.

A layer costs nearly as much for two rows as for eight, so a batch that has lost most of its rows wastes what its exits
saved. Rows that wait after the same layer are therefore run together, and layers saved become time saved at any batch
size. Answers do not change (:mod:`rl_exit.stepping`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from rl_exit.criteria.base import Criterion
from rl_exit.stepping import LayeredModel, Left, Survivors, advance, join

ENOUGH_TOKENS = 256
"""On a CPU a layer runs at full speed from about so many tokens on (measured on MiniLM: 80 microseconds a token below
32 tokens, 52 around 112, 49 around 144, 47 from 224 on), so a group of as many gains nothing by waiting, and would only
be padded."""


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

    def take(self, layer: int, most: int) -> Survivors:
        """Up to ``most`` of the rows that have waited longest after ``layer``, as one group.

        Raises:
            ValueError: Nobody waits there.
        """
        queue, parts, free = self._groups[layer], [], most
        if not queue:
            raise ValueError(f"nobody waits after layer {layer}")
        while queue and free > 0:
            group = queue.popleft()
            self._tokens[layer] -= len(group) * group.longest
            if len(group) > free:
                group, rest = group.split(free)
                queue.appendleft(rest)
                self._tokens[layer] += len(rest) * rest.longest
            parts.append(group)
            free -= len(group)
        self._counts[layer] -= most - free
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
) -> Iterator[Left]:
    """Run batches until everybody has left, with survivors of different batches run together.

    Full batches run first, the deepest first of all, so that few rows wait at any time: at most ``L * batch_size``
    rows and one batch. On a CPU a group of enough tokens counts as full. Without a full batch the next one enters; when
    none is left, the rest runs from the first layer up, so that it gathers on its way.

    Args:
        model: In evaluation mode, under ``torch.inference_mode()``.
        arrivals: Each gives one batch, embedded (:func:`rl_exit.stepping.enter`).
        criterion: Who leaves.
        batch_size: Rows that run together at most.

    Yields:
        Who left, as they leave.
    """
    pool = DepthPool(model.num_layers)
    tokens = ENOUGH_TOKENS if model.device.type == "cpu" else None
    while True:
        layer = pool.ready(batch_size, tokens)
        if layer is None:
            batch = next(arrivals, None)
            if batch is not None:
                pool.put(batch())
                continue
            layer = pool.shallowest()
            if layer is None:
                return
        step = advance(model, pool.take(layer, batch_size), criterion)
        if step.inside is not None:
            pool.put(step.inside)
        if step.left is not None:
            yield step.left
