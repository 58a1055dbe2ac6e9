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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rl_exit.native import function

SOURCE = Path(__file__).with_name("native_rows.c")
Indices = npt.NDArray[np.int64]


class _Source(ctypes.Structure):
    _fields_ = [
        *(("memory", ctypes.c_void_p), ("length", ctypes.c_int64)),
        *(("count", ctypes.c_int64), ("rows", ctypes.c_void_p)),
    ]


def pad_rows(
    sources: Sequence[Tensor], rows: Sequence[Indices | None], lengths: npt.NDArray[np.int64], tokens: int
) -> Tensor:
    """Some rows of some batches, in their order, each cut or filled up with zeros to ``tokens``.

    Args:
        sources: Batches [B_i, T_i, H] of one device.
        rows: Of each batch, which rows, 0..B_i-1, int64 and contiguous; None: all. Not checked.
        lengths: Real tokens of each row of the result, int64 [B], contiguous; none above
            ``tokens``, nor above the T_i of its batch. What stands behind them may be kept or may become 0.
        tokens: T of the result.

    Returns:
        [B, T, H], new memory.
    """
    first = sources[0]
    alike = first.is_cpu and not torch.is_grad_enabled() and all(source.dtype == first.dtype for source in sources)
    gather = _function() if alike else None
    if gather is None:
        return _padded_by_torch(sources, rows, tokens)
    unit = first.shape[2] * first.element_size()
    from_ = (_Source * len(sources))()
    held: list[Any] = []  # what C reads must live until it has
    count = 0
    for slot, source, chosen in zip(from_, sources, rows, strict=True):
        if not source.is_contiguous():
            source = source.contiguous()
            held.append(source)
        slot.memory, slot.length = source.data_ptr(), source.shape[1]
        if chosen is None:
            slot.count = source.shape[0]
        else:
            numbers = torch.from_numpy(chosen)  # whose address is had at once, unlike an array's
            held.append(numbers)
            slot.count, slot.rows = len(chosen), numbers.data_ptr()
        count += slot.count
    out = torch.empty((count, tokens, first.shape[2]), dtype=first.dtype)
    gather(len(sources), from_, torch.from_numpy(lengths).data_ptr(), tokens, unit, out.data_ptr())
    return out


def _padded_by_torch(sources: Sequence[Tensor], rows: Sequence[Indices | None], tokens: int) -> Tensor:
    parts = []
    for source, chosen in zip(sources, rows, strict=True):
        part = source[:, :tokens]
        if chosen is not None:
            part = part.index_select(0, torch.from_numpy(chosen).to(source.device))
        if part.shape[1] < tokens:
            part = torch.nn.functional.pad(part, (0, 0, 0, tokens - part.shape[1]))
        parts.append(part)
    if len(parts) > 1:
        return torch.cat(parts)
    return parts[0].clone() if rows[0] is None else parts[0]


@cache
def _function() -> Callable[..., None] | None:
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    return function(SOURCE, "rl_exit_gather", (long, ctypes.POINTER(_Source), pointer, long, long, pointer), None)
