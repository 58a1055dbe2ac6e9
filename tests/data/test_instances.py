from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from rl_exit.data.instances import Instances
from rl_exit.errors import DataError, UserError


def make(count: int = 20, segments: bool = True, seed: int = 0) -> Instances:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, size=count)
    total = int(lengths.sum())
    return Instances(
        ids=(np.arange(count) * 3 + 1).astype(np.int64),
        labels=rng.integers(0, 4, size=count).astype(np.int64),
        tokens=rng.integers(1, 30000, size=total).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_types=rng.integers(0, 2, size=total).astype(np.int8) if segments else None,
        pad_token_id=7,
    )


def slow_batch(instances: Instances, rows: list[int]) -> dict[str, list[list[int]]]:
    """The slow twin: one row after the other."""
    longest = max(int(instances.lengths[row]) for row in rows)
    out: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    if instances.token_types is not None:
        out["token_type_ids"] = []
    for row in rows:
        part = slice(instances.offsets[row], instances.offsets[row + 1])
        tokens = instances.tokens[part].tolist()
        gap = longest - len(tokens)
        out["input_ids"].append(tokens + [instances.pad_token_id] * gap)
        out["attention_mask"].append([1] * len(tokens) + [0] * gap)
        if instances.token_types is not None:
            out["token_type_ids"].append(instances.token_types[part].tolist() + [0] * gap)
    return out


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("rows", [[0], [5, 2, 2, 19], list(range(20))])
def test_batch_equals_row_by_row_padding(rows: list[int], segments: bool) -> None:
    instances = make(segments=segments)
    batch = instances.batch(np.array(rows))
    expected = slow_batch(instances, rows)
    assert {key: value.tolist() for key, value in batch.items()} == expected
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_batch_refuses_no_rows_and_rows_outside() -> None:
    instances = make()
    with pytest.raises(ValueError):
        instances.batch([])
    for row in (-1, 20):
        with pytest.raises(IndexError):
            instances.batch([row])
        with pytest.raises(IndexError):
            instances.take([row])


@pytest.mark.parametrize("segments", [True, False])
def test_take_keeps_ids_and_content(segments: bool) -> None:
    instances = make(segments=segments)
    rows = [7, 0, 0, 13]
    taken = instances.take(rows)
    assert taken.ids.tolist() == instances.ids[rows].tolist()
    assert taken.labels.tolist() == instances.labels[rows].tolist()
    for key, value in instances.batch(rows).items():
        assert torch.equal(taken.batch(range(4))[key], value)
    assert len(instances.take([])) == 0


@pytest.mark.parametrize("segments", [True, False])
def test_saved_file_maps_back_equal_and_readable_by_others(tmp_path: Path, segments: bool) -> None:
    instances = make(segments=segments)
    path = tmp_path / "new" / "train.arrow"
    instances.save(path)
    again = Instances.open(path)
    assert again.fingerprint == instances.fingerprint
    assert again.pad_token_id == 7
    assert (again.token_types is None) != segments
    assert torch.equal(again.batch([3, 4])["input_ids"], instances.batch([3, 4])["input_ids"])
    assert [entry.name for entry in path.parent.iterdir()] == ["train.arrow"]
    table = pa.ipc.open_file(path).read_all()
    assert table["tokens"][3].as_py() == instances.tokens[instances.offsets[3] : instances.offsets[4]].tolist()
    with pytest.raises(ValueError, match="read-only"):
        again.tokens[0] = 1


def test_empty_instances_survive_the_file(tmp_path: Path) -> None:
    make().take([]).save(tmp_path / "none.arrow")
    assert len(Instances.open(tmp_path / "none.arrow")) == 0


def test_fingerprint_tells_every_change() -> None:
    base = make()
    assert base.fingerprint == make().fingerprint
    assert len(base.fingerprint) == 16
    changed = [
        replace(base, ids=base.ids + 1),
        replace(base, labels=np.roll(base.labels, 1)),
        replace(base, tokens=np.roll(base.tokens, 1)),
        replace(base, token_types=None),
        replace(base, pad_token_id=8),
        base.take(range(19)),
        make(segments=False),
    ]
    assert base.fingerprint not in {other.fingerprint for other in changed}


def test_inconsistent_arrays_are_refused() -> None:
    base = make()
    for wrong in (
        {"labels": base.labels[:-1]},
        {"offsets": base.offsets[:-1]},
        {"offsets": base.offsets.astype(np.int32)},
        {"offsets": base.offsets + 1},
        {"tokens": base.tokens.astype(np.int64)},
        {"token_types": base.token_types[:-1]},  # type: ignore[index]
    ):
        with pytest.raises(ValueError):
            replace(base, **wrong)  # type: ignore[arg-type]


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        Instances.open(tmp_path / "absent.arrow")
    whole = tmp_path / "whole.arrow"
    make().save(whole)
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(whole.read_bytes()[:200])
    empty = tmp_path / "empty.arrow"
    empty.touch()
    for broken in (cut, empty):
        with pytest.raises(DataError, match=f"{broken.name}: cannot be read"):
            Instances.open(broken)
    other = tmp_path / "other.arrow"
    table = pa.table({"a": [1]})
    with pa.ipc.new_file(str(other), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="not a file of tokenised instances"):
        Instances.open(other)


def test_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.arrow"
    make().save(path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa.ipc, "new_file", full)
    with pytest.raises(UserError, match="no space left"):
        make(seed=1).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.arrow"]
