"""Stores mapped in parts: from files or from bytes, for any order of rows."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from rl_exit.envs import StateStore
from rl_exit.envs.manifest import MANIFEST
from rl_exit.errors import RunError


def test_shards_are_mapped_one_after_the_other(store: StateStore) -> None:
    bare = StateStore.parse((store.path / MANIFEST).read_text(), store.path)
    assert bare.mapped_shards == () and bare.num_instances == 20
    with pytest.raises(ValueError, match=r"shard 1 of .* is not mapped"):
        bare.states([8])
    one = bare.mapping({1: None})
    np.testing.assert_array_equal(one.states([8, 12]), store.states([8, 12]))
    two = one.mapping({0: np.fromfile(store.path / "shard-00000.arrow", dtype=np.uint8)})
    assert two.mapped_shards == (0, 1) and one.mapped_shards == (1,)
    rows = [3, 13, 0]
    for name, column in vars(store.block(rows)).items():
        np.testing.assert_array_equal(getattr(two.block(rows), name), column)
    assert pickle.loads(pickle.dumps(one)).mapped_shards == (1,)


def test_bytes_need_no_file(store: StateStore, tmp_path: Path) -> None:
    data = np.fromfile(store.path / "shard-00002.arrow", dtype=np.uint8)
    data.flags.writeable = False
    away = StateStore.parse((store.path / MANIFEST).read_text(), tmp_path / "absent")
    there = away.mapping({2: data})
    np.testing.assert_array_equal(there.states([14, 19]), store.states([14, 19]))
    mapped = there.locate(14)[0].states
    assert np.shares_memory(mapped, data)  # read in place
    with pytest.raises(RunError, match="missing"):
        away.mapping({0: None})
    with pytest.raises(RunError, match="no shard of a state store, or damaged"):
        away.mapping({2: data[:100]})


@pytest.mark.parametrize("rows", [[], [5], [0, 3, 6, 7, 13, 14, 19], [19, 0, 7, 7], [2, 2, 9]])
def test_gathering_equals_row_by_row(store: StateStore, rows: list[int]) -> None:
    wanted = np.array(rows, dtype=np.int64)
    losses, correct = store.outcomes(wanted)
    assert losses.shape == correct.shape == (len(rows), 4)
    for at, row in enumerate(rows):
        np.testing.assert_array_equal(losses[at], store.losses[row])
        np.testing.assert_array_equal(correct[at], store.correct[row])
        for layer in range(1, 5):
            shard, local = store.locate(row)
            np.testing.assert_array_equal(store.states(wanted)[at, layer - 1], shard.state(local, layer))


def test_shards_of_rows(store: StateStore) -> None:
    assert store.shards_of([6, 0, 19]) == [0, 2]
    assert store.shards_of([7]) == [1]
    with pytest.raises(ValueError, match="rows"):
        store.shards_of([20])
