from __future__ import annotations

import time

import pytest

from rl_exit.trainers.run_clock import outlook, policy_in_words, seconds_left, steps_of


def test_steps_are_those_of_a_run() -> None:
    assert steps_of(1) == [
        *("data", "init", "round-1-store", "round-1-policy", "round-1-dev", "round-1-task"),
        *("round-2-store", "round-2-policy", "round-2-dev", "final", "report"),
    ]


def test_what_is_left_is_taken_from_the_last_step_of_the_kind() -> None:
    first = {"data": 1.0, "init": 10.0, "round-1-store": 2.0, "round-1-policy": 5.0, "round-1-dev": 1.0}
    assert seconds_left(first, steps_of(2)) is None  # how long a task step takes is not known yet
    known = first | {"round-1-task": 7.0}
    assert seconds_left(known, steps_of(2)) == pytest.approx(2 * (2.0 + 5.0 + 1.0) + 7.0)
    assert seconds_left(known | {"round-2-store": 4.0}, steps_of(2)) == pytest.approx(2 * 6.0 + 4.0 + 7.0)
    assert seconds_left(dict.fromkeys(steps_of(2), 1.0), steps_of(2)) == 0.0


def test_the_outlook_is_one_line_with_an_end() -> None:
    known = {"data": 1.0, "init": 10.0}
    assert outlook(known, 1) == "run: 2 of 11 steps done"
    known |= {f"round-1-{part}": 60.0 for part in ("store", "policy", "dev", "task")}
    noon = time.mktime((2026, 1, 1, 12, 0, 0, 0, 0, -1))
    assert outlook(known, 1, noon) == "run: 6 of 11 steps done, at most 3 min 00 s left (about 12:03)"


def test_the_policy_is_told_with_its_layers_and_its_speed() -> None:
    metrics = {
        "return": 0.5,
        "mean_exit_layer": 1.75,
        "exits_1": 0.25,
        "exits_2": 0.75,
        "trajectories_per_second": 1234.5,
    }
    assert policy_in_words(metrics) == "return 0.500, exit 1.75 (25/75 %), 1,234 trajectories/s"
    assert policy_in_words({"return": 0.5, "mean_exit_layer": 2.0}) == "return 0.500, exit 2.00"
