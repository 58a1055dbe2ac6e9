"""Which round becomes the model, and what the alternation hands on."""

from __future__ import annotations

from typing import Any

import pytest

from rl_exit.config import load_config
from rl_exit.evaluation import CurvePoint, SplitResult
from rl_exit.progress import Silent
from rl_exit.trainers import alternation
from rl_exit.trainers.alternation import best_round
from rl_exit.trainers.run_directory import RunDirectory


def outcome(number: int, reference: float, points: list[tuple[float, float, float]], at: int = 0) -> dict[str, Any]:
    """A round's record on dev; of three layers, two instances."""
    threshold, score, layer = points[at]
    dev = SplitResult(
        metric="accuracy",
        num_instances=2,
        num_layers=3,
        threshold=threshold,
        full_depth_score=reference,
        score=score,
        mean_exit_layer=layer,
        saved_layers=1 - layer / 3,
        oracle_score=1.0,
        oracle_mean_exit_layer=1.0,
        oracle_saved_layers=2 / 3,
        exit_histogram=(1, 1, 0),
        exit_scores=(0.5, 0.6, reference),
        exit_losses=(1.0, 1.0, 1.0),
        curve=tuple(CurvePoint(*point) for point in points),
        histogram_by_class=((1, 0, 0), (0, 1, 0)),
        histogram_by_memorized=((1, 0, 0), (0, 1, 0), (0, 0, 0)),
    )
    return {"round": number, "reference": reference, "dev": dev.to_dict()}


def test_a_better_full_depth_later_judges_earlier_rounds_too():
    early = outcome(1, 0.547, [(0.5, 0.578, 1.0), (0.9, 0.547, 3.0)])
    late = outcome(2, 0.969, [(0.5, 0.9, 2.0), (0.8, 0.969, 2.73)])
    config = load_config(None, ["alternation.tolerance=0.005"])
    assert best_round([early], config) == {"round": 1, "threshold": 0.5, "score": 0.578, "mean_exit_layer": 1.0}
    assert best_round([early, late], config) == {"round": 2, "threshold": 0.8, "score": 0.969, "mean_exit_layer": 2.73}


def test_within_the_tolerance_fewer_layers_win_and_the_threshold_is_chosen_anew():
    first = outcome(1, 0.90, [(0.3, 0.89, 1.2), (0.6, 0.90, 1.9)])
    second = outcome(2, 0.905, [(0.4, 0.906, 1.5), (0.7, 0.91, 2.5)])
    chosen = best_round([first, second], load_config(None, ["alternation.tolerance=0.005"]))
    assert (chosen["round"], chosen["threshold"]) == (2, 0.4)  # 0.89 was good enough for the first reference only
    loose = best_round([first, second], load_config(None, ["alternation.tolerance=0.02"]))
    assert (loose["round"], loose["threshold"]) == (1, 0.3)


def test_a_fixed_threshold_is_kept_and_equals_go_to_the_earlier_round():
    points = [(0.5, 0.9, 2.0), (0.6, 0.9, 1.0)]
    chosen = best_round([outcome(1, 0.9, points), outcome(2, 0.9, points)], load_config(None, ["recipe=paper"]))
    assert chosen == {"round": 1, "threshold": 0.5, "score": 0.9, "mean_exit_layer": 2.0}


@pytest.mark.parametrize(("first", "expected"), [(0.80, 2), (0.86, 1)])
def test_outside_the_tolerance_the_better_score_wins(first: float, expected: int):
    rounds = [outcome(1, 0.95, [(0.5, first, 1.0)]), outcome(2, 0.95, [(0.5, 0.85, 2.5)])]
    assert best_round(rounds, load_config())["round"] == expected


def test_settings_of_the_task_step_reach_its_training(tmp_path, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(alternation, "train_exits", lambda job, *rest, **more: seen.append(job))
    words = ["task_step.distillation=0.4", "task_step.temperature=3.0", "task_step.anchor=0.7"]
    config = load_config(None, [*words, f"output_dir={tmp_path}"])
    run = RunDirectory.create(config)
    with alternation.Workers(config, tmp_path / "train") as workers:
        alternation._Alternation(run, Silent(), workers)._task(1, run.path)  # nothing is logged: training is replaced
    assert (seen[0].options.distillation, seen[0].options.temperature, seen[0].options.anchor) == (0.4, 3.0, 0.7)
    assert seen[0].weights == "sample"
