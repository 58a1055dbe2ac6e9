from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rl_exit.envs import StateStore, StateStoreWriter
from rl_exit.envs import shards as shards_module
from rl_exit.errors import RunError, UserError

COLUMNS = ("ids", "labels", "losses", "correct", "logits")


def partial_folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@pytest.mark.parametrize("shard_size", [1, 7, 20, 50])
@pytest.mark.parametrize("step", [1, 6, 20])
def test_what_is_written_is_read(make_store, block, shard_size: int, step: int) -> None:
    store = make_store(block, shard_size=shard_size, step=step)
    assert (store.num_instances, store.num_layers, store.hidden_size, store.num_classes) == (20, 4, 8, 3)
    assert len(store.shards) == -(-20 // shard_size)
    assert np.array_equal(store.rows, np.arange(20))
    for name in COLUMNS:
        assert np.array_equal(getattr(store, name), getattr(block, name)), name
    rows = np.random.default_rng(1).integers(0, 20, 33)  # any order, with repeats
    read = store.block(rows)
    for name in (*COLUMNS, "states"):
        assert np.array_equal(getattr(read, name), getattr(block, name)[rows]), name
        assert getattr(read, name).dtype == getattr(block, name).dtype
    layers = np.random.default_rng(2).integers(1, 5, 33)
    assert np.array_equal(store.states_at(rows, layers), block.states[rows, layers - 1])
    assert np.array_equal(store.memorized(), read_memorized(block.correct))
    assert np.array_equal(read.memorized(), read_memorized(block.correct)[rows])


def read_memorized(correct: np.ndarray) -> np.ndarray:
    count, layers = correct.shape
    return np.array([next((m for m in range(1, layers) if correct[i, m - 1 :].all()), layers) for i in range(count)])


@pytest.mark.parametrize("shard_size", [7, 50])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_storage_rounds_the_states_and_nothing_else(make_store, block, dtype: str, shard_size: int) -> None:
    import torch

    store = make_store(block, dtype=dtype, shard_size=shard_size)
    rows = np.array([3, 19, 3, 8, 0])
    expected = torch.from_numpy(block.states).to(getattr(torch, dtype)).float().numpy()
    assert np.array_equal(store.states(rows), expected[rows])
    assert np.array_equal(store.states_at(rows, [1, 2, 3, 4, 1]), expected[rows, [0, 1, 2, 3, 0]])
    assert not np.array_equal(expected, block.states)
    assert np.array_equal(store.losses, block.losses)


def test_a_gathered_block_is_a_copy_and_the_map_is_read_only(make_store, block) -> None:
    store = make_store(block, shard_size=50)
    states = store.states([2])
    states[:] = 0
    assert np.array_equal(store.states([2])[0], block.states[2])
    with pytest.raises(ValueError, match="read-only"):
        store.losses[0, 0] = 1.0


def test_some_shards_only(store: StateStore, block) -> None:
    (store.path / store.shards[1].file).unlink()  # a node that has only its own shards
    part = StateStore.open(store.path, shards=[2, 0])
    assert part.num_instances == 20
    mine = np.r_[0:7, 14:20]
    assert np.array_equal(part.rows, mine)
    assert np.array_equal(part.ids, block.ids[mine])
    assert np.array_equal(part.memorized(), read_memorized(block.correct)[mine])
    assert np.array_equal(part.states([15, 2]), block.states[[15, 2]])
    with pytest.raises(ValueError, match=r"shard 1 of .* is not mapped; mapped: \[0, 2\]"):
        part.states([8])
    with pytest.raises(RunError, match=r"shard-00001.arrow: this shard of the state store is missing"):
        StateStore.open(store.path)
    again = pickle.loads(pickle.dumps(part))
    assert again.mapped_shards == (0, 2)


@pytest.mark.parametrize("shards", [[3], [-1], []])
def test_shard_numbers_are_checked(store: StateStore, shards: list[int]) -> None:
    with pytest.raises(ValueError, match=r"accepted: 0..2"):
        StateStore.open(store.path, shards=shards)


def test_a_store_travels_as_its_path(store: StateStore, block) -> None:
    data = pickle.dumps(store)
    assert len(data) < 500
    for other in (pickle.loads(data), copy.deepcopy(store)):
        assert np.array_equal(other.states([5]), block.states[[5]])


def test_rows_that_the_manifest_does_not_tell(store: StateStore) -> None:
    file = store.path / "store.json"
    tree = json.loads(file.read_text())
    tree["shards"][0]["rows"], tree["shards"][2]["rows"] = 6, 7
    file.write_text(json.dumps(tree))
    with pytest.raises(RunError, match="7 rows; the manifest says 6"):
        StateStore.open(store.path)


@pytest.mark.parametrize("rows", [[20], [-1], [[1]], [1.0]])
def test_rows_are_checked(store: StateStore, rows: list) -> None:
    for read in (store.states, store.records, store.block):
        with pytest.raises(ValueError, match="rows"):
            read(rows)


@pytest.mark.parametrize("layers", [[0], [5], [1, 1]])
def test_layers_are_checked(store: StateStore, layers: list) -> None:
    with pytest.raises(ValueError, match=r"layers must be \[1\] within 1..4"):
        store.states_at([0], layers)


def test_no_rows_give_no_rows(store: StateStore) -> None:
    assert store.states([]).shape == (0, 4, 8)
    assert store.block(np.empty(0, dtype=np.int64)).logits.shape == (0, 4, 3)


def test_the_manifest(store: StateStore) -> None:
    tree = json.loads((store.path / "store.json").read_text())
    assert tree["num_instances"] == 20 and [s["rows"] for s in tree["shards"]] == [7, 7, 6]
    assert [s["bytes"] for s in tree["shards"]] == [(store.path / s["file"]).stat().st_size for s in tree["shards"]]
    assert (store.instances_fingerprint, store.model_fingerprint) == ("i", "m")
    assert (tree["dtype"], tree["version"]) == ("float32", 1)


# --- errors on opening


def test_no_such_store(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere: no such state store"):
        StateStore.open(tmp_path / "nowhere")


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no state store \('store.json' is missing\)"):
        StateStore.open(tmp_path)


def test_a_truncated_shard(store: StateStore) -> None:
    file = store.path / "shard-00002.arrow"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(RunError, match=r"shard-00002.arrow: \d+ bytes of \d+: this shard is truncated or damaged"):
        StateStore.open(store.path)
    assert StateStore.open(store.path, shards=[0, 1]).states([0]).shape == (1, 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"state store of version 2; readable here: 1"),
        ({"format": "other"}, "not the manifest of a state store"),
        ({"shards": []}, "damaged manifest"),
        ({"num_instances": 21}, "damaged manifest: rows and files"),
        ({"dtype": "int8"}, "damaged manifest.*int8"),
        ({"num_layers": "four"}, "damaged manifest"),
    ],
)
def test_a_manifest_that_does_not_fit(store: StateStore, change: dict, message: str) -> None:
    file = store.path / "store.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(RunError, match=message):
        StateStore.open(store.path)


def test_a_manifest_that_is_no_json(store: StateStore) -> None:
    (store.path / "store.json").write_text('{"version": 1')
    with pytest.raises(RunError, match=r"store.json: cannot be read"):
        StateStore.open(store.path)


def test_a_manifest_does_not_lead_out_of_its_folder(store: StateStore) -> None:
    file = store.path / "store.json"
    file.write_text(file.read_text().replace('"shard-00000.arrow"', '"../shard-00000.arrow"'))
    with pytest.raises(RunError, match="damaged manifest"):
        StateStore.open(store.path)


# --- errors on writing


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("labels", (2,)),
        ("states", (3, 4, 7)),
        ("states", (3, 32)),
        ("losses", (3, 3)),
        ("logits", (3, 4)),
        ("ids", (3, 1)),
    ],
)
def test_wrong_shapes(tmp_path: Path, make_block, name: str, shape: tuple[int, ...]) -> None:
    columns = vars(make_block(3)) | {name: np.zeros(shape)}
    with pytest.raises(ValueError, match=rf"state store: .*{name} .*given; accepted: "):
        StateStoreWriter(tmp_path / "s", 4, 8, 3).append(**columns)


def test_labels_outside_the_classes(tmp_path: Path, make_block) -> None:
    columns = vars(make_block(3)) | {"labels": np.array([0, 3, 1])}
    with pytest.raises(ValueError, match=r"labels 0..3; accepted: 0..2"):
        StateStoreWriter(tmp_path / "s", 4, 8, 3).append(**columns)


@pytest.mark.parametrize("name", ["states", "losses", "logits"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path: Path, make_block, name: str, value: float) -> None:
    block = make_block(3)
    getattr(block, name)[1, 2] = value
    with pytest.raises(UserError, match=rf"{name} of instance {block.ids[1]} at layer 3 are not finite"):
        StateStoreWriter(tmp_path / "s", 4, 8, 3).append(**vars(block))


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="without instances"):
        StateStoreWriter(tmp_path / "s", 4, 8, 3).close()


def test_something_else_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").write_text("mine")
    with pytest.raises(RunError, match="in the way of a state store, and no state store itself"):
        StateStoreWriter(tmp_path / "notes", 4, 8, 3)
    assert (tmp_path / "notes" / "precious.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path: Path, block) -> None:
    (tmp_path / "file").write_text("")
    writer = StateStoreWriter(tmp_path / "file" / "s", 4, 8, 3)
    writer.append(**vars(block))
    with pytest.raises(RunError, match="cannot be written: Not a directory"):
        writer.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_on_the_device(tmp_path: Path, block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_sink", lambda path: pa.OSFile("/dev/full", "wb"))
    writer = StateStoreWriter(tmp_path / "s", 4, 8, 3, shard_size=8)
    with pytest.raises(UserError, match=r"^no space left on device: .*shard-00000.arrow"):
        writer.append(**vars(block))
    assert list(tmp_path.iterdir()) == []


def test_no_space_for_the_manifest(tmp_path: Path, block, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = StateStoreWriter(tmp_path / "s", 4, 8, 3)
    writer.append(**vars(block))
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"^no space left on device: .*s$"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


# --- all or nothing


def test_nothing_is_at_the_path_before_close(tmp_path: Path, block) -> None:
    writer = StateStoreWriter(tmp_path / "s", 4, 8, 3, shard_size=5)
    writer.append(**vars(block))
    assert not (tmp_path / "s").exists() and partial_folder(tmp_path / "s").is_dir()
    writer.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_an_exception_discards_and_a_clean_end_closes(tmp_path: Path, block) -> None:
    with pytest.raises(KeyError), StateStoreWriter(tmp_path / "s", 4, 8, 3, shard_size=5) as writer:
        writer.append(**vars(block))
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with StateStoreWriter(tmp_path / "s", 4, 8, 3) as writer:
        writer.append(**vars(block))
    assert StateStore.open(tmp_path / "s").num_instances == 20
    with pytest.raises(ValueError, match="closed"):
        writer.append(**vars(block))


def test_an_older_store_stays_until_the_new_one_is_complete(store: StateStore, block, make_block) -> None:
    new = make_block(9, seed=5)
    writer = StateStoreWriter(store.path, 4, 8, 3, shard_size=4)
    writer.append(**vars(new))
    assert np.array_equal(StateStore.open(store.path).ids, block.ids)
    replaced = writer.close()
    assert np.array_equal(replaced.ids, new.ids) and len(replaced.shards) == 3
    assert [entry.name for entry in store.path.parent.iterdir()] == ["store"]
    assert np.array_equal(store.states(np.arange(20)), block.states)  # what was mapped stays what it was


def test_a_killed_build_leaves_no_store_and_is_no_obstacle(tmp_path: Path, block) -> None:
    code = (
        "import os, sys, numpy as np\n"
        "from rl_exit.envs import StateStoreWriter\n"
        "w = StateStoreWriter(sys.argv[1], 4, 8, 3, shard_size=2)\n"
        "z = np.zeros\n"
        "w.append(np.arange(5), z(5), z((5, 4, 8)), z((5, 4)), z((5, 4)), z((5, 4, 3)))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "s"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9
    assert not path.exists() and len(list(partial_folder(path).iterdir())) == 2
    with StateStoreWriter(path, 4, 8, 3, shard_size=50) as writer:
        writer.append(**vars(block))
    assert np.array_equal(StateStore.open(path).ids, block.ids)
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
