"""Passes timed in turn: nothing that changes with time may favour one of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from rl_exit import turns
from rl_exit.turns import in_turn, ratio


class World:
    """A clock that work moves; the machine becomes slower as it goes, or is held up at one moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slower: float = 0.0, stop: float | None = None) -> None:
        self.now, self.slower, self.stop, self.calls = 0.0, slower, stop, []
        monkeypatch.setattr(turns.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(turns.time, "process_time", lambda: 0.5 * self.now)

    def work(self, seconds: float) -> None:
        if self.stop is not None and self.now >= self.stop:
            self.now, self.stop = self.now + 100.0, None
        self.now += seconds * (1.0 + self.slower * self.now)

    def one(self, name: str, seconds: float, pieces: int = 64, after: float = 0.0, cold: float = 0.0):
        """A pass; ``cold``: what its first start costs beside."""
        extra = [cold]

        def start() -> Iterator[None]:
            self.work(extra.pop() if extra else 0.0)
            for piece in range(pieces):
                self.calls.append((name, piece))
                self.work(seconds)
                yield
            self.work(after)

        return start


def test_a_machine_that_becomes_slower_slows_both(monkeypatch):
    world = World(monkeypatch, slower=0.002)
    took = in_turn({"slow": world.one("slow", 2.0), "fast": world.one("fast", 1.0)}, rounds=3, slice_seconds=10.0)
    found = ratio(took.wall["slow"], took.wall["fast"])
    assert found == pytest.approx(2.0, rel=0.02)
    np.testing.assert_allclose(took.processor["slow"], 0.5 * took.wall["slow"])
    # The same work, one whole pass after the other, is off by a fifth and more.
    other = World(monkeypatch, slower=0.002)
    whole = []
    for seconds in (2.0, 1.0):
        before = other.now
        for _ in other.one("whole", seconds)():
            pass
        whole.append(other.now - before)
    assert abs(whole[0] / whole[1] - 2.0) > 0.1


def test_every_piece_and_what_comes_after_the_last_counts(monkeypatch):
    world = World(monkeypatch)
    passes = {"small": world.one("small", 1.0, after=3.0), "large": world.one("large", 8.0, pieces=8)}
    took = in_turn(passes, rounds=2, slice_seconds=13.4)
    assert took.wall["small"].shape == took.wall["large"].shape == (2, 5), "slices as long as asked for"
    assert took.wall["small"].sum(1).tolist() == [67.0, 67.0] and took.wall["large"].sum(1).tolist() == [64.0, 64.0]
    assert took.wall["small"][0].tolist() == [12.0, 13.0, 13.0, 13.0, 16.0], "of about the same share"
    assert sum(name == "small" for name, _ in world.calls) == 3 * 64, "one round more, which is not counted"
    cold = in_turn({"a": world.one("a", 1.0, cold=1000.0), "b": world.one("b", 1.0)}, rounds=1)
    assert cold.wall["a"].sum() == cold.wall["b"].sum() == 64.0, "the first round is the one that is not counted"


def test_a_piece_is_not_cut_and_there_are_no_more_slices_than_pieces(monkeypatch):
    world = World(monkeypatch)
    took = in_turn({"large": world.one("large", 32.0, pieces=2)}, rounds=1, slice_seconds=16.0)
    assert took.wall["large"].tolist() == [[32.0, 32.0]]
    passes = {"large": world.one("large", 32.0, pieces=2), "small": world.one("small", 16.0, pieces=4)}
    took = in_turn(passes, rounds=1, slice_seconds=0.1)
    assert took.wall["large"].tolist() == [[0.0, 32.0, 0.0, 32.0]] and took.wall["small"].tolist() == [[16.0] * 4]
    short = in_turn({"short": world.one("short", 0.1, pieces=3)}, rounds=2, slice_seconds=1.0)
    assert short.wall["short"].shape == (2, 1)


def test_one_interruption_does_not_move_the_median(monkeypatch):
    world = World(monkeypatch, stop=400.0)
    took = in_turn({"slow": world.one("slow", 2.0), "fast": world.one("fast", 1.0)}, rounds=3)
    sums = np.concatenate([took.wall[name].sum(1) for name in took.wall])
    assert sums.max() > 150.0 and ratio(took.wall["slow"], took.wall["fast"]) == pytest.approx(2.0)


def test_the_order_changes_and_is_the_seed_s(monkeypatch):
    def order(seed: int) -> list[str]:
        world = World(monkeypatch)
        in_turn({name: world.one(name, 1.0, pieces=8) for name in "abc"}, rounds=1, slice_seconds=1.0, seed=seed)
        return [name for name, _ in world.calls][24:]

    first = order(0)
    assert first == order(0) != order(1)
    firsts = {first[place] for place in range(0, len(first), 3)}
    assert firsts == {"a", "b", "c"}


def test_work_that_was_only_begun_counts_where_it_was_begun(monkeypatch):
    """As on a GPU: a piece takes no time until somebody waits for it."""
    world, begun = World(monkeypatch), []

    def settle():
        world.now += sum(begun)
        begun.clear()

    def begins(seconds):
        return lambda: (begun.append(seconds) for _ in range(8))

    took = in_turn({"slow": begins(2.0), "fast": begins(1.0)}, rounds=2, slice_seconds=2.0, settle=settle)
    assert took.wall["slow"].tolist() == [[2.0] * 8] * 2 and took.wall["fast"].tolist() == [[1.0] * 8] * 2


def test_a_pass_that_does_less_the_next_time_is_no_pass(monkeypatch):
    world, counts = World(monkeypatch), iter([8, 8, 7])
    with pytest.raises(RuntimeError, match=r"\{'lazy': 8\} pieces have done \{'lazy': 7\} in round 2"):
        in_turn({"lazy": lambda: world.one("lazy", 1.0, pieces=next(counts))()}, rounds=2)


def test_rounds_are_told(monkeypatch):
    world, told = World(monkeypatch), []
    in_turn({"a": world.one("a", 1.0, pieces=2)}, rounds=2, after_round=told.append)
    assert told == [1, 2, 3]
