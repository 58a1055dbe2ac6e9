"""The state store: what the frozen model says of every training instance, computed once, read by every sampler.

A store is a folder of ``store.json`` and Arrow shards (see :mod:`rl_exit.envs.shards`). It is built beside its place in
``.<name>.partial`` and renamed when complete: a folder without ``store.json`` is no store. Shards are memory-mapped, so
all runners of a node share one physical copy and stores may be larger than memory. Rows are global: row r of a store is
the same instance however many shards it has and however many of them a process maps.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_exit.envs.build import discard_partial, finish, refuse_other_things, store_block
from rl_exit.envs.manifest import ShardInfo, check_size, parse_manifest, read_manifest
from rl_exit.envs.shards import (
    Array,
    BoolArray,
    FloatArray,
    IntArray,
    Layout,
    MappedShard,
    Records,
    ShardOrigin,
    StateBlock,
    checked_block,
    decode_states,
    map_shard,
    stored_dtype,
)
from rl_exit.errors import RunError
from rl_exit.method.rewards import memorized_layer


class StateStore:
    """A memory-mapped store, whole or some shards of it; open one with :meth:`open`.

    The arrays that cover many instances (``ids``, ``labels``, ``losses``, ``correct``, ``logits``, ``memorized()``)
    have one entry per row in :attr:`rows`: all N for a whole store, those of the mapped shards otherwise (there, use
    :meth:`records`, which takes global rows). Over a single shard they are views of the file, over several they are
    copied once. Pickles as its path: the receiver maps the files anew.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        shards: Sequence[ShardInfo],
        mapped: Mapping[int, MappedShard],
        instances: str,
        model: str,
    ) -> None:
        self.path = path
        self.layout = layout
        self.shards = tuple(shards)
        self.mapped_shards = tuple(mapped)
        self.instances_fingerprint = instances
        self.model_fingerprint = model
        self._starts = [shard.first_row for shard in self.shards]
        self._bounds = np.array([*self._starts, self.num_instances], dtype=np.int64)
        self._open = dict(mapped)

    @classmethod
    def open(cls, path: str | os.PathLike[str], shards: Sequence[int] | None = None) -> StateStore:
        """Open a store: check its files by their sizes and map them, 0.2 ms each; data are read when touched.

        What is mapped stays readable and the same, even if the store is replaced or removed meanwhile.

        Args:
            path: Folder of the store.
            shards: Numbers of the shards to map; None for all. Rows of the others cannot be read.

        Raises:
            RunError: No such folder, no store, an unknown version, a missing or truncated shard.
            ValueError: A shard number the store does not have.
        """
        folder = Path(path).absolute()
        layout, infos, instances, model = read_manifest(folder)
        mapped = range(len(infos)) if shards is None else sorted(set(shards))
        if not mapped or mapped[0] < 0 or mapped[-1] >= len(infos):
            raise ValueError(f"{folder}: shards {list(shards or ())}; accepted: 0..{len(infos) - 1}, at least one")
        return cls(folder, layout, infos, {i: _map(folder, infos[i], layout) for i in mapped}, instances, model)

    @classmethod
    def parse(cls, manifest: str, path: str | os.PathLike[str]) -> StateStore:
        """A store known by the text of its manifest, no shard mapped yet; its folder need not be here.

        Raises:
            RunError: Another version, or a damaged manifest.
        """
        folder = Path(path)
        layout, infos, instances, model = parse_manifest(manifest, folder)
        return cls(folder, layout, infos, {}, instances, model)

    def mapping(self, shards: Mapping[int, Array | None]) -> StateStore:
        """This store with more shards mapped.

        Args:
            shards: Number -> bytes of the file (uint8), or None to map the file itself.

        Raises:
            RunError: A file is missing, truncated or damaged.
        """
        infos = {index: self.shards[index] for index in shards}
        more = {index: _map(self.path, infos[index], self.layout, data) for index, data in shards.items()}
        mapped = dict(sorted((self._open | more).items()))
        return StateStore(
            self.path, self.layout, self.shards, mapped, self.instances_fingerprint, self.model_fingerprint
        )

    def shards_of(self, rows: npt.ArrayLike) -> list[int]:
        """Numbers of the shards that hold these rows, ascending.

        Raises:
            ValueError: A row is outside the store.
        """
        return np.unique(np.searchsorted(self._bounds, self._checked(rows), side="right") - 1).tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        shards = None if len(self.mapped_shards) == len(self.shards) else self.mapped_shards
        return StateStore.open, (self.path, shards)

    def __repr__(self) -> str:
        shape = f"N={self.num_instances}, L={self.num_layers}, H={self.hidden_size}, C={self.num_classes}"
        return f"StateStore({str(self.path)!r}, {shape}, {self.layout.dtype}, {len(self.shards)} shards)"

    @property
    def num_instances(self) -> int:
        """N, over all shards, mapped or not."""
        return self.shards[-1].first_row + self.shards[-1].rows

    @property
    def num_layers(self) -> int:
        """L."""
        return self.layout.num_layers

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.layout.hidden_size

    @property
    def num_classes(self) -> int:
        """C."""
        return self.layout.num_classes

    @cached_property
    def rows(self) -> IntArray:
        """Global rows that can be read, ascending."""
        spans = [self.shards[index] for index in self.mapped_shards]
        return np.concatenate([np.arange(s.first_row, s.first_row + s.rows, dtype=np.int64) for s in spans])

    @cached_property
    def ids(self) -> IntArray:
        """[N] int64, stable ids."""
        return self._column("ids")

    @cached_property
    def labels(self) -> IntArray:
        """[N] int64."""
        return self._column("labels")

    @cached_property
    def losses(self) -> FloatArray:
        """[N, L] float32, CE of each exit, nats."""
        return self._column("losses")

    @cached_property
    def correct(self) -> BoolArray:
        """[N, L] bool."""
        return self._column("correct")

    @cached_property
    def logits(self) -> FloatArray:
        """[N, L, C] float32."""
        return self._column("logits")

    @cached_property
    def _memorized(self) -> IntArray:
        return memorized_layer(self.correct)

    def memorized(self) -> IntArray:
        """Memorized layer of each instance (Eq. 7), [N] int64 in 1..L."""
        return self._memorized

    def locate(self, row: int) -> tuple[MappedShard, int]:
        """The shard that holds a global row, and the row within it.

        Raises:
            ValueError: The row is outside the store or in a shard that is not mapped.
        """
        if not 0 <= row < self.num_instances:
            raise ValueError(f"row {row}; accepted: 0..{self.num_instances - 1} ({self.path})")
        index = bisect.bisect_right(self._starts, row) - 1
        return self._shard(index), row - self._starts[index]

    def states(self, rows: npt.ArrayLike) -> FloatArray:
        """Gather states: a float32 copy, [B, L, H].

        Args:
            rows: [B] integer, global rows in any order, repeats allowed.

        Raises:
            ValueError: A row is outside the store or in a shard that is not mapped.
        """
        wanted = self._checked(rows)
        out: FloatArray = np.empty((len(wanted), self.num_layers, self.hidden_size), dtype=np.float32)
        for shard, local, places in self._parts(wanted):
            if isinstance(places, slice) and shard.states.dtype == np.float32:
                np.take(shard.states, local, axis=0, out=out[places], mode="clip")  # 'raise' would buffer the output
                continue
            targets = range(len(wanted))[places] if isinstance(places, slice) else places.tolist()
            # Row by row: each stays in the cache between copy and conversion, and nothing is gathered twice.
            for target, source in zip(targets, local.tolist(), strict=True):
                decode_states(shard.states[source], out[target])
        return out

    def states_at(self, rows: npt.ArrayLike, layers: npt.ArrayLike) -> FloatArray:
        """Gather the state of one layer per row: a float32 copy, [B, H].

        Args:
            rows: [B] integer, global rows.
            layers: [B] integer, 1..L.

        Raises:
            ValueError: A row cannot be read, or a layer is outside 1..L.
        """
        wanted = self._checked(rows)
        index = np.asarray(layers, dtype=np.int64) - 1
        if index.shape != wanted.shape or (len(index) and (index.min() < 0 or index.max() >= self.num_layers)):
            raise ValueError(f"layers must be [{len(wanted)}] within 1..{self.num_layers}")
        out: FloatArray = np.empty((len(wanted), self.hidden_size), dtype=np.float32)
        for shard, local, places in self._parts(wanted):
            part = np.empty((len(local), self.hidden_size), dtype=np.float32)
            decode_states(shard.states[local, index[places]], part)
            out[places] = part
        return out

    def records(self, rows: npt.ArrayLike) -> Records:
        """Gather everything but the states (copies).

        Raises:
            ValueError: A row cannot be read.
        """
        wanted = self._checked(rows)
        count, layers = len(wanted), self.num_layers
        out = Records(
            ids=np.empty(count, dtype=np.int64),
            labels=np.empty(count, dtype=np.int64),
            losses=np.empty((count, layers), dtype=np.float32),
            correct=np.empty((count, layers), dtype=np.bool_),
            logits=np.empty((count, layers, self.layout.logit_width), dtype=np.float32),
        )
        for shard, local, places in self._parts(wanted):
            for name in ("ids", "labels", "losses", "correct", "logits"):
                getattr(out, name)[places] = getattr(shard, name)[local]
        return out

    def outcomes(self, rows: npt.ArrayLike) -> tuple[FloatArray, BoolArray]:
        """Gather what rewards are made of (copies): losses [B, L] and correct [B, L].

        Raises:
            ValueError: A row cannot be read.
        """
        wanted = self._checked(rows)
        losses: FloatArray = np.empty((len(wanted), self.num_layers), dtype=np.float32)
        correct: BoolArray = np.empty((len(wanted), self.num_layers), dtype=np.bool_)
        for shard, local, places in self._parts(wanted):
            if isinstance(places, slice):
                np.take(shard.losses, local, axis=0, out=losses[places], mode="clip")
                np.take(shard.correct, local, axis=0, out=correct[places], mode="clip")
            else:
                losses[places], correct[places] = shard.losses[local], shard.correct[local]
        return losses, correct

    def block(self, rows: npt.ArrayLike) -> StateBlock:
        """Gather everything (copies), states as float32.

        Raises:
            ValueError: A row cannot be read.
        """
        records = self.records(rows)
        return StateBlock(
            records.ids, records.labels, records.losses, records.correct, records.logits, self.states(rows)
        )

    def _shard(self, index: int) -> MappedShard:
        shard = self._open.get(index)
        if shard is None:
            raise ValueError(f"shard {index} of {self.path} is not mapped; mapped: {list(self.mapped_shards)}")
        return shard

    def _checked(self, rows: npt.ArrayLike) -> IntArray:
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.size and not np.issubdtype(wanted.dtype, np.integer)):
            raise ValueError(f"rows must be [B] integer, got {wanted.dtype} {wanted.shape}")
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.num_instances):
            raise ValueError(
                f"rows {wanted.min()}..{wanted.max()}; accepted: 0..{self.num_instances - 1} ({self.path})"
            )
        return wanted.astype(np.int64, copy=False)

    def _parts(self, rows: IntArray) -> Iterator[tuple[MappedShard, IntArray, IntArray | slice]]:
        """(shard, rows within it, their places in ``rows``); ascending rows lie side by side, which is quicker."""
        if (rows[1:] >= rows[:-1]).all():
            cuts = np.searchsorted(rows, self._bounds)
            local = rows - np.repeat(self._bounds[:-1], np.diff(cuts))
            for index, (start, stop) in enumerate(itertools.pairwise(cuts.tolist())):
                if start < stop:
                    yield self._shard(index), local[start:stop], slice(start, stop)
            return
        which = np.searchsorted(self._bounds, rows, side="right") - 1
        first = int(which[0])
        if (which == first).all():
            yield self._shard(first), rows - self._starts[first], slice(0, len(rows))
            return
        for index in np.unique(which).tolist():
            places = np.flatnonzero(which == index)
            yield self._shard(index), rows[places] - self._starts[index], places

    def _column(self, name: str) -> Any:
        parts = [getattr(self._shard(index), name) for index in self.mapped_shards]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class StateStoreWriter:
    """Writes a store in one process, shard by shard; as a context manager it closes, or discards after an error.

    Args:
        path: Folder of the store; an older store there is replaced when this one is complete. Leftovers of a killed
            build of the same path are removed.
        num_layers: L.
        hidden_size: H.
        num_classes: C.
        dtype: Storage of the states: float32, float16 or bfloat16.
        shard_size: Instances per shard; one shard is held in memory until it is full.
        keeps_logits: Whether logits are stored (:class:`~rl_exit.envs.shards.Layout`).
        instances: Fingerprint of the tokenised instances.
        model: Fingerprint of the model that computes the states.

    Raises:
        RunError: Something that is no store is at the path.
        ValueError: A size below its minimum or an unknown dtype.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_layers: int,
        hidden_size: int,
        num_classes: int,
        dtype: str = "float32",
        shard_size: int = 8192,
        *,
        keeps_logits: bool = True,
        instances: str = "",
        model: str = "",
    ) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size {shard_size}; accepted: at least 1")
        self.path = Path(path).absolute()
        self.layout = Layout(num_layers, hidden_size, num_classes, dtype, keeps_logits)
        self._shard_size = shard_size
        self._instances = instances
        self._model = model
        self._buffer = self._new_buffer()
        self._filled = 0
        self._written = 0
        self._closed = False
        refuse_other_things(self.path)
        discard_partial(self.path)

    def append(
        self,
        ids: npt.ArrayLike,
        labels: npt.ArrayLike,
        states: npt.ArrayLike,
        losses: npt.ArrayLike,
        correct: npt.ArrayLike,
        logits: npt.ArrayLike,
    ) -> None:
        """Add B instances, in the order of the store's rows (see :class:`StateBlock` for the shapes).

        Raises:
            ValueError: A shape does not fit.
            UserError: A value is not finite or does not fit the storage type; no space on the device.
        """
        if self._closed:
            raise ValueError("this writer is closed")
        block = checked_block(self.layout, ids, labels, states, losses, correct, logits)
        start = 0
        while start < len(block):
            count = min(len(block) - start, self._shard_size - self._filled)
            for name, column in vars(self._buffer).items():
                column[self._filled : self._filled + count] = getattr(block, name)[start : start + count]
            self._filled += count
            start += count
            if self._filled == self._shard_size:
                self._flush()

    def close(self) -> StateStore:
        """Write the last shard and the manifest, put the store in its place and open it.

        Raises:
            RunError: Nothing was appended.
            UserError: No space on the device; nothing half written stays.
        """
        if self._filled:
            self._flush()
        self._closed = True
        try:
            finish(self.path, self._written, layout=self.layout, instances=self._instances, model=self._model)
        except BaseException:
            self.discard()
            raise
        return StateStore.open(self.path)

    def discard(self) -> None:
        """Give up: remove what has been written."""
        self._closed = True
        discard_partial(self.path)

    def __enter__(self) -> StateStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
        elif not self._closed:
            self.close()

    def _flush(self) -> None:
        columns = {name: column[: self._filled] for name, column in vars(self._buffer).items()}
        origin = ShardOrigin(self._written, self.layout, self._instances, self._model)
        try:
            store_block(self.path, origin, StateBlock(**columns))
        except BaseException:
            self.discard()
            raise
        self._written += 1
        self._filled = 0

    def _new_buffer(self) -> StateBlock:
        size, layout = self._shard_size, self.layout
        states: Array = np.empty((size, layout.num_layers, layout.hidden_size), dtype=stored_dtype(layout))
        return StateBlock(
            ids=np.empty(size, dtype=np.int64),
            labels=np.empty(size, dtype=np.int64),
            losses=np.empty((size, layout.num_layers), dtype=np.float32),
            correct=np.empty((size, layout.num_layers), dtype=np.bool_),
            logits=np.empty((size, layout.num_layers, layout.logit_width), dtype=np.float32),
            states=states,
        )


def _map(folder: Path, info: ShardInfo, layout: Layout, data: Array | None = None) -> MappedShard:
    if data is None:
        check_size(folder / info.file, info.num_bytes)
    shard = map_shard(folder / info.file, layout, data)
    if len(shard.ids) != info.rows:
        raise RunError(f"{folder / info.file}: {len(shard.ids)} rows; the manifest says {info.rows}")
    return shard
