"""The pool with a goal: who can still be in time, and who waits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_exit.errors import ConfigError
from rl_exit.serving.goal import OLD, PRIOR, TURN, Expectation, GoalPool, late_ones
from rl_exit.serving.pool import PoolRules, RequestPool, Row

LAYERS = 3


def pool_with(goal: float, pace: float = 1.0, **rules: float) -> GoalPool[str]:
    """A pool that knows what a token takes, and that nobody leaves early."""
    pool: GoalPool[str] = GoalPool(LAYERS, PoolRules(**{"overhead": 0.0, "goal": goal, **rules}))  # type: ignore[arg-type]
    pool.expected.pace = pace
    return pool


def names(taken: list[Row[str]]) -> list[str]:
    return [row.payload for row in taken]


def fewest_late(due: list[float], work: list[float], now: float) -> int:
    """By trying every subset: jobs in time, one after the other as they are due."""
    best = 0
    for kept in itertools.product((False, True), repeat=len(due)):
        end, fine = now, True
        for by, takes, keep in zip(due, work, kept, strict=True):
            end += takes if keep else 0.0
            fine &= not keep or end <= by
        best = max(best, sum(kept) if fine else 0)
    return len(due) - best


@settings(max_examples=200, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=8),
    now=st.integers(0, 10),
)
def test_no_choice_leaves_fewer_late(jobs: list[tuple[int, int]], now: int) -> None:
    jobs.sort()
    due, work = [float(by) for by, _ in jobs], [float(takes) for _, takes in jobs]
    late = late_ones(due, work, float(now))
    end = float(now)
    for number, (by, takes) in enumerate(zip(due, work, strict=True)):
        if number not in late:
            end += takes
            assert end <= by, "who is not late is in time"
    assert len(late) == fewest_late(due, work, float(now))


def test_the_largest_of_those_that_do_not_fit_is_left_behind() -> None:
    assert late_ones([10.0, 11.0, 12.0], [6.0, 3.0, 4.0], 0.0) == {0}
    assert late_ones([10.0, 11.0, 12.0], [4.0, 3.0, 4.0], 0.0) == set()
    assert late_ones([3.0], [4.0], 0.0) == {0}, "too large for its own time"


def test_what_is_left_to_do_is_learned() -> None:
    expected = Expectation(3, overhead=10.0)
    row = Row("a", 30, 0.0)
    assert expected.remaining == [3.0, 2.0, 1.0] and expected.seconds(row) == 0.0, "nothing is known of the pace"
    expected.saw(1, [30, 20], left=0, seconds=6.0)
    assert expected.pace == pytest.approx(0.1)
    many = 1000
    for _ in range(many):
        expected.saw(1, [30, 20], left=1, seconds=6.0)
    stay = 1 - many / (PRIOR + 2 + 2 * many)
    assert expected.remaining == pytest.approx([1 + 2 * stay, 2.0, 1.0])
    # Two rows share a step's overhead.
    assert expected.seconds(row) == pytest.approx(0.1 * (30 + 10 / 2) * expected.remaining[0], rel=1e-3)
    expected.saw(3, [10], left=1, seconds=20.0)
    assert expected.pace == pytest.approx(0.1 + 0.1 * (1.0 - 0.1)), "the latest step has a tenth of the weight"


def test_who_cannot_be_in_time_waits_for_those_who_can() -> None:
    pool = pool_with(goal=100.015)
    pool.add([Row("hopeless", 50, 0.0)], 0.0)  # 150 seconds of work, 100 are allowed
    pool.add([Row("fine", 20, 1.0)], 1.0)
    assert names(pool.take(2.0)) == ["fine"]
    assert names(pool.take(2.0)) == ["hopeless"], "nobody else waits"


def test_one_large_text_waits_where_it_would_make_several_late() -> None:
    pool = pool_with(goal=100.015, batch_size=1)
    pool.add([Row("large", 20, 0.0), Row("b", 5, 1.0), Row("c", 5, 2.0)], 2.0)
    assert names(pool.take(2.0)) == ["large"], "all of them fit: first come, first served"
    pool.add([Row("large", 20, 0.0)], 2.0)
    assert [names(pool.take(now)) for now in (20.0, 35.0, 50.0)] == [["b"], ["c"], ["large"]]


def test_the_way_to_the_model_and_back_is_part_of_the_goal() -> None:
    assert pool_with(goal=0.2).allowed == pytest.approx(0.185)
    assert pool_with(goal=0.04).allowed == pytest.approx(0.03), "a quarter at most"


def test_a_request_is_as_large_as_all_of_its_texts() -> None:
    pool = pool_with(goal=100.015, batch_size=8)
    pool.add([Row(f"many {n}", 10, 0.0, request="many") for n in range(4)], 0.0)  # 120 seconds
    pool.add([Row("one", 10, 1.0, request="one")], 1.0)
    assert names(pool.take(1.0)) == ["one"]
    assert len(pool.take(1.0)) == 4


def test_others_that_are_in_time_come_along_and_late_ones_do_not() -> None:
    pool = pool_with(goal=100.015, packed_tokens=128)
    rows = [Row("a", 5, 0.0, layer=2), Row("late", 51, 1.0, layer=2), Row("b", 6, 2.0, layer=2), Row("c", 5, 3.0)]
    pool.add(rows, 3.0)
    assert names(pool.take(3.0)) == ["b", "a"], "longest first; c waits for another layer"
    assert names(pool.take(3.0)) == ["c"], "the late one waits for all who can be in time"


def taken_of(pool: GoalPool[str], first: float, steps: int, old_takes: float = 1.0) -> list[list[str]]:
    """What runs where somebody who can be in time comes at each step, a second each; one with old ones takes longer."""
    found = []
    now = first
    for _ in range(steps):
        pool.add([Row("new", 1, now)], now)
        rows = pool.take(now)
        found.append(sorted(set(names(rows))))
        takes = 1.0 if found[-1] == ["new"] else old_takes
        pool.ran(rows, 3, 0, takes)
        pool.expected.pace = 1.0
        now += takes
    return found


@pytest.mark.parametrize("old_takes", [1.0, 3.0])
def test_old_late_requests_have_their_part_of_the_time(old_takes: float) -> None:
    goal = 10.0
    pool = pool_with(goal=goal, batch_size=1)
    pool.add([Row("old", 50, 0.0), Row("old", 50, 0.0)], 0.0)
    pause = int(old_takes * (TURN - 1))
    found = taken_of(pool, OLD * goal + 1.0, 2 + pause, old_takes)
    assert found == [["old"], *[["new"]] * pause, ["old"]]
    young = pool_with(goal=goal, batch_size=1)
    young.add([Row("old", 50, 0.0)], 0.0)
    assert taken_of(young, OLD * goal - 20.0, TURN) == [["new"]] * TURN, "not so old yet"


def test_those_at_the_layer_of_the_oldest_come_along() -> None:
    pool = pool_with(goal=10.0, packed_tokens=256)
    pool.add([Row("old", 50, 0.0), Row("oldest", 50, -1.0), Row("deeper", 50, 1.0, layer=2)], 0.0)
    assert taken_of(pool, 101.0, 2) == [["new", "old", "oldest"], ["new"]]


def test_what_nobody_waits_for_is_forgotten() -> None:
    pool = pool_with(goal=100.015)
    pool.add([Row("a", 50, 0.0, request="late"), Row("b", 50, 0.0, layer=2, request="late")], 0.0)
    pool.add([Row("fine", 5, 0.0, request="fine")], 0.0)
    assert names(pool.take(0.0)) == ["fine"]
    pool.drop("late")
    assert not len(pool) and pool.take(0.0) == [] and not pool._inside and not pool._past
    pool.drop("late")
    pool.add([Row("past", 5, 0.0, request="past")], 0.0)
    pool.add([Row("fine", 5, 500.0, request="fine")], 500.0)
    assert names(pool.take(500.0)) == ["fine"]
    pool.drop("past")
    assert not len(pool) and pool.take(500.0) == []
    plain: RequestPool[str] = RequestPool(2)
    plain.add([Row("a", 5, 0.0, request="x"), Row("b", 5, 0.0, request="y")], 0.0)
    plain.drop("x")
    assert names(plain.take(0.0)) == ["b"] and not len(plain)


def test_rows_are_padded_only_where_it_pays() -> None:
    def taken(**rules: float) -> list[int]:
        pool = pool_with(goal=1e12, **rules)
        pool.add([Row("", length, 0.0) for length in (10, 8, 3, 13)], 0.0)
        return [row.length for row in pool.take(0.0)]

    assert taken(overhead=0.0) == [10]
    assert taken(overhead=2.0) == [10, 8]
    assert taken(overhead=1e6) == [13, 10, 8, 3]
    assert taken(overhead=1e6, batch_tokens=20) == [10, 8]
    assert taken(overhead=0.0, packed_tokens=21) == [10, 8, 3], "without padding their lengths do not matter"
    assert taken(overhead=0.0, packed_tokens=100, packed_area=30) == [10, 8, 3]


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 40), st.integers(1, 4), st.integers(0, 5)),
        min_size=1,
        max_size=60,
    ),
    batch_size=st.integers(1, 8),
    goal=st.sampled_from([0.5, 20.0, 1e6]),
    packed=st.sampled_from([0, 64]),
)
def test_every_row_runs_every_layer_once_and_leaves(
    arrivals: list[tuple[int, int, int, int]], batch_size: int, goal: float, packed: int
) -> None:
    rules = PoolRules(batch_size, overhead=8.0, batch_tokens=64, packed_tokens=packed, goal=goal)
    pool: GoalPool[int] = GoalPool(4, rules)
    seen: dict[int, list[int]] = {number: [] for number in range(len(arrivals))}
    for now in range(30 + 1 + 4 * len(arrivals)):
        come = [(n, one) for n, one in enumerate(arrivals) if one[0] == now]
        pool.add([Row(n, length, now, request=(now, whose)) for n, (_, length, _, whose) in come], now)
        taken = pool.take(now)
        assert len({row.layer for row in taken}) <= 1 and len(taken) <= batch_size
        assert [row.length for row in taken] == sorted((row.length for row in taken), reverse=True)
        if len(taken) > 1:
            cells = len(taken) * taken[0].length
            assert cells <= rules.batch_tokens or sum(row.length for row in taken) <= packed
        assert bool(taken) or not len(pool), "the model never idles beside waiting rows"
        for row in taken:
            seen[row.payload].append(row.layer)
        staying = [row for row in taken if row.layer < arrivals[row.payload][2]]
        if taken:
            pool.ran(taken, taken[0].layer, len(taken) - len(staying), 0.5)
        for row in staying:
            row.layer += 1
        pool.add(staying, now)
    assert not len(pool) and not pool._inside and not pool._past
    assert seen == {number: list(range(1, leave + 1)) for number, (_, _, leave, _) in enumerate(arrivals)}


def answered_in_time(kind: type[RequestPool[int]], goal: float, rate: float) -> float:
    """Share of texts answered within the goal where a step takes two seconds and one for each ten tokens."""
    rng = np.random.default_rng(0)
    rules = PoolRules(overhead=20.0, packed_tokens=256, goal=goal if kind is GoalPool else math.inf)
    pool = kind(LAYERS, rules)
    comes = np.cumsum(rng.exponential(1 / rate, 400)).tolist()
    lengths, leaves = rng.choice([10, 20, 60], 400).tolist(), rng.integers(1, LAYERS + 1, 400).tolist()
    took: list[float] = []
    now, following = 0.0, 0
    while len(took) < len(comes):
        if not len(pool):
            now = max(now, comes[following])
        while following < len(comes) and comes[following] <= now:
            pool.add([Row(following, lengths[following], comes[following])], now)
            following += 1
        rows = pool.take(now)
        takes = 2.0 + sum(row.length for row in rows) / 10
        now += takes
        leaving = [row for row in rows if leaves[row.payload] == row.layer]
        took += [now - row.arrived for row in leaving]
        staying = [row for row in rows if leaves[row.payload] != row.layer]
        pool.ran(rows, rows[0].layer, len(leaving), takes)
        for row in staying:
            row.layer += 1
        pool.add(staying, now)
    return float(np.mean(np.array(took) <= goal))


def test_more_are_in_time_than_as_they_came() -> None:
    """A loaded model, nine tenths busy: with the goal known, fewer than half as many are late."""
    as_they_came = 1 - answered_in_time(RequestPool, 60.0, 0.14)
    with_goal = 1 - answered_in_time(GoalPool, 60.0, 0.14)
    assert as_they_came > 0.05
    assert with_goal < as_they_came / 2


@pytest.mark.parametrize(
    "words",
    [
        {"goal": 0.0},
        {"goal": -1.0},
        {"goal": float("nan")},
        {"goal": 1.0, "deadline": 1.0},
        {"goal": 1.0, "overhead": math.inf},
    ],
)
def test_rules_out_of_range_are_refused(words: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="accepted"):
        PoolRules(**words)  # type: ignore[arg-type]
