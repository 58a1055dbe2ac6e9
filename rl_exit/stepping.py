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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rl_exit.criteria.base import Carry, Criterion, LayerView, compact
from rl_exit.models.backbones.base import join_states

if TYPE_CHECKING:
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

    Attributes:
        layer: Layers they have run, 0..L-1.
        state: Their hidden states.
        carry: What the criterion remembers of them, one row each.
        rows: The caller's number of each row, int64 [B] on the CPU.
    """

    layer: int
    state: StepState
    carry: Carry
    rows: Tensor

    def __len__(self) -> int:
        """Number of rows."""
        return self.rows.shape[0]

    def split(self, count: int) -> tuple[Survivors, Survivors | None]:
        """The first ``count`` rows, and the others if there are any. Views: nothing is copied until they are joined."""
        if count >= len(self):
            return self, None
        first = Survivors(self.layer, self.state.head(count), _part(self.carry, slice(None, count)), self.rows[:count])
        rest = Survivors(self.layer, self.state.tail(count), _part(self.carry, slice(count, None)), self.rows[count:])
        return first, rest


@dataclass(frozen=True)
class Left:
    """Rows that left at one layer.

    Attributes:
        layer: 1..L.
        rows: The caller's number of each, int64 [B'] on the CPU.
        logits: [B', C] of that layer's exit or the criterion's own answer there, on the model's device.
    """

    layer: int
    rows: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Step:
    """What one layer did: who left, who is still inside. At least one of the two is there."""

    left: Left | None
    inside: Survivors | None


def enter(
    model: LayeredModel, batch: Mapping[str, Tensor], criterion: Criterion, rows: Tensor | None = None
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
    state = model.backbone.begin(**{key: value.to(device) for key, value in batch.items()})
    numbers = torch.arange(state.batch_size) if rows is None else rows
    return Survivors(0, state, criterion.start(state.batch_size, device), numbers)


def advance(model: LayeredModel, inside: Survivors, criterion: Criterion) -> Step:
    """Run the next layer and let go who leaves; at layer L all do.

    The device is asked one question: who leaves.

    Args:
        model: In evaluation mode.
        inside: Who runs; used up: go on with what is returned.
        criterion: Who leaves; the one that the rows entered with.
    """
    if not inside.state.masks:
        inside = Survivors(inside.layer, join_states([inside.state]), inside.carry, inside.rows)
    layer = inside.layer + 1
    state = model.backbone.step(layer, inside.state)
    view = model.view(layer, state)
    rows, carry = inside.rows, inside.carry
    if layer == model.num_layers:
        return Step(Left(layer, rows, _said(criterion, layer, view, carry)), None)
    leave = _leave(criterion, layer, view, carry)
    if leave is None or len(leaving := np.flatnonzero(leave)) == 0:
        return Step(None, Survivors(layer, state, carry, rows))
    said = _said(criterion, layer, view, carry)
    if len(leaving) == rows.shape[0]:
        return Step(Left(layer, rows, said), None)
    staying, left = torch.from_numpy(np.flatnonzero(~leave)), torch.from_numpy(leaving)
    longest = max(int(state.lengths.index_select(0, staying).max()), 1)
    stay = Survivors(
        layer,
        state.select(staying, length=longest, masks=False),
        compact(carry, staying.to(state.hidden.device)),
        rows.index_select(0, staying),
    )
    return Step(Left(layer, rows.index_select(0, left), said.index_select(0, left.to(said.device))), stay)


def join(groups: Sequence[Survivors]) -> Survivors:
    """One group of several that stand after the same layer, in their order.

    Args:
        groups: One or more, of one model and one criterion.

    Raises:
        ValueError: No groups, or after different layers, or their criteria remember different things.
    """
    if len(groups) == 1:
        return groups[0]
    if not groups or any(group.layer != groups[0].layer for group in groups):
        raise ValueError("join needs groups that stand after the same layer")
    if any(group.carry.keys() != groups[0].carry.keys() for group in groups):
        raise ValueError("join needs groups of one criterion: what they remember has different names")
    carry = {key: torch.cat([group.carry[key] for group in groups]) for key in groups[0].carry}
    rows = torch.cat([group.rows for group in groups])
    return Survivors(groups[0].layer, join_states([group.state for group in groups]), carry, rows)


def _leave(criterion: Criterion, layer: int, view: LayerView, carry: Carry) -> npt.NDArray[np.bool_] | None:
    """Who leaves, [B]; None: nobody."""
    leaving = getattr(criterion, "leaving", None)
    found: npt.NDArray[np.bool_] | None
    # numpy for the few flags: a third of torch's time, which counts beside a small model's layer.
    found = criterion.leave(layer, view, carry).cpu().numpy() if leaving is None else leaving(layer, view, carry)
    return found


def _said(criterion: Criterion, layer: int, view: LayerView, carry: Carry) -> Tensor:
    """Logits [B, C] of what is answered here: the criterion's own answer where it has one, else the exit's."""
    answer = getattr(criterion, "answer", None)
    return view.logits if answer is None else answer(layer, view, carry)


def _part(carry: Carry, rows: slice) -> Carry:
    return {key: value[rows] for key, value in carry.items()}
