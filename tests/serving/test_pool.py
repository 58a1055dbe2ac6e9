"""The scheduler of the depth pool, with a clock of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_exit.errors import ConfigError
from rl_exit.serving.pool import PoolRules, RequestPool, Row


def rows(*lengths: int, layer: int = 1, arrived: float = 0.0) -> list[Row[int]]:
    return [Row(number, length, arrived, layer) for number, length in enumerate(lengths)]


def lengths_of(taken: list[Row[int]]) -> list[int]:
    return [row.length for row in taken]


def test_nothing_waits_nothing_runs() -> None:
    pool: RequestPool[int] = RequestPool(3)
    assert pool.take(0.0) == [] and len(pool) == 0 and pool.waiting() == [0, 0, 0]


def test_an_overdue_row_goes_first_and_the_earliest_arrival_among_the_overdue() -> None:
    pool: RequestPool[int] = RequestPool(4, PoolRules(batch_size=2, deadline=1.0))
    pool.add(rows(8, 8, layer=4, arrived=5.0), 10.0)  # a full batch, the deepest
    pool.add(rows(8, layer=2, arrived=3.0), 9.5)
    pool.add(rows(8, layer=3, arrived=4.0), 9.4)
    assert pool.take(10.2)[0].layer == 4, "nothing is overdue: the full batch"
    pool.add(rows(8, 8, layer=4, arrived=5.0), 10.2)
    assert pool.take(10.5)[0].layer == 2, "layers 2 and 3 are overdue; layer 2's row arrived before layer 3's"
    assert pool.take(10.5)[0].layer == 3
    assert pool.take(10.5)[0].layer == 4


def test_full_batches_run_deepest_first_and_others_catch_up() -> None:
    pool: RequestPool[int] = RequestPool(4, PoolRules(batch_size=2, deadline=math.inf))
    for layer in (1, 2, 3):
        pool.add(rows(*[8] * (1 if layer == 3 else 2), layer=layer), 0.0)
    assert [pool.take(0.0)[0].layer for _ in range(2)] == [2, 1], "full: 2, then 1; layer 3 has one row only"
    pool.add(rows(8, layer=1), 0.0)
    assert [pool.take(0.0)[0].layer for _ in range(2)] == [1, 3], "none is full: the shallowest catches up"


def test_a_row_joins_those_that_wait_at_its_layer() -> None:
    pool: RequestPool[int] = RequestPool(3, PoolRules(deadline=math.inf))
    pool.add(rows(8, layer=2), 0.0)
    pool.add(rows(9, layer=1), 1.0)
    [late] = pool.take(1.0)
    late.layer = 2
    pool.add([late], 1.1)
    assert lengths_of(pool.take(1.2)) == [9, 8]


@pytest.mark.parametrize(
    ("overhead", "expected"),
    [
        (0.0, [10]),  # no padding at all
        (2.0, [10, 8]),
        (4.0, [13, 10, 8]),  # 13 would pad two rows by 3: too dear, so it comes only if nothing else is there
        (math.inf, [60, 13, 10, 8, 3]),
    ],
)
def test_rows_are_padded_only_where_it_pays(overhead: float, expected: list[int]) -> None:
    pool: RequestPool[int] = RequestPool(1, PoolRules(overhead=overhead))
    pool.add(rows(10), 0.0)
    pool.add(rows(3, 8, 13, 60), 0.0)
    taken = lengths_of(pool.take(0.0))
    if overhead == 4.0:
        assert taken == [10, 8]
    else:
        assert taken == expected


def test_limits_of_a_step() -> None:
    pool: RequestPool[int] = RequestPool(1, PoolRules(batch_size=3, overhead=math.inf))
    pool.add(rows(5, 5, 5, 5, 5), 0.0)
    assert [len(pool.take(0.0)) for _ in range(3)] == [3, 2, 0]
    pool = RequestPool(1, PoolRules(batch_tokens=20, overhead=math.inf))
    pool.add(rows(30, 10, 9, 8), 0.0)
    assert [lengths_of(pool.take(0.0)) for _ in range(3)] == [[30], [10, 9], [8]], "a long text runs all the same"


def test_rows_that_need_no_padding_come_along_by_age() -> None:
    pool: RequestPool[int] = RequestPool(1, PoolRules(overhead=0.0, packed_tokens=30, batch_size=4))
    pool.add(rows(10, 3, 16, 10), 0.0)
    assert lengths_of(pool.take(0.0)) == [16, 10, 3], "as many of the oldest as fit, whatever their lengths"
    assert lengths_of(pool.take(0.0)) == [10]
    pool.add(rows(40, 1), 0.0)
    assert [lengths_of(pool.take(0.0)) for _ in range(2)] == [[40], [1]], "a long text runs all the same"
    pool.add(rows(1, 1, 1, 1, 1), 0.0)
    assert [len(pool.take(0.0)) for _ in range(2)] == [4, 1], "never more rows than a batch"


def test_what_attention_pads_is_bounded_too() -> None:
    pool: RequestPool[int] = RequestPool(1, PoolRules(overhead=0.0, packed_tokens=100, packed_area=60))
    pool.add(rows(1, 20, 1, 1, 1), 0.0)
    assert [lengths_of(pool.take(0.0)) for _ in range(2)] == [[20, 1, 1], [1, 1]]
    pool.add(rows(20, *(1,) * 500), 0.0)  # many: looked for by length
    assert lengths_of(pool.take(0.0)) == [20, 1, 1]


def test_where_many_wait_rows_of_one_length_are_found() -> None:
    pool: RequestPool[int] = RequestPool(1, PoolRules(overhead=0.0, packed_tokens=30))
    pool.add(rows(10, *(20, 10) * 5), 0.0)  # 160 tokens, more than four steps' worth
    assert lengths_of(pool.take(0.0)) == [10] * 6
    assert lengths_of(pool.take(0.0)) == [20], "of the rest few wait, and two are too many"
    pool.add(rows(10, *(20,) * 6, 4), 0.0)  # 10 is not the oldest
    assert lengths_of(pool.take(0.0)) == [20] * 10
    pool.add(rows(12, 11, *(50,) * 3), 0.0)
    assert lengths_of(pool.take(0.0)) == [11, 10, 4], "uneven rows within what runs without padding"


@pytest.mark.parametrize(
    "words",
    [
        {"batch_size": 0},
        {"packed_tokens": -1},
        {"packed_area": -1.0},
        {"batch_tokens": 0},
        {"deadline": -1.0},
        {"overhead": -1.0},
        {"deadline": float("nan")},
    ],
)
def test_rules_out_of_range_are_refused(words: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="accepted"):
        PoolRules(**words)  # type: ignore[arg-type]


def test_layers_that_do_not_exist_are_refused() -> None:
    pool: RequestPool[int] = RequestPool(2)
    for layer in (0, 3):
        with pytest.raises(ValueError, match=r"1\.\.2"):
            pool.add(rows(4, layer=layer), 0.0)


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=60),
    batch_size=st.integers(1, 8),
    deadline=st.sampled_from([0.0, 2.0, 1e9]),
    overhead=st.sampled_from([0.0, 8.0, math.inf]),
    packed=st.sampled_from([0, 16, 64]),
    area=st.sampled_from([30, math.inf]),
)
def test_every_row_runs_every_layer_once_and_leaves(
    arrivals: list[tuple[int, int, int]], batch_size: int, deadline: float, overhead: float, packed: int, area: float
) -> None:
    rules = PoolRules(batch_size, deadline, overhead, batch_tokens=64, packed_tokens=packed, packed_area=area)
    pool: RequestPool[int] = RequestPool(4, rules)
    seen: dict[int, list[int]] = {number: [] for number in range(len(arrivals))}
    for now in range(30 + 1 + 4 * len(arrivals)):
        pool.add([Row(n, length, now) for n, (at, length, _) in enumerate(arrivals) if at == now], now)
        taken = pool.take(now)
        assert len({row.layer for row in taken}) <= 1 and len(taken) <= batch_size
        if len(taken) > 1:
            cells = len(taken) * taken[0].length
            assert cells <= rules.batch_tokens or (sum(lengths_of(taken)) <= packed and cells <= area)
        assert bool(taken) or not len(pool), "the model never idles beside waiting rows"
        for row in taken:
            seen[row.payload].append(row.layer)
        staying = [row for row in taken if row.layer < arrivals[row.payload][2]]
        for row in staying:
            row.layer += 1
        pool.add(staying, now)
    assert not len(pool)
    assert seen == {number: list(range(1, leave + 1)) for number, (_, _, leave) in enumerate(arrivals)}


def test_no_row_starves_under_a_flood_of_better_company() -> None:
    """A long text among short ones that always fill a batch: it must run within bounded time all the same."""
    pool: RequestPool[str] = RequestPool(2, PoolRules(batch_size=4, deadline=3.0, overhead=2.0))
    pool.add([Row("long", 100, 0.0)], 0.0)
    done: dict[str, list[float]] = {"long": [], "short": []}
    for now in np.arange(0.0, 40.0):
        pool.add([Row("short", 8, now) for _ in range(8)], now)  # twice what a step can do
        taken = pool.take(now)
        for row in taken:
            done[row.payload].append(now)
        staying = [row for row in taken if row.layer == 1]
        for row in staying:
            row.layer = 2
        pool.add(staying, now)
    assert len(done["long"]) == 2 and done["long"][-1] <= 10.0
