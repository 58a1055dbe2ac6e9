from __future__ import annotations

import math

import pytest

from rl_exit import figures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.44, "0.4 s"),
        (52.4, "52 s"),
        (185, "3 min 05 s"),
        (59.7, "1 min 00 s"),
        (7800, "2 h 10 min"),
        (9.97, "10.0 s"),
    ],
)
def test_duration(value: float, text: str) -> None:
    assert figures.duration(value) == text


def test_sequential_scale_ends() -> None:
    assert figures.sequential(0) == "rgb(0,34,78)"
    assert figures.sequential(1) == "rgb(254,232,56)"
    assert figures.sequential(0.125) == "rgb(32,56,92)"


def test_plain_shows_markup_as_text() -> None:
    assert figures.plain("<b>&") == "&lt;b&gt;&amp;"


def test_long_curves_are_thinned_to_means() -> None:
    x = list(range(1000))
    trace = figures.lines({"a": (x, [float(value) for value in x])}, "update", "")["data"][0]
    assert len(trace["x"]) <= figures.MAX_POINTS
    assert trace["x"][0] == 3 and trace["y"][0] == 1.5  # steps 0..3: their last step, their mean
    assert trace["x"][-1] == 999


def test_gaps_are_left_out() -> None:
    trace = figures.lines({"a": ([1, 2, 3], [1.0, math.nan, 3.0])}, "update", "")["data"][0]
    assert (trace["x"], trace["y"]) == ([1, 3], [1.0, 3.0])


def test_classes_are_ordered_by_mean_exit_and_keep_apart() -> None:
    long = "x" * 40
    split = {"histogram_by_class": [[0, 4], [4, 0], [2, 2], [0, 0]]}
    heat = figures.by_class(split, [long + "a", long + "b", "c"])["data"][0]
    assert heat["customdata"] == [[4, 0], [2, 2], [0, 4], [0, 0]]
    assert len(set(heat["y"])) == 4 and heat["y"][1] == "c  (4)" and heat["y"][3] == "class 3  (0)"
    assert heat["z"] == [[100, 0], [50, 50], [0, 100], [None, None]]
