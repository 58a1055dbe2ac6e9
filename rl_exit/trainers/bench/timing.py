"""Rates of variants that are measured in turn, since machines are noisy: A B C, A B C, ..."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Variant = Callable[[], int]
"""Does one repetition and returns its steps (layers visited)."""


def interleaved(
    variants: Mapping[str, Variant], repetitions: int, after_round: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Steps per second of each variant, after one round to warm up.

    Args:
        variants: By name.
        repetitions: Rounds that count.
        after_round: Called after every round.

    Returns:
        For each name ``steps_per_second`` (median) and ``runs`` (all that counted, in order).
    """
    runs: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repetitions + 1):
        for name, variant in variants.items():
            started = time.perf_counter()
            steps = variant()
            rate = steps / (time.perf_counter() - started)
            if number:
                runs[name].append(rate)
        after_round()
    return {
        name: {"steps_per_second": statistics.median(values), "runs": [round(value, 1) for value in values]}
        for name, values in runs.items()
    }
