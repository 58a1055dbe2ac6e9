"""Embeddings of BERT, RoBERTa and its kin and ELECTRA in one call of compiled code (``native_embeddings.c``).

Where texts leave after a few layers, what comes before the first one weighs twice as much. Padding, mask, three
look-ups, two sums and a norm are twenty operations of numpy and torch; compiled (:mod:`rl_exit.native`) they are one
pass over the tokens as they lie in memory, and padding is not looked up. Answers equal those of the modules to the
rounding of a sum.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rl_exit.models.backbones.quick_layer import untouched
from rl_exit.native import function

SOURCE = Path(__file__).with_name("native_embeddings.c")
KINDS = {
    "BertEmbeddings": False,
    "ElectraEmbeddings": False,
    **dict.fromkeys(("RobertaEmbeddings", "XLMRobertaEmbeddings", "CamembertEmbeddings"), True),
}
"""Classes of transformers by name, and whether their positions count as RoBERTa's do."""
PARTS = ("word_embeddings", "token_type_embeddings", "position_embeddings", "LayerNorm", "dropout")


class Ragged(NamedTuple):
    """Rows of tokens in flat arrays, all contiguous.

    Attributes:
        tokens: int32, token ids.
        segments: int8 like ``tokens``, or None: all 0.
        starts: int64 [B], where each row begins.
        lengths: int64 [B], how many tokens it has; ``starts + lengths`` lies within the arrays.
        padding: Token id of padding; an empty row has one.
    """

    tokens: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int8] | None
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    padding: int


class _Tables(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("words", "segments", "positions", "size", "counted")),
        *((name, ctypes.c_void_p) for name in ("word", "segment", "position", "weight", "bias")),
        ("eps", ctypes.c_double),
    ]


class _Found(NamedTuple):
    """Tables as compiled code reads them, and the weights that they were made of."""

    weights: Sequence[Tensor]
    held: Sequence[Tensor]  # storage of its own name: an address says nothing where what lay there may have been freed
    tables: _Tables


def embed_rows(embeddings: Any, ragged: Ragged, tokens: int) -> Tensor | None:
    """Input of the first layer.

    Args:
        embeddings: Of a base model of transformers.
        ragged: The rows.
        tokens: T, at least the longest row and at least 1.

    Returns:
        float32 [B, T, H], zeros behind each row; None: these embeddings must be called as the module that they are
        (another kind, replaced parts, hooks, training, another precision or device, gradients), or no compiler.

    Raises:
        IndexError: A token, segment or position outside its table.
    """
    embed = _function()
    if embed is None or torch.is_grad_enabled():
        return None
    found = _tables_of(embeddings)
    if found is None:
        return None
    tables, given = found.tables, ragged.segments
    out = torch.empty((len(ragged.lengths), tokens, tables.size), dtype=torch.float32, device="cpu")
    failed = embed(
        ctypes.addressof(tables),
        len(ragged.lengths),
        _address(ragged.starts),
        _address(ragged.lengths),
        tokens,
        _address(ragged.tokens),
        None if given is None else _address(given),
        ragged.padding,
        out.data_ptr(),
    )
    if failed:
        raise IndexError(
            f"a token, segment or position is outside the embeddings, which know {tables.words} tokens, "
            f"{tables.segments} segments and {tables.positions} positions"
        )
    return out


def plain(embeddings: Any) -> bool:
    """Whether calling embeddings of transformers is words, segments, positions and norm, and nothing else."""
    known = type(embeddings)
    if known.__name__ not in KINDS or not known.__module__.startswith("transformers.models."):
        return False
    parts = embeddings._modules
    if len(parts) != len(PARTS) or not all(map(untouched, (embeddings, *parts.values()))):
        return False
    tables = [parts.get(name) for name in PARTS[:3]]
    return (
        all(type(table) is nn.Embedding and table.max_norm is None for table in tables)
        and type(parts.get("LayerNorm")) is nn.LayerNorm
        and type(parts.get("dropout")) is nn.Dropout
    )


_known: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()


def _tables_of(embeddings: Any) -> _Found | None:
    """What is read of a module; None where its function is another, or its weights are of another form."""
    if not plain(embeddings):
        return None
    *tables, norm = (embeddings._modules[name] for name in PARTS[:4])
    weights = [part._parameters.get("weight") for part in (*tables, norm)] + [norm._parameters.get("bias")]
    counted = embeddings.padding_idx if KINDS[type(embeddings).__name__] else -1
    known = _known.get(embeddings)
    if known is not None and known.tables.eps == norm.eps and known.tables.counted == counted:
        now = zip(known.weights, weights, known.held, strict=True)
        if all(mine is theirs and _same(mine, held) for mine, theirs, held in now):
            return known
    if not all(type(w) in (Tensor, nn.Parameter) and w.dtype == torch.float32 and w.is_cpu for w in weights):
        return None
    there = cast(list[Tensor], weights)
    size = there[0].shape[1]
    if any(weight.shape[-1] != size or not weight.is_contiguous() for weight in there) or there[3].ndim != 1:
        return None
    sizes = (*(weight.shape[0] for weight in there[:3]), size, counted)
    found = _known[embeddings] = _Found(
        there,
        [weight.detach() for weight in there],
        _Tables(*sizes, *(weight.data_ptr() for weight in there), norm.eps),
    )
    return found


def _same(now: Tensor, held: Tensor) -> bool:
    """Whether a weight still lies where it lay, in the same form."""
    return (
        now.data_ptr() == held.data_ptr()
        and now.shape == held.shape
        and now.dtype == held.dtype
        and now.is_contiguous()
    )


def _address(array: npt.NDArray[Any]) -> int:
    place: int = array.__array_interface__["data"][0]
    return place


@cache
def _function() -> Callable[..., int] | None:
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    arguments = (pointer, long, pointer, pointer, long, pointer, pointer, ctypes.c_int32, pointer)
    return function(SOURCE, "rl_exit_embed", arguments, long)
