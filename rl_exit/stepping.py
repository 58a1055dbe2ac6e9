"""One layer at a time for rows that are still inside: the parts of which the engine and the server are made.

A group of rows that stand after the same layer is a :class:`Survivors`. Whoever schedules them decides when which group
runs its next layer, and may put groups together that wait after the same layer, whatever batch or request they came
from and however long their texts are::

    waiting = enter(model, batch, criterion, rows)      # embedded, no layer run yet: waiting.layer == 0
    step = advance(model, waiting, criterion)           # runs layer 1 and asks the criterion
    step.left                                           # who leaves at layer 1, with logits; None if nobody
    step.inside                                         # who waits after layer 1; None if nobody
    both = join([step.inside, other.inside])            # two groups after the same layer, one batch from now on
    first, rest = both.split(8)                         # at most 8 rows now, the rest later

A row's answer does not depend on its company (to 1e-5 in float32), so any schedule gives the same answers. Groups may
be joined only where the same criterion is asked of both. Nothing here changes its arguments except that ``advance``
uses up the group it is given: keep the one it returns. Call it under ``torch.inference_mode()`` with the model in
evaluation mode; groups hold tensors of that mode. Not safe to call from several threads for one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rl_exit.criteria.base import Carry, Criterion, LayerView, Parted, parted
from rl_exit.models.backbones.embeddings import Ragged
from rl_exit.models.backbones.rows import Indices
from rl_exit.models.backbones.state import join_states

if TYPE_CHECKING:
    from rl_exit.data.instances import Instances
    from rl_exit.models.backbones import SteppedBackbone, StepState


class LayeredModel(Protocol):
    """What the engine needs of a model (:class:`rl_exit.models.early_exit.EarlyExitModel`)."""

    backbone: SteppedBackbone
    num_layers: int
    training: bool

    @property
    def device(self) -> torch.device:
        """Where the batches go."""

    def view(self, layer: int, state: StepState) -> LayerView:
        """What a criterion sees after ``layer``."""

    def train(self, mode: bool = True) -> Any:
        """Set training mode."""


@dataclass(frozen=True)
class Survivors:
    """Rows that have run the same layers and have not left.

    What the last layer gave is kept as it is; who stays is a list of row numbers, and rows are copied when their
    next layer runs.

    Attributes:
        layer: Layers they have run, 0..L-1.
        state: The hidden states of a batch that they are part of.
        carry: What the criterion remembers of that batch, one row each.
        numbers: The caller's number of each row of that batch, int64.
        kept: Which of its rows are meant, int64 [B]; None: all.
    """

    layer: int
    state: StepState
    carry: Carry
    numbers: Indices
    kept: Indices | None = None

    def __len__(self) -> int:
        """Number of rows, B."""
        return len(self.numbers) if self.kept is None else len(self.kept)

    @property
    def rows(self) -> Indices:
        """The caller's number of each row, int64 [B]."""
        return self.numbers if self.kept is None else self.numbers[self.kept]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        if not self.state.padded:
            return self.state.length
        lengths = self.state.lengths.numpy()
        return int((lengths if self.kept is None else lengths[self.kept]).max())

    def split(self, count: int) -> tuple[Survivors, Survivors]:
        """The first ``count`` rows and the others, at least one each; nothing is copied.

        Raises:
            ValueError: One part would be empty.
        """
        if not 0 < count < len(self):
            raise ValueError(f"split({count}) of {len(self)} rows; accepted: a number that leaves some on either side")
        kept = np.arange(len(self)) if self.kept is None else self.kept
        return replace(self, kept=kept[:count]), replace(self, kept=kept[count:])


class Left(NamedTuple):
    """Rows that left at one layer.

    Attributes:
        layer: 1..L.
        rows: The caller's number of each, int64 [B'].
        logits: [B', C] of that layer's exit or the criterion's own answer there, on the model's device.
    """

    layer: int
    rows: Indices
    logits: Tensor


class Step(NamedTuple):
    """What one layer did: who left, who is still inside. At least one of the two is there."""

    left: Left | None
    inside: Survivors | None


def enter(
    model: LayeredModel, batch: Mapping[str, Tensor], criterion: Criterion, rows: npt.ArrayLike | None = None
) -> Survivors:
    """Embed a batch.

    Args:
        model: In evaluation mode.
        batch: ``input_ids`` [B, T] with ``attention_mask`` and ``token_type_ids`` where there are any; B >= 1, padded
            on the right.
        criterion: Who leaves.
        rows: The caller's number of each row, int64 [B]; default 0..B-1.

    Raises:
        ValueError: The padding is not on the right.
    """
    device = model.device
    # The mask is read on the CPU first; where the batch comes from there, the device need not be asked for it.
    moved = {key: value if key == "attention_mask" else value.to(device) for key, value in batch.items()}
    state = model.backbone.begin(**moved)
    count = state.batch_size
    numbers = np.arange(count) if rows is None else np.asarray(rows, dtype=np.int64)
    return Survivors(0, state, criterion.start(count, device), numbers)


def enter_instances(
    model: LayeredModel, instances: Instances, criterion: Criterion, rows: npt.NDArray[np.int64]
) -> Survivors:
    """Embed tokenised instances, numbered by their place.

    Args:
        model: In evaluation mode.
        instances: Where they are.
        criterion: Who leaves.
        rows: Which, int64 [B], B >= 1.

    Raises:
        ValueError: No rows.
        IndexError: A row that there is not, or a token that the model does not know.
    """
    device = model.device
    if device.type == "cpu" and len(rows) and rows.min() >= 0:
        lengths, tokens = instances.lengths[rows], np.ascontiguousarray(instances.tokens)
        segments = None if instances.token_types is None else np.ascontiguousarray(instances.token_types)
        found = Ragged(tokens, segments, instances.offsets[rows], lengths, instances.pad_token_id)
        if (state := model.backbone.begin_rows(found)) is not None:
            return Survivors(0, state, criterion.start(len(rows), device), rows)
    return enter(model, instances.batch(rows), criterion, rows)


def enter_singly(
    model: LayeredModel, instances: Instances, criterion: Criterion, rows: npt.NDArray[np.int64]
) -> Iterator[Survivors]:
    """As :func:`enter_instances`, each row a group of its own; embedded together, as calls cost much beside layers.

    Args:
        model: In evaluation mode.
        instances: Where they are.
        criterion: Who leaves.
        rows: Which, int64 [B], B >= 1, best of similar length.

    Raises:
        ValueError: No rows.
        IndexError: A row that there is not, or a token that the model does not know.
    """
    state, device = enter_instances(model, instances, criterion, rows).state, model.device
    for place, alone in enumerate(state.apart()):
        yield Survivors(0, alone, criterion.start(1, device), rows[place : place + 1])


def advance(model: LayeredModel, inside: Survivors, criterion: Criterion) -> Step:
    """Run the next layer and let go who leaves; at layer L all do.

    The device is asked one question: who leaves.

    Args:
        model: In evaluation mode.
        inside: Who runs; used up: go on with what is returned.
        criterion: Who leaves; the one that the rows entered with.
    """
    if inside.kept is not None:
        inside = join([inside])
    layer, carry, numbers = inside.layer + 1, inside.carry, inside.numbers
    state = model.backbone.step(layer, inside.state)
    view = model.view(layer, state)
    if layer == model.num_layers:
        return Step(Left(layer, numbers, said_by(criterion, layer, view, carry)), None)
    apart = apart_by(criterion, layer, view, carry)
    if apart is None:
        return Step(None, Survivors(layer, state, carry, numbers))
    leaving, staying = apart
    said = said_by(criterion, layer, view, carry)
    if not len(staying):
        return Step(Left(layer, numbers, said), None)
    stay = Survivors(layer, state, carry, numbers, staying)
    if 2 * len(leaving) > len(numbers):
        stay = join([stay])  # a few rows must not keep the memory of many while they wait
    return Step(Left(layer, numbers[leaving], of_rows([said], [leaving])), stay)


def join(groups: Sequence[Survivors]) -> Survivors:
    """One group of several that stand after the same layer, in their order; a single whole group as it is.

    Args:
        groups: One or more, of one model and one criterion.

    Raises:
        ValueError: No groups, or after different layers, or their criteria remember different things.
    """
    if not groups or any(group.layer != groups[0].layer for group in groups):
        raise ValueError("join needs groups that stand after the same layer")
    first = groups[0]
    if len(groups) == 1 and first.kept is None:
        return first
    if any(group.carry.keys() != first.carry.keys() for group in groups):
        raise ValueError("join needs groups of one criterion: what they remember has different names")
    kept = [group.kept for group in groups]
    carry = {key: of_rows([group.carry[key] for group in groups], kept) for key in first.carry}
    state = join_states([group.state for group in groups], kept, max(group.longest for group in groups))
    numbers = first.rows if len(groups) == 1 else np.concatenate([group.rows for group in groups])
    return Survivors(first.layer, state, carry, numbers)


def apart_by(criterion: Criterion, layer: int, view: LayerView, carry: Carry) -> Parted | None:
    """Who leaves and who stays; None: nobody leaves."""
    leaving = getattr(criterion, "leaving", None)
    found: Parted | None
    found = parted(criterion.leave(layer, view, carry)) if leaving is None else leaving(layer, view, carry)
    return found


def said_by(criterion: Criterion, layer: int, view: LayerView, carry: Carry) -> Tensor:
    """Logits [B, C] of what is answered here: the criterion's own answer where it has one, else the exit's."""
    answer = getattr(criterion, "answer", None)
    return view.logits if answer is None else answer(layer, view, carry)


def of_rows(memories: Sequence[Tensor], kept: Sequence[Indices | None]) -> Tensor:
    """The given rows of each, one after the other."""
    if memories[0].is_cpu and memories[0].dtype in (torch.float32, torch.int64) and not torch.is_grad_enabled():
        arrays = [m.numpy() if some is None else m.numpy()[some] for m, some in zip(memories, kept, strict=True)]
        return torch.from_numpy(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
    whole = memories[0] if len(memories) == 1 else torch.cat(list(memories))
    if all(some is None for some in kept):
        return whole
    # One list of numbers for all of them: each would be a journey to the device.
    starts = np.cumsum([0, *(len(memory) for memory in memories)])
    each = zip(memories, kept, starts, strict=False)
    numbers = [start + (np.arange(len(memory)) if some is None else some) for memory, some, start in each]
    return whole.index_select(0, torch.from_numpy(np.concatenate(numbers)).to(whole.device))
