"""One layer on rows that come from different batches: joined, run, asked, parted again.

The slow twin is :func:`rl_exit.inference.run_batch` on each text alone; a test holds the two together for any order of
steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rl_exit.criteria import Carry, Criterion
from rl_exit.criteria.base import Parted
from rl_exit.data.instances import Instances
from rl_exit.models.backbones import StepState, join_states
from rl_exit.stepping import LayeredModel, apart_by, enter_instances, of_rows, said_by


@dataclass(eq=False, slots=True)
class Passage:
    """A text inside the model.

    Attributes:
        tokens: Token ids, int [T], T >= 1.
        types: Segment ids, int [T], where the tokenizer has segments.
        rule: When it leaves.
        chunk: Where its state lies after a layer; None before layer 1.
        index: Its row there.
    """

    tokens: npt.NDArray[Any]
    types: npt.NDArray[Any] | None
    rule: Criterion
    chunk: Chunk | None = None
    index: int = 0


@dataclass(frozen=True, eq=False)
class Chunk:
    """Survivors of one step under one rule: their states [B, T, H] and the rule's memory of them."""

    state: StepState
    carry: Carry


@dataclass(frozen=True)
class StepOutcome:
    """What a step did.

    Attributes:
        left: Positions of the rows that left, in the order of ``logits``.
        logits: float32 [len(left), C] on the CPU.
        stay: Positions of the others; their passages know where their states lie.
        tokens: Tokens that were computed, padding among them.
    """

    left: list[int]
    logits: Tensor
    stay: list[int]
    tokens: int


@torch.inference_mode()
def run_step(model: LayeredModel, layer: int, passages: Sequence[Passage], pad_token_id: int) -> StepOutcome:
    """Run a layer on passages that all wait for it, and ask each one's rule.

    Args:
        model: In evaluation mode.
        layer: 1..L; at L all leave.
        passages: B >= 1, of any earlier steps.
        pad_token_id: Fills up shorter rows before layer 1.

    Raises:
        ValueError: No passages, or the model is in training mode.
    """
    if model.training or not passages:
        raise ValueError("run_step needs passages and a model in evaluation mode")
    order, state, parts = _begin(model, passages, pad_token_id) if layer == 1 else _gather(passages)
    drops = state.padded and model.backbone.drops_padding(layer, state)
    pack = not drops and state.hidden.is_cpu and model.backbone.packs_step(state)
    ran = int(state.lengths.sum()) if drops or pack else state.batch_size * state.length
    state = model.backbone.step(layer, state, pack=pack)
    left: list[int] = []
    stay: list[int] = []
    logits = []
    for rule, rows in _by_rule(passages, order):
        whole = len(rows) == len(order)
        part = state if whole else state.select(torch.tensor(rows), length=int(state.lengths[rows].max()))
        view = model.view(layer, part)
        carry = rule.start(len(rows), part.hidden.device) if layer == 1 else _carry_of(rows, parts)
        every = np.arange(len(rows))
        apart = Parted(every, every[:0]) if layer == model.num_layers else apart_by(rule, layer, view, carry)
        leaving, staying = (every[:0], every) if apart is None else apart
        if len(leaving):
            left += [order[rows[row]] for row in leaving]
            logits.append(of_rows([said_by(rule, layer, view, carry)], [leaving]).float().cpu())
        if len(staying):
            places = staying
            longest = int(part.lengths.numpy()[staying].max())
            if 2 * len(staying) * longest < len(rows) * part.length:  # few or short rows must not keep much memory
                part, places = join_states([part], [staying]), every[: len(staying)]
                carry = {key: of_rows([memory], [staying]) for key, memory in carry.items()}
            chunk = Chunk(part, carry)
            for row, place in zip(staying.tolist(), places.tolist(), strict=True):
                passage = passages[order[rows[row]]]
                passage.chunk, passage.index = chunk, place
                stay.append(order[rows[row]])
    for position in left:
        passages[position].chunk = None
    found = torch.cat(logits) if logits else torch.empty(0)
    return StepOutcome(left, found, stay, ran)


Parts = list[tuple[Chunk, list[int]]]
Gathered = tuple[list[int], StepState, Parts]


def _begin(model: LayeredModel, passages: Sequence[Passage], pad_token_id: int) -> Gathered:
    """Embed; the rows keep their order."""
    lengths = np.fromiter((len(passage.tokens) for passage in passages), dtype=np.int64, count=len(passages))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([passage.tokens for passage in passages]).astype(np.int32, copy=False)
    segments = [passage.types for passage in passages if passage.types is not None]
    types = np.concatenate(segments).astype(np.int8, copy=False) if segments else None
    numbers = np.arange(len(passages))
    instances = Instances(numbers, np.zeros_like(numbers), tokens, offsets, types, pad_token_id)
    entered = enter_instances(model, instances, passages[0].rule, numbers)
    return list(range(len(passages))), entered.state, []


def _gather(passages: Sequence[Passage]) -> Gathered:
    """Collect rows from the chunks where they lie: the positions in the order of the rows, the state, the parts."""
    places: dict[int, tuple[Chunk, list[int]]] = {}
    for position, passage in enumerate(passages):
        assert passage.chunk is not None
        places.setdefault(id(passage.chunk), (passage.chunk, []))[1].append(position)
    order: list[int] = []
    states = []
    wanted: list[npt.NDArray[np.int64] | None] = []
    parts: Parts = []
    for chunk, positions in places.values():
        rows = [passages[position].index for position in positions]
        order += positions
        parts.append((chunk, rows))
        states.append(chunk.state)
        wanted.append(None if rows == list(range(chunk.state.batch_size)) else np.array(rows))
    return order, join_states(states, wanted), parts


def _by_rule(passages: Sequence[Passage], order: Sequence[int]) -> Iterable[tuple[Criterion, list[int]]]:
    """Rows of the state by their rule; usually all of them."""
    groups: dict[int, tuple[Criterion, list[int]]] = {}
    for row, position in enumerate(order):
        rule = passages[position].rule
        groups.setdefault(id(rule), (rule, []))[1].append(row)
    return groups.values()


def _carry_of(rows: Sequence[int], parts: Parts) -> Carry:
    """Memory of some rows of a gathered state. A chunk has one rule, so the rows are those of whole parts."""
    wanted = set(rows)
    first = 0
    mine: Parts = []
    for chunk, indices in parts:
        if first in wanted:
            mine.append((chunk, indices))
        first += len(indices)
    numbers = [np.array(indices) for _, indices in mine]
    return {key: of_rows([chunk.carry[key] for chunk, _ in mine], numbers) for key in mine[0][0].carry}
