from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from rl_exit.data.batching import count_batches, length_sorted_batches, shuffled_batches

LENGTHS = np.random.default_rng(0).integers(1, 60, size=103)


def batches(count: int, size: int, **settings: object) -> list[list[int]]:
    given = {"seed": 1, "epoch": 0, **settings}
    return [rows.tolist() for rows in shuffled_batches(count, size, **given)]  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_one_worker_sees_every_row_once(lengths: np.ndarray | None) -> None:
    found = batches(103, 10, lengths=lengths)
    assert len(found) == count_batches(103, 10) == 11
    assert sorted(chain.from_iterable(found)) == list(range(103))
    assert sorted(map(len, found)) == [3] + [10] * 10


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_order_is_given_by_seed_and_epoch_alone(lengths: np.ndarray | None) -> None:
    first = batches(103, 10, lengths=lengths)
    assert batches(103, 10, lengths=lengths) == first
    assert batches(103, 10, lengths=lengths, epoch=1) != first
    assert batches(103, 10, lengths=lengths, seed=2) != first


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("world", [2, 3])
def test_workers_get_equally_many_full_disjoint_batches(world: int, lengths: np.ndarray | None) -> None:
    shares = [batches(103, 8, rank=rank, world=world, lengths=lengths) for rank in range(world)]
    assert {len(share) for share in shares} == {count_batches(103, 8, world)} == {103 // (8 * world)}
    assert {len(rows) for share in shares for rows in share} == {8}
    together = [row for share in shares for rows in share for row in rows]
    assert len(set(together)) == len(together)


@pytest.mark.parametrize("lengths", [None, LENGTHS[:96]])
def test_workers_together_are_one_process_with_a_larger_batch(lengths: np.ndarray | None) -> None:
    alone = batches(96, 16, lengths=lengths)
    shares = [batches(96, 8, rank=rank, world=2, lengths=lengths) for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == alone


def test_rows_left_out_are_not_chosen_by_length() -> None:
    lengths = np.arange(103)
    left = []
    for epoch in range(40):
        steps = (batches(103, 8, epoch=epoch, rank=rank, world=2, lengths=lengths) for rank in range(2))
        seen = {row for share in steps for rows in share for row in rows}
        left.append(np.mean(list(set(range(103)) - seen)))
    assert 35 < np.mean(left) < 67  # the longest rows alone would give 99


def test_grouping_by_length_saves_padding() -> None:
    lengths = np.random.default_rng(3).integers(1, 100, size=4000)

    def padded(found: list[list[int]]) -> int:
        return sum(int(lengths[rows].max()) * len(rows) for rows in found)

    assert padded(batches(4000, 16, lengths=lengths)) < 0.65 * padded(batches(4000, 16))


def test_fewer_rows_than_a_step_still_make_one_update() -> None:
    shares = [batches(7, 32, rank=rank, world=3) for rank in range(3)]
    assert [[len(rows) for rows in share] for share in shares] == [[2], [2], [2]]


@pytest.mark.parametrize(
    "settings", [{"count": 0}, {"size": 0}, {"rank": 2, "world": 2}, {"count": 2, "world": 3}, {"rank": -1}]
)
def test_impossible_requests_are_refused(settings: dict[str, int]) -> None:
    given = {"count": 10, "size": 2, **settings}
    with pytest.raises(ValueError):
        batches(given.pop("count"), given.pop("size"), **given)


def test_length_sorted_batches_cover_all_rows_longest_first() -> None:
    lengths = np.array([3, 9, 1, 9, 5])
    found = length_sorted_batches(lengths, 2)
    assert [rows.tolist() for rows in found] == [[1, 3], [4, 0], [2]]
    assert found[0].dtype == np.int64
    assert length_sorted_batches([], 2) == []
    with pytest.raises(ValueError):
        length_sorted_batches(lengths, 0)
