from __future__ import annotations

from typing import Any

from rl_exit.report_training import training_charts

KEYS = ("phase", "round", "step", "epoch", "metric", "value")


def columns(*rows: tuple[Any, ...]) -> dict[str, list[Any]]:
    return {key: [row[index] for row in rows] for index, key in enumerate(KEYS)}


def test_one_line_per_round_and_phases_in_order() -> None:
    groups, drawn = training_charts(
        columns(
            ("task", 1, 0, 0.0, "loss", 0.5),
            ("policy", 1, 0, 0.0, "return", -1.0),
            ("policy", 1, 1, 0.5, "return", -0.9),
            ("policy", 2, 0, 0.0, "return", -0.8),
            ("policy", 1, 0, 0.0, "grad_norm", 1.0),
            ("init", 0, 0, 0.0, "loss", 2.0),
            ("warmup", 0, 0, 0.0, "x", 2.0),
        )
    )
    assert [group["title"].split(":")[0] for group in groups] == [
        *("Initialisation", "Policy phase", "Task phase", "Phase warmup")
    ]
    policy = groups[1]
    assert [item["title"] for item in policy["charts"]] == ["Mean return"]
    assert [item["title"] for item in policy["more"]] == ["Grad norm"]
    traces = drawn[policy["charts"][0]["id"]]["data"]
    assert [(trace["name"], trace["x"], trace["y"]) for trace in traces] == [
        ("round 1", [0.0, 1.0], [-1.0, -0.9]),
        ("round 2", [0.0], [-0.8]),
    ]


def test_dev_scores_share_a_chart_in_percent_and_the_last_value_counts() -> None:
    groups, drawn = training_charts(
        columns(
            ("dev", 1, 0, 0.0, "score", 0.7),
            ("dev", 1, 1, 0.0, "score", 0.8),
            ("dev", 2, 0, 0.0, "score", 0.9),
            ("dev", 2, 0, 0.0, "full_depth_score", 0.95),
            ("dev", 2, 0, 0.0, "mean_exit_layer", 2.5),
        )
    )
    assert [item["title"] for item in groups[0]["charts"]] == ["Score", "Mean exit layer"]
    traces = {trace["name"]: trace for trace in drawn["dev-scores"]["data"]}
    assert (traces["with exits"]["x"], traces["with exits"]["y"]) == ([1.0, 2.0], [80.0, 90.0])
    assert traces["full depth"]["y"] == [95.0]


def test_empty_values_are_skipped() -> None:
    assert training_charts(
        columns(("init", 0, None, None, "loss", None), ("init", 0, 1, 0.0, "loss", float("nan")))
    ) == (
        [],
        {},
    )
