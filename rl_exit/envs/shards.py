"""One shard of a state store: an Arrow IPC file of ONE record batch, memory-mapped and read without a copy.

Columns: ``id`` and ``label`` int64; ``states`` [L, H] in the storage type; ``losses`` [L] and ``logits`` [L, C]
float32; ``correct`` [L] uint8. The tensors are ``arrow.fixed_shape_tensor`` columns: they open in a fraction of a
millisecond, where list columns have to be walked. One batch per file makes every column one contiguous array.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rl_exit.errors import RunError, UserError
from rl_exit.method.rewards import memorized_layer

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

DTYPES = ("float32", "float16", "bfloat16")
_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
_METADATA_KEY = b"rl_exit.shard"


@dataclass(frozen=True)
class Layout:
    """Shapes and storage type of a store.

    Attributes:
        num_layers: L, at least 2 (with one layer there is nothing to decide).
        hidden_size: H.
        num_classes: C.
        dtype: Storage of the states: float32, float16 or bfloat16. Everything else is float32.
        keeps_logits: Whether logits are stored; of tokens, with a vocabulary of classes, they are not: [B, L, 0].
    """

    num_layers: int
    hidden_size: int
    num_classes: int
    dtype: str = "float32"
    keeps_logits: bool = True

    @property
    def logit_width(self) -> int:
        """Logits stored of an instance and layer: C or 0."""
        return self.num_classes if self.keeps_logits else 0

    def __post_init__(self) -> None:
        if self.num_layers < 2 or self.hidden_size < 1 or self.num_classes < 2:
            raise ValueError(
                f"num_layers={self.num_layers}, hidden_size={self.hidden_size}, num_classes={self.num_classes}; "
                "accepted: at least 2, 1 and 2"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"store dtype '{self.dtype}' is unknown; accepted: {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Records:
    """What is stored of B instances beside their states.

    Attributes:
        ids: [B] int64, the instances' stable ids.
        labels: [B] int64, 0..C-1.
        losses: [B, L] float32, CE of each exit, nats.
        correct: [B, L] bool, whether exit l predicts the label.
        logits: [B, L, C] float32, logits of each exit.
    """

    ids: IntArray
    labels: IntArray
    losses: FloatArray
    correct: BoolArray
    logits: FloatArray

    def memorized(self) -> IntArray:
        """Memorized layer of each instance (Eq. 7), [B] in 1..L."""
        return memorized_layer(self.correct)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class StateBlock(Records):
    """Everything stored of B instances.

    Attributes:
        states: [B, L, H] float32, pooled hidden state of each layer.
    """

    states: FloatArray


@dataclass(frozen=True)
class ShardOrigin:
    """What a shard belongs to, written into its schema so that shards of different builds are never mixed.

    Attributes:
        index: Number of the shard, from 0.
        layout: Shapes and storage type.
        instances: Fingerprint of the tokenised instances.
        model: Fingerprint of the model that computed the states.
    """

    index: int
    layout: Layout
    instances: str
    model: str


def shard_name(index: int) -> str:
    """File name of shard ``index``."""
    return f"shard-{index:05d}.arrow"


def checked_block(
    layout: Layout,
    ids: npt.ArrayLike,
    labels: npt.ArrayLike,
    states: npt.ArrayLike,
    losses: npt.ArrayLike,
    correct: npt.ArrayLike,
    logits: npt.ArrayLike,
) -> StateBlock:
    """Convert and check columns; the states come back in the storage type.

    Raises:
        ValueError: A shape does not fit the layout, or a label is outside 0..C-1.
        UserError: A state, loss or logit is not finite, or a state is too large for float16.
    """
    block = StateBlock(
        ids=np.asarray(ids, dtype=np.int64),
        labels=np.asarray(labels, dtype=np.int64),
        losses=np.asarray(losses, dtype=np.float32),
        correct=np.asarray(correct, dtype=np.bool_),
        logits=np.asarray(logits, dtype=np.float32),
        states=np.asarray(states, dtype=np.float32),
    )
    count = len(block) if block.ids.ndim == 1 else 0
    layers, hidden, classes = layout.num_layers, layout.hidden_size, layout.num_classes
    expected = {
        "ids": (count,),
        "labels": (count,),
        "states": (count, layers, hidden),
        "losses": (count, layers),
        "correct": (count, layers),
        "logits": (count, layers, layout.logit_width),
    }
    shapes = {name: getattr(block, name).shape for name in expected}
    wrong = [f"{name} {shape}" for name, shape in shapes.items() if shape != expected[name]]
    if wrong:
        accepted = ", ".join(f"{name} {shape}" for name, shape in expected.items())
        raise ValueError(f"state store: {', '.join(wrong)} given; accepted: {accepted}")
    if count and (block.labels.min() < 0 or block.labels.max() >= classes):
        raise ValueError(f"state store: labels {block.labels.min()}..{block.labels.max()}; accepted: 0..{classes - 1}")
    for name in ("states", "losses", "logits"):
        values = np.isfinite(getattr(block, name))
        finite = values if values.ndim == 2 else values.all(axis=2)
        if not finite.all():
            row, layer = np.argwhere(~finite)[0]
            raise UserError(
                f"{name} of instance {block.ids[row]} at layer {layer + 1} are not finite numbers: the model has "
                "diverged or its precision overflows; a lower learning rate or precision float32 helps"
            )
    stored = encode_states(block.states, layout.dtype)
    return StateBlock(block.ids, block.labels, block.losses, block.correct, block.logits, stored)


def encode_states(states: FloatArray, dtype: str) -> Array:
    """Round float32 states to the storage type, to nearest with ties to even.

    Returns:
        float32, float16, or uint16 holding the upper half of a float32 (bfloat16; numpy has no such type).

    Raises:
        UserError: A state does not fit into float16.
    """
    if dtype == "float32":
        return states
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = states.astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(
                f"store.dtype=float16 cannot hold a state of size {np.abs(states).max():.6g} (largest: 65504); "
                "bfloat16 and float32 can"
            )
        return half
    bits = np.ascontiguousarray(states, dtype=np.float32).view(np.uint32)
    # Adding half a unit in the last kept place rounds; the kept bit itself breaks ties to even.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    rounded = np.where(np.isnan(states), (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
    return rounded.astype(np.uint16)


def decode_states(stored: Array, out: FloatArray) -> None:
    """Write stored states (float32, float16 or bfloat16 bits) into ``out`` as float32, exactly.

    Float16 is converted by shifting too: numpy's own conversion is several times slower. Finite values only.
    """
    if stored.dtype == np.float32:
        out[...] = stored
    elif stored.dtype == np.uint16:
        bits = out.view(np.uint32)
        bits[...] = stored
        np.left_shift(bits, 16, out=bits)
    else:
        # Sign-extended and shifted, the float16's exponent and fraction lie where float32 has them, the exponent too
        # small by the difference of the biases, 112; its extended sign bits are masked out. Subnormals come out right.
        signed = out.view(np.int32)
        signed[...] = stored.view(np.int16)
        np.left_shift(signed, 13, out=signed)
        np.bitwise_and(signed, np.int32(-0x70002000), out=signed)
        np.multiply(out, np.float32(2.0**112), out=out)


def write_shard_file(path: Path, origin: ShardOrigin, block: StateBlock) -> int:
    """Write a checked block as one file; a reader sees all of it or nothing.

    Args:
        path: Final path; the file is written beside it and renamed.
        origin: What the shard belongs to.
        block: From :func:`checked_block`, states in the storage type.

    Returns:
        Size in bytes.

    Raises:
        UserError: No space on the device, or the folder cannot be written; nothing half written stays.
    """
    metadata = {_METADATA_KEY: json.dumps(asdict(origin)).encode()}
    columns = {
        "id": pa.array(block.ids),
        "label": pa.array(block.labels),
        "states": _tensor_column(block.states),
        "losses": _tensor_column(block.losses),
        "correct": _tensor_column(block.correct.view(np.uint8)),
    }
    if origin.layout.keeps_logits:
        columns["logits"] = _tensor_column(block.logits)
    batch = pa.RecordBatch.from_pydict(columns).replace_schema_metadata(metadata)
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            with _sink(temporary) as sink, pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            size = temporary.stat().st_size
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return size


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write below ``path`` into a message for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left on device: {path}") from error
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


@dataclass(frozen=True)
class MappedShard:
    """A shard in memory-mapped, read-only arrays; states in the storage type."""

    ids: IntArray
    labels: IntArray
    states: Array
    losses: FloatArray
    correct: BoolArray
    logits: FloatArray

    def state(self, row: int, layer: int) -> FloatArray:
        """State of one instance (row within the shard) at layer 1..L: a float32 copy, [H]."""
        stored = self.states[row, layer - 1]
        out: FloatArray = np.empty(stored.shape, dtype=np.float32)
        decode_states(stored, out)
        return out


def map_shard(path: Path, layout: Layout, data: Array | None = None) -> MappedShard:
    """Map a shard; nothing is read until it is touched.

    Args:
        path: The file.
        layout: Of the store.
        data: Bytes of the file, if they are in memory already (uint8, e.g. from Ray's object store): read in place.

    Raises:
        RunError: The file is missing, no Arrow file, or does not fit the layout.
    """
    try:
        source = pa.memory_map(str(path), "r") if data is None else pa.BufferReader(pa.py_buffer(data))
        reader = pa.ipc.open_file(source)
        batch = reader.get_batch(0)
        shard = MappedShard(
            ids=batch.column("id").to_numpy(zero_copy_only=True),
            labels=batch.column("label").to_numpy(zero_copy_only=True),
            states=batch.column("states").to_numpy_ndarray(),
            losses=batch.column("losses").to_numpy_ndarray(),
            correct=batch.column("correct").to_numpy_ndarray().view(np.bool_),
            logits=(
                batch.column("logits").to_numpy_ndarray()
                if layout.keeps_logits
                else np.empty((batch.num_rows, layout.num_layers, 0), dtype=np.float32)
            ),
        )
    except FileNotFoundError:
        raise RunError(f"{path}: this shard of the state store is missing") from None
    except (OSError, pa.ArrowException, KeyError, AttributeError, IndexError) as error:
        raise RunError(f"{path}: no shard of a state store, or damaged: {error}") from None
    shape = (layout.num_layers, layout.hidden_size)
    if shard.states.shape[1:] != shape or shard.states.dtype != _STORED[layout.dtype]:
        raise RunError(
            f"{path}: states {shard.states.shape[1:]} {shard.states.dtype}; the store's manifest says "
            f"{shape} {_STORED[layout.dtype]}"
        )
    return shard


def read_origin(path: Path) -> tuple[ShardOrigin, int]:
    """What a shard belongs to and its number of rows.

    Raises:
        RunError: The file is no shard of a state store, or damaged.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
        fields = json.loads(reader.schema.metadata[_METADATA_KEY])
        origin = ShardOrigin(fields["index"], Layout(**fields["layout"]), fields["instances"], fields["model"])
        return origin, reader.get_batch(0).num_rows
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, IndexError) as error:
        raise RunError(f"{path}: no shard of a state store, or damaged: {error}") from None


def stored_dtype(layout: Layout) -> np.dtype[Any]:
    """Numpy type of the stored states (bfloat16: uint16 bits)."""
    return _STORED[layout.dtype]


def _sink(path: Path) -> Any:
    return pa.OSFile(str(path), "wb")


def _tensor_column(values: Array) -> Any:
    """[n, ...] as a fixed_shape_tensor column over the same memory."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    size = int(np.prod(values.shape[1:]))
    storage = pa.FixedSizeListArray.from_arrays(flat, size)
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(flat.type, list(values.shape[1:])), storage)
