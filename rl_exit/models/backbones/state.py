"""A batch of rows between two layers: what layers read of it, some of its rows, several batches as one.

Shapes: B rows, T tokens (padded on the right), H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rl_exit.models.backbones.rows import Indices, Padded, pad_rows

if TYPE_CHECKING:
    from rl_exit.models.backbones.base import SteppedBackbone


@dataclass(frozen=True)
class Tables:
    """What layers read besides states and masks; the same for every row, so that rows can leave without touching it.

    Attributes:
        by_token: Tensors [1, T, ...], one entry per position (rotary cosines and sines).
        by_pair: Tensors [..., T, T], one entry per pair of positions (relative positions and their biases).
        fixed: Tensors that do not depend on the length.
    """

    by_token: Mapping[str, Tensor] = field(default_factory=dict)
    by_pair: Mapping[str, Tensor] = field(default_factory=dict)
    fixed: Mapping[str, Tensor | None] = field(default_factory=dict)

    def trim(self, length: int) -> Tables:
        """Return the tables of the first `length` positions."""
        return Tables(
            by_token={name: table[:, :length] for name, table in self.by_token.items()},
            by_pair={name: table[..., :length, :length] for name, table in self.by_pair.items()},
            fixed=self.fixed,
        )


@dataclass(frozen=True)
class StepState:
    """A batch between two layers. Never changed in place: each operation returns a new one.

    Attributes:
        hidden: Output of the last layer that ran, before any final norm, [B, T, H].
        lengths: Real tokens of each row, int64 [B], always on the CPU, so that nobody has to ask the device.
        padded: Whether any row is shorter than T.
        masks: By reach (None: everything), what the layers of that reach take as mask; None where none is needed.
        tables: Rotary tables, relative positions and the like.
        backbone: The backbone that made this state.
    """

    hidden: Tensor
    lengths: Tensor
    padded: bool
    masks: Mapping[int | None, Tensor | None]
    tables: Tables
    backbone: SteppedBackbone = field(repr=False, compare=False)

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return self.hidden.shape[0]

    @property
    def length(self) -> int:
        """Padded number of tokens T."""
        return self.hidden.shape[1]

    @cached_property
    def attention_mask(self) -> Tensor:
        """1 at real tokens and 0 at right padding, int64 [B, T] on the device; made when first read."""
        return real_tokens(self.lengths, self.hidden).to(torch.int64)

    @cached_property
    def device_lengths(self) -> Tensor:
        """``lengths`` on the device; brought there when first read."""
        return self.lengths.to(self.hidden.device)

    def with_hidden(self, hidden: Tensor) -> StepState:
        """Return the same batch with other hidden states, [B, T, H]."""
        after = StepState(hidden, self.lengths, self.padded, self.masks, self.tables, self.backbone)
        for name in ("attention_mask", "device_lengths"):
            if (known := self.__dict__.get(name)) is not None:
                after.__dict__[name] = known
        return after

    def apart(self) -> Iterator[StepState]:
        """Yield each row as a batch of its own without padding, in order; a view, nothing is copied."""
        rows, real = self.hidden.unsqueeze(1).unbind(), self.lengths.unsqueeze(1).unbind()
        for hidden, lengths, count in zip(rows, real, self.lengths.tolist(), strict=True):
            keep = max(count, 1)
            whole = keep == self.length
            mine = hidden if whole else hidden[:, :keep]
            masks = self.backbone.masks(mine, lengths, count < keep)
            tables = self.tables if whole else self.tables.trim(keep)
            yield StepState(mine, lengths, count < keep, masks, tables, self.backbone)

    def select(self, rows: Tensor, length: int | None = None) -> StepState:
        """Return the state of some rows, with right padding trimmed; positions stay as they are.

        Masks are built anew for what is left, and dropped where no padding is left. ``int(state.lengths[rows].max())``
        is the shortest `length` possible.

        Args:
            rows: Which rows to keep and in which order, integer [B'] on any device (best the CPU, where `lengths` is).
            length: Tokens to keep, at least the longest kept row; None keeps T.

        Raises:
            ValueError: `length` would cut real tokens off, or is greater than T.
        """
        lengths = self.lengths.index_select(0, rows.to(self.lengths.device))
        keep = self.length if length is None else length
        longest = int(lengths.max()) if lengths.shape[0] else 0
        if not longest <= keep <= self.length:
            raise ValueError(
                f"length must lie between the longest kept row, {longest}, and T = {self.length}, not {keep}"
            )
        hidden = self.hidden[:, :keep].index_select(0, rows.to(self.hidden.device))
        padded = shorter_than(lengths, keep)
        return StepState(
            hidden=hidden,
            lengths=lengths,
            padded=padded,
            masks=self.backbone.masks(hidden, lengths, padded),
            tables=self.tables if keep == self.length else self.tables.trim(keep),
            backbone=self.backbone,
        )


def join_states(
    states: Sequence[StepState], rows: Sequence[Indices | None] | None = None, longest: int | None = None
) -> StepState:
    """Put batches that stand after the same layer together, in their order, padded to the longest row among them.

    Rows do not see each other, so each goes on as it would have alone. Batches of different padding may be joined: the
    shorter are padded with zeros, and padding beyond the longest row is cut.

    Args:
        states: One or more of the same backbone, after the same layer.
        rows: Of each batch, which of its rows, 0..B-1, int64, in the order wanted; None: all.
        longest: Tokens of the longest of these rows, where the caller knows them.

    Returns:
        The rows of all of them, [sum of B, T, H], with masks for the next layer; a single batch as it is where all of
        its rows are wanted and none of its columns is padding alone.

    Raises:
        ValueError: No states, or of different backbones, or rows of another type, or `longest` is not theirs.
        IndexError: A row below 0 or beyond its batch.
    """
    if not states or any(state.backbone is not states[0].backbone for state in states):
        raise ValueError("join_states needs one or more states of one backbone")
    backbone = states[0].backbone
    chosen = (None,) * len(states) if rows is None else [some if some is None else _row_numbers(some) for some in rows]
    count = sum(state.batch_size if some is None else len(some) for state, some in zip(states, chosen, strict=True))
    # What the layers read beside the rows is the same for every row; the longest batch has all positions.
    widest = max(states, key=lambda state: state.length) if len(states) > 1 else states[0]
    if longest is None:
        lengths = [state.lengths.numpy() for state in states]
        kept = [real if some is None else real[some] for real, some in zip(lengths, chosen, strict=True)]
        longest = max((int(real.max()) for real in kept if len(real)), default=0)
    keep = max(longest, 1) if count else widest.length
    if keep > max(widest.length, 1):
        raise ValueError(f"longest = {longest}; accepted: at most {widest.length}, the padded length of these batches")
    if len(states) == 1 and chosen[0] is None and widest.length == keep:
        made = Padded(widest.hidden, widest.lengths, widest.padded, None)
    else:
        made = pad_rows([state.hidden for state in states], [state.lengths for state in states], chosen, keep)
    joined = StepState(
        hidden=made.hidden,
        lengths=made.lengths,
        padded=made.padded,
        masks=backbone.masks(made.hidden, made.lengths, made.padded, made.seen),
        tables=widest.tables if keep == widest.length else widest.tables.trim(keep),
        backbone=backbone,
    )
    if made.device_lengths is not None:
        joined.__dict__["device_lengths"] = made.device_lengths
    return joined


def shorter_than(lengths: Tensor, length: int) -> bool:
    """Whether any row is shorter than the padded length."""
    return lengths.shape[0] > 0 and int(lengths.min()) < length


def real_tokens(lengths: Tensor, hidden: Tensor) -> Tensor:
    """Which positions hold tokens and no padding, bool [B, T] on the device of ``hidden`` [B, T, H]."""
    return torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None].to(hidden.device)


def _row_numbers(rows: Indices) -> Indices:
    """Row numbers as compiled code may read them."""
    if rows.dtype != np.int64 or rows.ndim != 1:
        raise ValueError(f"rows must be int64 [B], not {rows.dtype} {list(rows.shape)}")
    return np.ascontiguousarray(rows)
