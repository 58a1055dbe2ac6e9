from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rl_exit.envs import Layout, StateBlock, StateStore, discard_partial, finish, write_shard, written_shards
from rl_exit.envs import shards as shards_module
from rl_exit.errors import RunError, UserError

LAYOUT = Layout(4, 8, 3)


def write(path: Path, index: int, block: StateBlock, size: int = 7, **settings: str) -> None:
    part = slice(index * size, (index + 1) * size)
    write_shard(path, index, **{name: column[part] for name, column in vars(block).items()}, **settings)


def test_shards_written_apart_and_in_any_order_are_the_store(tmp_path: Path, store: StateStore, block) -> None:
    path = tmp_path / "apart"
    for index in (2, 0, 1, 0):  # one of them twice: a repeated piece of work does no harm
        write(path, index, block, instances="i", model="m")
        assert not path.exists()
    assert written_shards(path) == [0, 1, 2]
    finish(path, 3, layout=LAYOUT, instances="i", model="m")
    apart = StateStore.open(path)
    assert apart.shards == store.shards
    assert (path / "store.json").read_text() == (store.path / "store.json").read_text()
    assert np.array_equal(apart.states(np.arange(20)), block.states)
    assert written_shards(path) == []


def test_missing_and_surplus_shards(tmp_path: Path, block) -> None:
    write(tmp_path / "s", 0, block)
    write(tmp_path / "s", 2, block)
    with pytest.raises(RunError, match=r"3 shards expected; missing: \[1\], not expected: \[\]"):
        finish(tmp_path / "s", 3, layout=LAYOUT)
    with pytest.raises(RunError, match=r"1 shards expected; missing: \[\], not expected: \[2\]"):
        finish(tmp_path / "s", 1, layout=LAYOUT)
    assert not (tmp_path / "s").exists()
    write(tmp_path / "s", 1, block)
    finish(tmp_path / "s", 3, layout=LAYOUT)


@pytest.mark.parametrize("other", [{"model": "old"}, {"instances": "old"}, {"dtype": "bfloat16"}])
def test_shards_of_another_build_are_refused(tmp_path: Path, block, other: dict[str, str]) -> None:
    write(tmp_path / "s", 0, block, model="new", instances="new")
    write(tmp_path / "s", 1, block, **({"model": "new", "instances": "new"} | other))
    with pytest.raises(RunError, match=r"shard-00001.arrow: written by another build"):
        finish(tmp_path / "s", 2, layout=LAYOUT, model="new", instances="new")


def test_a_damaged_shard_is_refused(tmp_path: Path, block) -> None:
    write(tmp_path / "s", 0, block)
    (tmp_path / ".s.partial" / "shard-00000.arrow").write_bytes(b"ARROW1")
    with pytest.raises(RunError, match="damaged"):
        finish(tmp_path / "s", 1, layout=LAYOUT)


def test_leftovers_of_killed_writers_do_not_enter_the_store(tmp_path: Path, block) -> None:
    write(tmp_path / "s", 0, block)
    (tmp_path / ".s.partial" / ".shard-00000.arrow.abc123").write_bytes(b"half")
    finish(tmp_path / "s", 1, layout=LAYOUT)
    assert sorted(entry.name for entry in (tmp_path / "s").iterdir()) == ["shard-00000.arrow", "store.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_costs_the_shard_but_not_the_others(tmp_path: Path, block, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "s", 0, block)
    monkeypatch.setattr(shards_module, "_sink", lambda path: pa.OSFile("/dev/full", "wb"))
    with pytest.raises(UserError, match="no space left on device"):
        write(tmp_path / "s", 1, block)
    assert [entry.name for entry in (tmp_path / ".s.partial").iterdir()] == ["shard-00000.arrow"]
    discard_partial(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_shard_is_refused(tmp_path: Path, block) -> None:
    with pytest.raises(ValueError, match="B >= 1"):
        write(tmp_path / "s", 9, block)
