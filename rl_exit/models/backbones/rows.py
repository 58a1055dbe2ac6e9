"""Rows of several batches of hidden states, put together as one padded batch.

Between two layers this is all that the engine copies. torch needs an ``index_select`` a batch and a ``cat``, each of
which reads and writes every row and finds its own code cold after a layer; compiled (``native_rows.c``,
:mod:`rl_exit.native`) it is one pass, on a GPU one launch a batch (:mod:`rl_exit.gpu`).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rl_exit.gpu import kernels, on, power_of_two
from rl_exit.native import function

SOURCE = Path(__file__).with_name("native_rows.c")
GPU_TILE = 4096  # numbers that a block of a GPU's threads copies
Indices = npt.NDArray[np.int64]
_failed: set[tuple[int, torch.dtype]] = set()  # rows for which the kernel could not be had


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
        seen: Where tokens are, bool [B, 1, 1, T] like `hidden`; an empty row's first position too. None: not known yet.
        device_lengths: `lengths` where `hidden` is, if they had to be brought there.
    """

    hidden: Tensor
    lengths: Tensor
    padded: bool
    seen: Tensor | None
    device_lengths: Tensor | None = None


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
    alike = not torch.is_grad_enabled() and all(source.dtype == first.dtype for source in sources)
    if alike and first.is_cuda and (found := kernels()) is not None:
        made = _tried_on_gpu(found.gather, sources, lengths, rows, tokens)
        if made is not None:
            return made
    gather = _function() if alike and first.is_cpu else None
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
    hidden, own = first.new_empty(count, tokens, first.shape[2]), lengths[0].new_empty(count)
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


def _tried_on_gpu(
    gather: Any, sources: Sequence[Tensor], lengths: Sequence[Tensor], rows: Sequence[Indices | None], tokens: int
) -> Padded | None:
    """None where the kernel cannot be had for rows of this kind, which is tried once."""
    kind = sources[0].shape[2], sources[0].dtype
    if kind in _failed:
        return None
    try:
        return _padded_on_gpu(gather, sources, lengths, rows, tokens)
    except (IndexError, ValueError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever a compiler may raise, torch does the same
        _failed.add(kind)
        logging.getLogger(__name__).warning("no kernel for rows of %s %s: %s: %s", *kind, type(error).__name__, error)
        return None


def _padded_on_gpu(
    gather: Any, sources: Sequence[Tensor], lengths: Sequence[Tensor], rows: Sequence[Indices | None], tokens: int
) -> Padded:
    """One launch a batch (:func:`rl_exit.gpu_kernels.gather`), and one journey of numbers to the device."""
    first, size = sources[0], sources[0].shape[2]
    chosen = [some for some in rows if some is not None]
    # Looked at here: a kernel reads what it is told to, and a row that there is not would leave the GPU unusable.
    if any(len(some) and some.min() < 0 for some in chosen):
        raise IndexError(f"rows of batches of {[source.shape[0] for source in sources]} rows: there is no such row")
    each = [real.numpy() for real in lengths]
    own = np.concatenate([real if some is None else real[some] for real, some in zip(each, rows, strict=True)])
    if len(own) and int(own.max()) > tokens:
        raise _too_long(tokens)
    sent = torch.from_numpy(np.concatenate([*chosen, own])).to(first.device)
    numbers, there = sent[: len(sent) - len(own)], sent[len(sent) - len(own) :]
    hidden = torch.empty((len(own), tokens, size), dtype=first.dtype, device=first.device)
    seen = torch.empty((len(own), 1, 1, tokens), dtype=torch.bool, device=first.device)
    start = used = 0
    wide = power_of_two(size)
    block = max(1, GPU_TILE // wide)
    with on(first.device):
        for source, some in zip(sources, rows, strict=True):
            count = source.shape[0] if some is None else len(some)
            if count:
                grid, constants = (count, -(-tokens // block)), {"SIZE": size, "BLOCK": block, "H2": wide}
                places = source.contiguous(), numbers[used:] if some is not None else sent, there, hidden, seen
                gather[grid](*places, start, source.shape[1], tokens, CHOSEN=some is not None, **constants)
            start += count
            used += 0 if some is None else count
    return Padded(hidden, torch.from_numpy(own), len(own) > 0 and int(own.min()) < tokens, seen, there)


def _too_long(tokens: int) -> ValueError:
    return ValueError(f"a row has more than {tokens} tokens, and none may be cut off")


@cache
def _function() -> Callable[..., int] | None:
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    arguments = (long, ctypes.POINTER(_Source), long, long, pointer, pointer, pointer)
    return function(SOURCE, "rl_exit_gather", arguments, long)
