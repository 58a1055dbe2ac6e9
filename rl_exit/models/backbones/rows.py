"""Rows of several batches of hidden states, put together as one padded batch.

Between two layers this is all that the engine copies. torch needs an ``index_select`` a batch and a ``cat``, each of
which reads and writes every row and finds its own code cold after a layer; compiled (``native_rows.c``,
:mod:`rl_exit.native`) it is one pass.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rl_exit.native import function

SOURCE = Path(__file__).with_name("native_rows.c")
Indices = npt.NDArray[np.int64]


class _Source(ctypes.Structure):
    _fields_ = [
        *(("memory", ctypes.c_void_p), ("size", ctypes.c_int64), ("length", ctypes.c_int64)),
        *(("lengths", ctypes.c_void_p), ("count", ctypes.c_int64), ("rows", ctypes.c_void_p)),
    ]


class Padded(NamedTuple):
    """Rows put together.

    Attributes:
        hidden: [B, T, H].
        lengths: Real tokens of each row, int64 [B] on the CPU.
        padded: Whether any row is shorter than T.
        seen: Where tokens are, bool [B, 1, 1, T] on the CPU; an empty row's first position too. None: not known yet.
    """

    hidden: Tensor
    lengths: Tensor
    padded: bool
    seen: Tensor | None


def pad_rows(
    sources: Sequence[Tensor], lengths: Sequence[Tensor], rows: Sequence[Indices | None], tokens: int
) -> Padded:
    """Some rows of some batches, in their order, each cut or filled up to ``tokens``, in new memory.

    Args:
        sources: Batches [B_i, T_i, H] of one device.
        lengths: Real tokens of their rows, int64 [B_i] on the CPU, none above T_i.
        rows: Of each batch, which rows, 0..B_i-1, int64 and contiguous; None: all.
        tokens: T of the result, at least 1.

    Raises:
        IndexError: There is no such row.
        ValueError: A row has more tokens than that.
    """
    first = sources[0]
    alike = first.is_cpu and not torch.is_grad_enabled() and all(source.dtype == first.dtype for source in sources)
    gather = _function() if alike else None
    if gather is None:
        return _padded_by_torch(sources, lengths, rows, tokens)
    unit = first.shape[2] * first.element_size()
    from_ = (_Source * len(sources))()
    held: list[Any] = []  # what C reads must live until it has
    count = 0
    for slot, source, real, chosen in zip(from_, sources, lengths, rows, strict=True):
        if not source.is_contiguous():
            source = source.contiguous()
            held.append(source)
        slot.memory, slot.lengths = source.data_ptr(), real.data_ptr()
        slot.size, slot.length, _ = source.shape
        if chosen is None:
            slot.count = slot.size
        else:
            numbers = torch.from_numpy(chosen)  # whose address is had at once, unlike an array's
            held.append(numbers)
            slot.count, slot.rows = len(chosen), numbers.data_ptr()
        count += slot.count
    hidden = torch.empty((count, tokens, first.shape[2]), dtype=first.dtype, device="cpu")
    own = torch.empty(count, dtype=torch.int64, device="cpu")
    seen = torch.empty((count, 1, 1, tokens), dtype=torch.bool, device="cpu")
    places = hidden.data_ptr(), own.data_ptr(), seen.data_ptr()
    shortest = gather(len(sources), from_, tokens, unit, *places)
    if shortest == -2:
        raise IndexError(f"rows of batches of {[source.shape[0] for source in sources]} rows: there is no such row")
    if shortest < 0:
        raise _too_long(tokens)
    return Padded(hidden, own, shortest < tokens, seen)


def _padded_by_torch(
    sources: Sequence[Tensor], lengths: Sequence[Tensor], rows: Sequence[Indices | None], tokens: int
) -> Padded:
    parts, counts = [], []
    for source, real, chosen in zip(sources, lengths, rows, strict=True):
        # First on the CPU: a row that there is not would leave a GPU unusable.
        counts.append(real if chosen is None else real.index_select(0, torch.from_numpy(chosen)))
        part = source[:, :tokens]
        if chosen is not None:
            part = part.index_select(0, torch.from_numpy(chosen).to(source.device))
        if part.shape[1] < tokens:
            part = torch.nn.functional.pad(part, (0, 0, 0, tokens - part.shape[1]))
        parts.append(part)
    hidden = torch.cat(parts) if len(parts) > 1 else parts[0].clone() if rows[0] is None else parts[0]
    own = torch.cat(counts)
    if len(own) and int(own.max()) > tokens:
        raise _too_long(tokens)
    return Padded(hidden, own, len(own) > 0 and int(own.min()) < tokens, None)


def _too_long(tokens: int) -> ValueError:
    return ValueError(f"a row has more than {tokens} tokens, and none may be cut off")


@cache
def _function() -> Callable[..., int] | None:
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    arguments = (long, ctypes.POINTER(_Source), long, long, pointer, pointer, pointer)
    return function(SOURCE, "rl_exit_gather", arguments, long)
