"""Tokenised instances: ragged, small, memory-mapped from one Arrow file, padded when a batch is asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rl_exit.errors import DataError
from rl_exit.files import atomic_file

if TYPE_CHECKING:  # torch takes a second to import; `rl-exit tasks` needs this package but no torch
    from torch import Tensor

_FORMAT = "rl-exit instances 1"

RowNumbers = Sequence[int] | npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Instances:
    """N tokenised instances, one after the other in flat arrays.

    Attributes:
        ids: [N] int64, unique and stable: the position in the task's source split if the source has none.
        labels: [N] int64, class numbers.
        tokens: flat int32, token ids of all instances.
        offsets: [N+1] int64; instance n has ``tokens[offsets[n]:offsets[n+1]]``.
        token_types: flat int8 like ``tokens``, or None where the tokenizer knows no segments.
        pad_token_id: Fills the right end of shorter rows in a batch (the attention mask is 0 there).
    """

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    token_types: npt.NDArray[np.int8] | None
    pad_token_id: int

    def __post_init__(self) -> None:
        count = len(self.ids)
        types: dict[str, tuple[npt.NDArray[Any], type]] = {
            "ids": (self.ids, np.int64),
            "labels": (self.labels, np.int64),
            "tokens": (self.tokens, np.int32),
            "offsets": (self.offsets, np.int64),
        }
        if self.token_types is not None:
            types["token_types"] = (self.token_types, np.int8)
        for name, (array, dtype) in types.items():
            if array.ndim != 1 or array.dtype != dtype:
                raise ValueError(f"Instances.{name}: one dimension of {np.dtype(dtype)} expected, got {array.dtype}")
        if len(self.labels) != count or len(self.offsets) != count + 1:
            raise ValueError(f"Instances: {count} ids, {len(self.labels)} labels, {len(self.offsets)} offsets (N+1)")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens) or (self.lengths < 0).any():
            raise ValueError("Instances.offsets must rise from 0 to the number of tokens")
        if self.token_types is not None and len(self.token_types) != len(self.tokens):
            raise ValueError("Instances.token_types must be as long as tokens")

    def __len__(self) -> int:
        """N."""
        return len(self.ids)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each instance, [N] int64."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 hex digits of the SHA-256 of the content; equal content has equal fingerprints."""
        digest = hashlib.sha256(f"{_FORMAT} {len(self)} {self.pad_token_id} {self.token_types is not None}".encode())
        for array in (self.ids, self.labels, self.offsets, self.tokens, self.token_types):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def batch(self, rows: RowNumbers) -> dict[str, Tensor]:
        """Pad some rows to the longest among them.

        Args:
            rows: [B] row numbers, 0..N-1, in the order wanted.

        Returns:
            Keyword arguments for a model: ``input_ids``, ``attention_mask`` and, where there are segments,
            ``token_type_ids``, each int64 [B, T] with T the length of the longest row.

        Raises:
            ValueError: No rows.
            IndexError: A row outside 0..N-1.
        """
        import torch

        chosen = self._rows(rows)
        if not len(chosen):
            raise ValueError("a batch needs at least one row")
        if len(chosen) == 1 and (length := int(self.lengths[chosen[0]])):
            return self._one(int(self.offsets[chosen[0]]), length)
        lengths = self.lengths[chosen]
        column = np.arange(max(int(lengths.max()), 1))
        mask = column < lengths[:, None]
        # Beyond a row's end its neighbours' tokens are read, then covered.
        source = self.offsets[chosen][:, None] + column
        input_ids = _covered(self.tokens, source, mask, self.pad_token_id)
        batch = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        if self.token_types is not None:
            batch["token_type_ids"] = torch.from_numpy(_covered(self.token_types, source, mask, 0))
        return batch

    def _one(self, start: int, length: int) -> dict[str, Tensor]:
        """As :meth:`batch`, of one row: no padding to be worked out."""
        import torch

        part = slice(start, start + length)
        ids = torch.from_numpy(self.tokens[part].astype(np.int64))[None]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.token_types is not None:
            batch["token_type_ids"] = torch.from_numpy(self.token_types[part].astype(np.int64))[None]
        return batch

    def take(self, rows: RowNumbers) -> Instances:
        """The given rows, in that order, as new instances (a copy; ids go along).

        Raises:
            IndexError: A row outside 0..N-1.
        """
        chosen = self._rows(rows)
        lengths = self.lengths[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # Position in the new flat array -> position in the old one.
        source = np.arange(offsets[-1]) + np.repeat(self.offsets[chosen] - offsets[:-1], lengths)
        return Instances(
            ids=self.ids[chosen],
            labels=self.labels[chosen],
            tokens=self.tokens[source],
            offsets=offsets,
            token_types=None if self.token_types is None else self.token_types[source],
            pad_token_id=self.pad_token_id,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one Arrow IPC file (a single record batch), complete or not at all: written beside, then renamed.

        Raises:
            UserError: The file cannot be written, e.g. no space left on the device.
        """
        columns: dict[str, pa.Array] = {
            "id": pa.array(self.ids),
            "label": pa.array(self.labels),
            "tokens": pa.LargeListArray.from_arrays(pa.array(self.offsets), pa.array(self.tokens)),
        }
        if self.token_types is not None:
            columns["token_types"] = pa.LargeListArray.from_arrays(pa.array(self.offsets), pa.array(self.token_types))
        batch = pa.record_batch(columns)
        schema = batch.schema.with_metadata({"format": _FORMAT, "pad_token_id": str(self.pad_token_id)})
        with (
            atomic_file(Path(path)) as beside,
            pa.OSFile(str(beside), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Instances:
        """Map a file written by :meth:`save`; the arrays are read-only views of it.

        Raises:
            DataError: The file is missing, truncated or no instances file.
        """
        try:
            with pa.memory_map(str(path), "r") as source:
                reader = pa.ipc.open_file(source)
                meta = reader.schema.metadata or {}
                if meta.get(b"format") != _FORMAT.encode() or reader.num_record_batches != 1:
                    raise DataError(f"{path}: not a file of tokenised instances of this version ('{_FORMAT}')")
                batch = reader.get_batch(0)
            tokens = batch.column("tokens")
            segments = batch.column("token_types") if "token_types" in batch.schema.names else None
            return cls(
                ids=batch.column("id").to_numpy(),
                labels=batch.column("label").to_numpy(),
                tokens=tokens.values.to_numpy(),
                offsets=tokens.offsets.to_numpy(),
                token_types=None if segments is None else segments.values.to_numpy(),
                pad_token_id=int(meta[b"pad_token_id"]),
            )
        except FileNotFoundError:
            raise DataError(f"{path}: no such file of tokenised instances") from None
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as tokenised instances: {error}") from error

    def _rows(self, rows: RowNumbers) -> npt.NDArray[np.int64]:
        chosen = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"row {chosen.min()}..{chosen.max()} outside 0..{len(self) - 1}")
        return chosen


def _covered(
    values: npt.NDArray[Any], source: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_], filling: int
) -> npt.NDArray[np.int64]:
    """The values at the given places where the mask is set, else the filling; [B, T]."""
    if not len(values):
        return np.full(mask.shape, filling, dtype=np.int64)
    return np.where(mask, values.take(source, mode="clip"), np.int64(filling)).astype(np.int64, copy=False)
