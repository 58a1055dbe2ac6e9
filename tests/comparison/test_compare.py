"""The whole tree: names, pooling over seeds, paired differences, the gap, groups."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rl_exit.comparison import ExitSet, Group, Scores, SeedRun, Split, compare
from rl_exit.comparison.pool import pooled_curve
from rl_exit.comparison.tables import verdicts

COUNT, LAYERS, CLASSES = 150, 4, 3


def made_run(
    seed: int, skill: dict[str, float], *, sets: Sequence[str] = ("final", "initial"), dev: bool = True, gain: float = 0
) -> SeedRun:
    """A run whose criteria know more or less of where the exits are right."""

    def split(rng: np.random.Generator, better: float) -> tuple[Split, np.ndarray]:
        labels = rng.integers(0, CLASSES, COUNT)
        hard = rng.random((COUNT, 1))
        right = hard < np.linspace(0.55, 0.85, LAYERS) + better
        predictions = np.where(right, labels[:, None], (labels[:, None] + 1) % CLASSES)
        return Split(np.arange(COUNT), labels, predictions, CLASSES), right

    made = {}
    for number, name in enumerate(sets):
        rng = np.random.default_rng(100 * seed + number)
        # The instances of a split are the same for all sets and seeds; what the exits say of them is not.
        test, right = split(np.random.default_rng(1), gain if name == "final" else 0.0)
        on_dev, dev_right = split(np.random.default_rng(2), gain if name == "final" else 0.0)
        scores = {}
        for word, known in skill.items():
            here = (known * right[:, :-1] + rng.normal(0, 0.5, (COUNT, LAYERS - 1))).astype(np.float32)
            there = (known * dev_right[:, :-1] + rng.normal(0, 0.5, (COUNT, LAYERS - 1))).astype(np.float32)
            scores[word] = Scores(here, there if dev else None)
        made[name] = ExitSet(name, test, on_dev if dev else None, scores)
    return SeedRun(seed, f"runs/{seed}", made)


SKILL = {"consistentee": 4.0, "entropy": 0.7, "pabee": 0.1}


def test_the_tree_has_what_the_results_page_and_the_report_read() -> None:
    group = Group("runs", [made_run(seed, SKILL) for seed in (0, 1)])
    tree = compare([group], "accuracy", replicates=50)
    json.dumps(tree, allow_nan=False)
    assert tree["seeds"] == [0, 1] and tree["num_instances"] == COUNT and tree["num_layers"] == LAYERS
    assert set(tree["methods"]) == {f"{word}{tail}" for word in SKILL for tail in ("", "@initial")}
    for method in tree["methods"].values():
        for name in ("no_loss", "within_1"):
            point = method[name]
            low, high = point["interval"]
            assert 0.0 <= low <= high <= 1 - 1 / LAYERS
            assert [row["seed"] for row in point["by_seed"]] == [0, 1] and len(point["threshold"]) == 2
            assert point["saved_layers"] == pytest.approx(np.mean([r["saved_layers"] for r in point["by_seed"]]))
            assert point["mean_exit_layer"] == pytest.approx(LAYERS * (1 - point["saved_layers"]))
            assert set(method["transferred"]) == {"no_loss", "within_1"}
        saved = [point[0] for point in method["curve"]]
        assert saved == sorted(saved) and saved[0] == 0.0 and saved[-1] == pytest.approx(1 - 1 / LAYERS)
    assert [key for key, method in tree["methods"].items() if method["ours"]] == ["consistentee"]
    bound = tree["oracle"]["saved_layers"]
    assert tree["methods"]["entropy"]["distance_to_oracle"]["no_loss"] == pytest.approx(
        bound - tree["methods"]["entropy"]["no_loss"]["saved_layers"]
    )
    assert tree["full_depth_score"]["pooled"] == pytest.approx(
        np.mean([row["score"] for row in tree["full_depth_score"]["by_seed"]])
    )
    # The criterion that knows most wins, and the figures say by how much.
    best = tree["best_baseline"]["within_1"]
    gain = tree["difference"]["within_1"]
    ours, theirs = (tree["methods"][key]["within_1"]["saved_layers"] for key in ("consistentee", best))
    assert best.startswith("entropy") and gain["baseline"] == best
    assert gain["saved_layers"] == pytest.approx(ours - theirs) and gain["interval"][0] > 0
    assert tree["gap_closed"]["within_1"] == pytest.approx((ours - theirs) / (tree["oracle"]["saved_layers"] - theirs))
    assert set(tree["transferred"]) == {"no_loss", "within_1"}


def test_the_difference_is_paired() -> None:
    """A method against its own copy differs by nothing in every replicate, though each interval is wide."""
    run = made_run(0, {"consistentee": 2.0}, sets=("final",))
    exits = run.sets["final"]
    twin = ExitSet("final", exits.split, exits.dev, {**exits.scores, "entropy": exits.scores["consistentee"]})
    tree = compare([Group("runs", [SeedRun(0, "a", {"final": twin})])], "accuracy", replicates=40)
    gain = tree["difference"]["no_loss"]
    assert (gain["saved_layers"], gain["interval"]) == (0.0, [0.0, 0.0])
    low, high = tree["methods"]["entropy"]["no_loss"]["interval"]
    assert high - low > 0.01


def test_groups_have_their_own_figures_and_a_common_bar() -> None:
    first = Group("plain", [made_run(seed, SKILL) for seed in (0, 1)])
    second = Group("distilled", [made_run(seed, SKILL, gain=0.1) for seed in (0, 1, 2)], {"task_step.distillation": 1})
    tree = compare([first, second], "accuracy", replicates=20)
    assert {"consistentee", "distilled/consistentee", "distilled/entropy@initial"} <= set(tree["methods"])
    other = tree["groups"][1]
    assert other["consistentee"] == "distilled/consistentee" and other["settings"] == {"task_step.distillation": 1}
    assert other["against_first"]["no_loss"]["baseline"] == "consistentee"
    assert len(other["against_first"]["no_loss"]["by_seed"]) == 2  # the seeds that both have
    assert other["best_baseline"]["no_loss"].startswith("distilled/")
    # Better exits save more at the same bar.
    better = tree["methods"]["distilled/entropy"]["no_loss"]["saved_layers"]
    assert better > tree["methods"]["entropy"]["no_loss"]["saved_layers"]
    assert tree["best_baseline"]["no_loss"].startswith("distilled/")


def test_without_dev_nothing_is_transferred_and_without_ours_nothing_differs() -> None:
    tree = compare([Group("runs", [made_run(0, {"entropy": 1.0}, dev=False)])], "accuracy", replicates=10)
    assert tree["transferred"] is None and tree["methods"]["entropy"]["transferred"] is None
    assert tree["ours"] is None and tree["difference"] is None and tree["gap_closed"] is None
    assert tree["best_baseline"]["no_loss"] in tree["methods"]


def test_one_set_of_exits_serves_as_reference_too() -> None:
    tree = compare([Group("runs", [made_run(0, SKILL, sets=("final",))])], "accuracy", replicates=10)
    assert set(tree["methods"]) == set(SKILL)
    assert tree["groups"][0]["full_depth_score"]["final"]["pooled"] == tree["full_depth_score"]["pooled"]


def test_runs_on_other_instances_are_refused() -> None:
    run = made_run(0, SKILL)
    exits = {
        name: ExitSet(name, Split(one.split.ids + 1, one.split.labels, one.split.predictions, 3), one.dev, one.scores)
        for name, one in run.sets.items()
    }
    with pytest.raises(ValueError, match="other instances"):
        compare([Group("a", [run]), Group("b", [SeedRun(0, "b", exits)])], "accuracy", replicates=5)
    with pytest.raises(ValueError, match="names of their own"):
        compare([Group("a", [run]), Group("a", [run])], "accuracy", replicates=5)


def test_the_same_seed_gives_the_same_tree() -> None:
    groups = [Group("runs", [made_run(0, SKILL)])]
    assert compare(groups, "mcc", replicates=20, seed=3) == compare(groups, "mcc", replicates=20, seed=3)
    assert compare(groups, "mcc", replicates=20, seed=3) != compare(groups, "mcc", replicates=20, seed=4)


def test_pooled_curves_average_points_of_few_thresholds_and_lines_of_many() -> None:
    few = [np.array([[0.75, 0.5], [0.25, 0.7], [0.0, 0.8]]), np.array([[0.75, 0.7], [0.15, 0.9], [0.0, 0.8]])]
    assert pooled_curve(few) == [[0.0, 0.8], [0.2, 0.8], [0.75, 0.6]]
    rising = np.linspace(0.5, 0.0, 100)
    many = [np.stack([rising, 1 - rising], axis=1), np.stack([rising**2 * 2, 1 - rising], axis=1)]
    found = np.array(pooled_curve(many))
    assert found[:, 1] == pytest.approx(1 - (found[:, 0] + np.sqrt(found[:, 0] / 2)) / 2, abs=1e-3)
    assert math.isclose(found[-1, 0], 0.5)


def test_a_criterion_with_answers_of_its_own_is_scored_by_them() -> None:
    """Equal scores, better answers below: more layers saved by that method alone; bar and oracle are the exits'."""
    run = made_run(0, {"consistentee": 2.0}, sets=("final",))
    exits = run.sets["final"]
    plain = exits.scores["consistentee"]

    def compared(answers: np.ndarray | None, on_dev: np.ndarray | None) -> dict[str, object]:
        ours = Scores(plain.measured, plain.dev, answers=answers, dev_answers=on_dev)
        made = ExitSet("final", exits.split, exits.dev, {"consistentee": ours, "entropy": plain})
        return compare([Group("runs", [SeedRun(0, "a", {"final": made})])], "accuracy", replicates=20)

    assert exits.dev is not None
    before = compared(exits.split.predictions, exits.dev.predictions)
    assert before == compared(None, None)
    better = np.array(exits.split.predictions)
    better[:, 0] = exits.split.labels  # always right at layer 1
    after = compared(better, exits.dev.predictions)
    assert after["methods"]["consistentee"]["no_loss"]["saved_layers"] == pytest.approx(1 - 1 / LAYERS)
    assert before["methods"]["consistentee"]["no_loss"]["saved_layers"] < 0.7
    for same in ("oracle", "full_depth_score"):
        assert after[same] == before[same]
    assert after["methods"]["entropy"] == before["methods"]["entropy"]
    assert after["methods"]["consistentee"]["transferred"] != before["methods"]["consistentee"]["transferred"]
    moved = compared(exits.split.predictions, np.tile(exits.dev.labels[:, None], LAYERS))
    assert moved["methods"]["consistentee"]["no_loss"] == before["methods"]["consistentee"]["no_loss"]
    assert moved["methods"]["consistentee"]["transferred"] != before["methods"]["consistentee"]["transferred"]


def test_seeds_that_leave_by_confidence_are_named() -> None:
    runs = [made_run(seed, SKILL) for seed in (0, 1, 2)]
    tree = compare([Group("runs", runs)], "accuracy", replicates=20)
    assert tree["groups"][0]["by_confidence"] == [] and not any("confidence" in text for text in verdicts(tree))
    runs = [run if run.seed == 1 else replace(run, policy_rule="confidence") for run in runs]
    tree = compare([Group("runs", runs)], "accuracy", replicates=20)
    assert tree["groups"][0]["by_confidence"] == [0, 2]
    assert verdicts(tree)[-1].startswith("with seed 0, 2 ConsistentEE leaves by confidence")
