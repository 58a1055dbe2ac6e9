"""Running tokens through the layers with a cache: whole prompts at full depth, or one token a row, each leaving early.

Tokens of different rows and positions are run as one flat batch. In a step the tokens that leave are taken out of it,
and the next layer runs on what is left and on nothing else; what they owe to deeper layers is in :mod:`.cache`.

Shapes: B rows of the cache, S rows of a step, N flat tokens, H hidden size, V vocabulary, E exits, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rl_exit.criteria.base import Criterion, LayerView, compact
from rl_exit.generation.cache import Cache, index_tensor
from rl_exit.models.backbones.blocks import attend, rotary_table, rotate

if TYPE_CHECKING:
    from rl_exit.models.causal import EarlyExitCausalModel


@dataclass(frozen=True)
class Flat:
    """Tokens of a flat batch: of each row a run of consecutive positions.

    Attributes:
        rows: Rows of the cache, S of them, each once.
        starts: Position of each row's first token.
        counts: Tokens of each row.
        row: Row of each token, int64 [N].
        position: Position of each token, int64 [N].
    """

    rows: list[int]
    starts: list[int]
    counts: list[int]
    row: Tensor
    position: Tensor

    @classmethod
    def of(cls, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Flat:
        """Lay the tokens out row by row."""
        row = [r for r, count in zip(rows, counts, strict=True) for _ in range(count)]
        position = [p for start, count in zip(starts, counts, strict=True) for p in range(start, start + count)]
        return cls(list(rows), list(starts), list(counts), index_tensor(row, device), index_tensor(position, device))

    def single(self, keep: Sequence[int], kept: Tensor) -> Flat:
        """Some rows of a batch with one token a row; `kept` is `keep` as a tensor."""
        rows, starts = [self.rows[i] for i in keep], [self.starts[i] for i in keep]
        return Flat(rows, starts, [1] * len(rows), self.row[kept], self.position[kept])

    @property
    def ends(self) -> list[int]:
        """Position behind each row's last token."""
        return [start + count for start, count in zip(self.starts, self.counts, strict=True)]


@dataclass(frozen=True)
class Step:
    """What one step gives for S rows.

    Attributes:
        states: Of the exit at which each token left, [S, H].
        logits: Of that exit, [S, V].
        exits: Its number, 1..E.
    """

    states: Tensor
    logits: Tensor
    exits: list[int]


class Engine:
    """A model with the cache of one generation. Every row's positions are 0, 1, ..., whatever its neighbours hold.

    Args:
        model: The model, in evaluation mode.
        rows: B.
        capacity: Positions of a row.

    Raises:
        ModelError: The model's family does not generate text, or its positions cannot be tabulated.
        ValueError: The model is in training mode.
    """

    def __init__(self, model: EarlyExitCausalModel, rows: int, capacity: int) -> None:
        if model.training:
            raise ValueError("generation needs a model in evaluation mode: call model.eval() first")
        self.model = model
        self.base = model.backbone.model
        self.blocks = model.backbone.blocks
        self.layers = self.blocks.layers(self.base)
        self.device = model.device
        self.lengths = [0] * rows
        table: Any = model.get_input_embeddings()
        like: Tensor = table.weight[:1]
        # A projection of one token tells the sizes of keys, whatever the family calls them.
        probe = self.blocks.project(self.layers[0], like.new_zeros((1, model.backbone.hidden_size)), 1).key
        self.cache = Cache(len(self.layers), rows, capacity, probe.shape[1], probe.shape[2], like)
        self.cache_rows = list(range(rows))
        self.rotary = rotary_table(self.base, capacity, like) if self.blocks.rotary else None

    def full(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], every: bool = False) -> Tensor:
        """Run the next tokens of some rows at full depth, in one pass.

        Args:
            rows: Rows, each once.
            tokens: For each one or more token ids.
            every: Whether all logits are wanted, or each row's last.

        Returns:
            Logits of the last exit, [S, V], or [N, V] row by row if `every`.
        """
        counts = [len(run) for run in tokens]
        flat = Flat.of(rows, [self.lengths[row] for row in rows], counts, self.device)
        hidden = self._embed([token for run in tokens for token in run], flat)
        for index in range(len(self.layers)):
            hidden = self._run(index, hidden, flat)
        for row, end in zip(rows, flat.ends, strict=True):
            self.lengths[row] = end
        if not every:
            hidden = hidden[index_tensor(counts, self.device).cumsum(0) - 1]
        return self.model.head(self.model.exit_state(self.model.num_exits, hidden))

    def step(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        criterion: Criterion | None,
        progress: Tensor | None = None,
    ) -> Step:
        """Run the next token of some rows, each until it leaves.

        Args:
            rows: S rows, each once.
            tokens: Their token ids.
            criterion: Who leaves; None: nobody below layer L.
            progress: Share of each row's generation that is done, [S], for thresholds that fall along the way.
        """
        model = self.model
        flat = Flat.of(rows, [self.lengths[row] for row in rows], [1] * len(rows), self.device)
        hidden = self._embed(tokens, flat)
        carry = {} if criterion is None else criterion.start(len(rows), self.device)
        inside = list(range(len(rows)))  # place in the step of each token still inside
        exits = [model.num_exits] * len(rows)
        answers = _Answers(model, len(rows), self.device)
        for index in range(len(self.layers)):
            hidden = self._run(index, hidden, flat)
            number = model.exit_of_layer[index + 1]
            if not number or number == model.num_exits or criterion is None:
                continue
            view = model.view(number, hidden, progress)
            leave = criterion.leave(number, view, carry).tolist()  # the one question to the device per exit
            leaving = [place for place, goes in enumerate(leave) if goes]
            if not leaving:
                continue
            gone = index_tensor(leaving, self.device)
            places = [inside[place] for place in leaving]
            answers.add(places, gone, view)
            self.cache.show(flat.row[gone], flat.position[gone], hidden[gone])
            for place in places:
                exits[place] = number
            staying = [place for place, goes in enumerate(leave) if not goes]
            inside = [inside[place] for place in staying]
            if not inside:
                break
            kept = index_tensor(staying, self.device)
            carry, hidden, flat = compact(carry, kept), hidden[kept], flat.single(staying, kept)
            progress = None if progress is None else progress[kept]
        if inside:
            answers.add(inside, None, model.view(model.num_exits, hidden, progress))
        for row in rows:
            self.lengths[row] += 1
        return answers.step(exits)

    def cut(self, row: int, length: int) -> None:
        """Go back to the first `length` tokens of a row, all of which ran at full depth."""
        self.lengths[row] = length
        self.cache.cut(row, length)

    def _embed(self, tokens: Sequence[int], flat: Flat) -> Tensor:
        return self.blocks.embed(self.base, index_tensor(tokens, self.device), flat.position)

    def _run(self, index: int, hidden: Tensor, flat: Flat) -> Tensor:
        """Layer `index` (from 0) on flat tokens [N, H], after what earlier tokens owe it."""
        layer, cache, count = self.layers[index], self.cache, len(hidden)
        row, position, inputs = flat.row, flat.position, hidden
        owing, positions = cache.owed(index, flat.rows, flat.starts)
        if owing:
            old_row, old = index_tensor(owing, self.device), index_tensor(positions, self.device)
            row, position = torch.cat((old_row, row)), torch.cat((old, position))
            inputs = torch.cat((cache.shown[old_row, old], hidden))
        spare = self._spare(count)
        if spare:
            row, position, inputs = (_repeated(one, spare) for one in (row, position, inputs))
        query, key, value = self.blocks.project(layer, inputs, count + spare)
        query = query[spare:]
        if self.rotary is not None:
            cos, sin = (table[position] for table in self.rotary)
            query, key = rotate(query, cos[len(cos) - count :], sin[len(sin) - count :]), rotate(key, cos, sin)
        cache.write(index, row, position, key, value)
        cache.mark(index, flat.rows, flat.ends)
        reach = self.model.backbone.reaches[index]
        attended = self._attend(index, query, flat, self.blocks.scaling(layer), reach)
        if spare:
            return self.blocks.finish(layer, _repeated(hidden, spare), _repeated(attended, spare))[spare:]
        return self.blocks.finish(layer, hidden, attended)

    def _spare(self, count: int) -> int:
        """Rows to add to a product of `count` rows: on CPUs two or three were measured slower than four."""
        return 4 - count if count in (2, 3) and self.device.type == "cpu" else 0

    def _attend(self, index: int, query: Tensor, flat: Flat, scaling: float, reach: int | None) -> Tensor:
        """Attention of flat queries [N, heads, D] on the cache: [N, heads * D]."""
        keys, values = self.cache.keys[index], self.cache.values[index]
        ends = flat.ends
        longest = max(ends)
        whole = flat.rows == self.cache_rows and min(ends) == longest and max(flat.counts) == 1
        if whole and (reach is None or reach >= longest - 1):
            return attend(query[:, None], keys[:, :, :longest], values[:, :, :longest], scaling, None, False)[:, 0]
        if query.device.type == "cpu":
            return _row_by_row(query, keys, values, flat, scaling, reach)
        return _padded(query, keys, values, flat, scaling, reach)


class _Answers:
    """Collects what leaving tokens say; the head is asked once a step, so that its weights are read once."""

    def __init__(self, model: EarlyExitCausalModel, count: int, device: torch.device) -> None:
        self.model = model
        self.count = count
        self.device = device
        self.places: list[int] = []
        self.states: list[Tensor] = []
        self.logits: list[Tensor | None] = []

    def add(self, places: list[int], which: Tensor | None, view: LayerView) -> None:
        """Keep the tokens `which` of a view (None: all); logits that a criterion has read are not computed again."""
        read = vars(view).get("logits")
        self.places += places
        self.states.append(view.state if which is None else view.state[which])
        self.logits.append(read if read is None or which is None else read[which])

    def step(self, exits: list[int]) -> Step:
        """What was collected, in the order of the step."""
        states = _joined(self.states)
        unread = [state for state, logits in zip(self.states, self.logits, strict=True) if logits is None]
        if len(unread) == len(self.states):
            logits = self.model.head(states)
        else:
            parts = iter(self.model.head(_joined(unread)).split([len(one) for one in unread]) if unread else ())
            logits = _joined([next(parts) if read is None else read for read in self.logits])
        if self.places != list(range(self.count)):
            order = sorted(range(self.count), key=self.places.__getitem__)
            back = index_tensor(order, self.device)
            states, logits = states[back], logits[back]
        return Step(states, logits, exits)


def _repeated(rows: Tensor, times: int) -> Tensor:
    """The first row again, `times` times before the others; computed or written twice, it is the same."""
    return torch.cat((rows[:1].expand(times, *rows.shape[1:]), rows))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _row_by_row(query: Tensor, keys: Tensor, values: Tensor, flat: Flat, scaling: float, reach: int | None) -> Tensor:
    """Attention of each row on views of its own cache: nothing is copied, no key is read that is not seen."""
    out, at = [], 0
    for row, start, count in zip(flat.rows, flat.starts, flat.counts, strict=True):
        end = start + count
        low = 0 if reach is None else max(start - reach, 0)
        mask, causal = None, False
        if count > 1:
            causal = start == 0 and (reach is None or reach >= end - 1)
            if not causal:
                mask = _seen(torch.arange(start, end, device=query.device), low, end, reach)
        own = query[None, at : at + count], keys[row : row + 1, :, low:end], values[row : row + 1, :, low:end]
        out.append(attend(*own, scaling, mask, causal)[0])
        at += count
    return out[0] if len(out) == 1 else torch.cat(out)


def _padded(query: Tensor, keys: Tensor, values: Tensor, flat: Flat, scaling: float, reach: int | None) -> Tensor:
    """Attention of all rows at once, padded and masked: one launch, for devices where launches are what costs."""
    longest, most = max(flat.ends), max(flat.counts)
    place = torch.arange(len(flat.rows), device=query.device).repeat_interleave(
        index_tensor(flat.counts, query.device), output_size=len(query)
    )
    offset = flat.position - index_tensor(flat.starts, query.device)[place]
    padded = query.new_zeros((len(flat.rows), most, *query.shape[1:]))
    padded[place, offset] = query
    position = torch.zeros((len(flat.rows), most), dtype=torch.int64, device=query.device)
    position[place, offset] = flat.position
    chosen = index_tensor(flat.rows, query.device)
    mask = _seen(position, 0, longest, reach)[:, None]
    return attend(padded, keys[chosen, :, :longest], values[chosen, :, :longest], scaling, mask, False)[place, offset]


def _seen(position: Tensor, low: int, end: int, reach: int | None) -> Tensor:
    """Which of the keys low..end-1 tokens at these positions [..., T] see, bool [..., T, end - low]."""
    distance = position[..., None] - torch.arange(low, end, device=position.device)
    return distance >= 0 if reach is None else (distance >= 0) & (distance <= reach)
