from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from rl_exit.envs.shards import Layout, decode_states, encode_states
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import RunError, UserError


def decoded(stored: np.ndarray) -> np.ndarray:
    out = np.full(stored.shape, np.nan, dtype=np.float32)
    decode_states(stored, out)
    return out


def awkward_values() -> np.ndarray:
    """Ties, subnormals, both zeros, the largest and smallest numbers, and many random bit patterns."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    ties = ((np.arange(2**16, dtype=np.uint32) << 16) | 0x8000).view(np.float32)
    special = np.array([0.0, -0.0, 1.0, -1.0, 3.4e38, -3.4e38, 1e-45, -1e-45, 1.1754944e-38], dtype=np.float32)
    values = np.concatenate([patterns, ties, special])
    return values[np.isfinite(values)]


def test_bfloat16_rounds_to_nearest_even_as_torch_does() -> None:
    values = awkward_values()
    bits = encode_states(values, "bfloat16")
    assert bits.dtype == np.uint16
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    assert np.array_equal(bits, expected.view(torch.uint16).numpy())
    assert np.array_equal(decoded(bits), expected.float().numpy())
    cut_off = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert not np.array_equal(cut_off, bits)


def test_bfloat16_keeps_nan_a_nan() -> None:
    nan = np.array([np.nan, -np.nan], dtype=np.float32)
    nan = np.concatenate([nan, np.array([0x7F800001, 0xFFFFFFFF], dtype=np.uint32).view(np.float32)])
    assert np.isnan(decoded(encode_states(nan, "bfloat16"))).all()


def test_every_finite_float16_is_read_exactly() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    assert len(every) == 2 * 31 * 1024
    result, expected = decoded(every), every.astype(np.float32)
    assert np.array_equal(result.view(np.uint32), expected.view(np.uint32))  # signs of zero too


def test_float16_rounds_as_numpy_does_and_refuses_overflow() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    assert np.array_equal(decoded(encode_states(values, "float16")), values.astype(np.float16).astype(np.float32))
    with pytest.raises(UserError, match=r"float16 cannot hold a state of size 70000 .*bfloat16 and float32 can"):
        encode_states(np.array([1.0, -70000.0], dtype=np.float32), "float16")


def test_a_shard_is_one_record_batch_of_tensor_columns(store: StateStore) -> None:
    reader = pa.ipc.open_file(str(store.path / "shard-00001.arrow"))
    assert reader.num_record_batches == 1
    kinds = {field.name: str(field.type) for field in reader.schema}
    assert list(kinds) == ["id", "label", "states", "losses", "correct", "logits"]
    assert "fixed_shape_tensor[value_type=float, shape=[4,8]" in kinds["states"]
    assert "fixed_shape_tensor[value_type=uint8, shape=[4]" in kinds["correct"]
    assert "fixed_shape_tensor[value_type=float, shape=[4,3]" in kinds["logits"]


@pytest.mark.parametrize("sizes", [(1, 8, 3), (4, 0, 3), (4, 8, 1)])
def test_layout_refuses_sizes_that_make_no_sense(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="accepted: at least 2, 1 and 2"):
        Layout(*sizes)


def test_layout_refuses_an_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="'int8' is unknown; accepted: float32, float16, bfloat16"):
        Layout(4, 8, 3, "int8")


def test_a_damaged_file_of_the_right_size_is_refused(store: StateStore) -> None:
    file = store.path / "shard-00000.arrow"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(RunError, match=r"shard-00000.arrow: no shard of a state store, or damaged"):
        StateStore.open(store.path)


def test_a_shard_of_another_dtype_is_refused(store: StateStore, make_store, block) -> None:
    other: Path = make_store(block, dtype="bfloat16").path
    (other / "shard-00000.arrow").rename(store.path / "shard-00000.arrow")
    manifest = (store.path / "store.json").read_text()
    size = (store.path / "shard-00000.arrow").stat().st_size
    old = store.shards[0].num_bytes
    (store.path / "store.json").write_text(manifest.replace(f'"bytes": {old}', f'"bytes": {size}', 1))
    with pytest.raises(RunError, match="the store's manifest says"):
        StateStore.open(store.path)
