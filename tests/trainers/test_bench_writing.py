"""Curves of decoders are read where they were measured, and nowhere else."""

from __future__ import annotations

import math

import pytest

from rl_exit.trainers.bench.writing_report import curve_rows, proven_rows, read_at


def point(saved: float, agreement: float) -> dict[str, float]:
    return {
        "saved_layers": saved,
        "written_saved_layers": saved,
        "agreement": agreement,
        "perplexity": math.exp(agreement),
        "rouge_l_full": agreement,
    }


def test_a_curve_is_read_between_near_points_only():
    points = [point(0.0, 1.0), point(0.2, 0.8), point(0.48, 0.6), point(0.8, 0.2)]

    def at(saved: float) -> float | None:
        return read_at(points, saved, lambda row: row["agreement"], "saved_layers")

    assert at(0.1) == pytest.approx(0.9) and at(0.2) == pytest.approx(0.8)
    assert at(0.34) == pytest.approx(0.7) and at(0.5) is None and at(0.9) is None
    assert read_at([point(0.0, 1.0), point(0.28, 0.6)], 0.14, lambda row: row["agreement"], "saved_layers") is None


def test_rows_are_means_over_seeds_with_their_ends():
    names = ("policy", "policy_at_one_price", "calm_softmax", "calm_saturation", "calm_meta", "fixed")

    def seed(number: int, agreement: float) -> dict:
        rules = {name: [point(0.2, agreement)] for name in names} | {"full": [point(0.0, 1.0)]}
        proven = {
            "calm_meta": {"threshold": 0.9, "agreement": 0.95, "saved_layers": 0.1},
            "calm_softmax": {"none": "no"},
        }
        return {"seed": number, "rules": rules, "learn_then_test": {"rules": proven}}

    results = {"seeds": [seed(0, 0.7), seed(1, 0.9)]}
    _, rows = curve_rows(results)
    assert rows[0][:3] == ["policy, one for each price", "1.25", "80.00 [70.00 to 90.00]"] and rows[6][2] == "–"
    _, proven = proven_rows(results)
    assert proven[0] == ["CALM meta classifier", "0", "0.9", "5.0", "10.0"] and proven[1][2:] == ["–", "–", "–"]
