"""The page of an analysis: Figures 2, 4 and 5 and Table 1 of the paper, for one run, in one self-contained file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_exit.analysis.figures import alpha_chart, by_memorized, exit_chart, rewards_chart
from rl_exit.analysis.tables import analysis_tables
from rl_exit.figures import Figure, metric_name
from rl_exit.files import read_json, write_text
from rl_exit.pages import render_page


def write_analysis_page(run_dir: Path) -> Path:
    """Write ``analysis/index.html`` from ``analysis/analysis.json``.

    Raises:
        RunError: There is no analysis.
        UserError: No space left, or the folder cannot be written.
    """
    folder = Path(run_dir) / "analysis"
    page = render_analysis(read_json(folder / "analysis.json"))
    write_text(folder / "index.html", page)
    return folder / "index.html"


def render_analysis(tree: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        tree: From :func:`rl_exit.trainers.analyse.analyse`.
    """
    tables = analysis_tables(tree)
    sections: list[dict[str, Any]] = []
    drawn: dict[str, Figure] = {}
    for build in (_exits, _hardness, _rewards, _alphas):
        section, charts = build(tree)
        section["table"] = tables[section["id"]]
        section["charts"] = [
            {"id": key, "title": title, "caption": caption, "wide": wide} for key, title, caption, wide, _ in charts
        ]
        drawn |= {key: figure for key, *_, figure in charts}
        sections.append(section)
    facts = [
        *((key, tree[key]) for key in ("task", "seed")),
        ("layers", tree["num_layers"]),
        ("metric", metric_name(tree["metric"])),
        ("instances", f"{tree['num_policy']:,} of the policy, {tree['num_dev']:,} dev"),
        ("round", tree["round"]),
    ]
    return render_page(
        "sections.html.j2",
        drawn,
        kind="analysis",
        title=tree["run_name"],
        facts=facts,
        sections=sections,
        source="analysis.json of the run",
    )


Charts = list[tuple[str, str, str, bool, Figure]]


def _exits(tree: Mapping[str, Any]) -> tuple[dict[str, Any], Charts]:
    exits = tree["exits"]
    first, final = exits["initial"], exits["final"]
    lead = (
        f"Initialisation ({tree['objective']}) asks every exit to be right about every instance; the rounds ask each "
        f"exit to be right about those that leave there. Where they leave, the loss is {final['loss_at_exit']:.3f} "
        f"nats in the finished model and {first['loss_at_exit']:.3f} at the same layers after initialisation; accuracy "
        f"is {100 * final['accuracy_at_exit']:.2f} % and {100 * first['accuracy_at_exit']:.2f} %."
    )
    same = "Who leaves where is decided by the finished model; both sets of exits are measured on these same groups."
    notes = []
    if first == final:
        notes = ["The best round is the first: its exits are those of the initialisation, so the two sets are equal."]
    charts: Charts = [
        ("exit-loss", "Loss of each exit", same, False, exit_chart(exits, "loss", 1.0, "cross-entropy in nats", ".3f")),
        (
            "exit-accuracy",
            "Accuracy of each exit",
            same,
            False,
            exit_chart(exits, "accuracy", 100.0, "accuracy in %", ".2f"),
        ),
    ]
    return {"id": "exits", "title": "Exits under both objectives", "lead": lead, "notes": notes}, charts


def _hardness(tree: Mapping[str, Any]) -> tuple[dict[str, Any], Charts]:
    train = tree["hardness"]["train"]
    groups = train["by_memorized"]
    lead = (
        "The memorized layer is the first from which an instance is predicted correctly at every layer up to the last. "
        "If it measures hardness, instances with a large one have a large loss and are forgotten more often."
    )
    charts: Charts = [
        (
            "hardness-loss",
            "Loss by memorized layer",
            f"Mean loss of the last exit on {train['num_instances']:,} training instances.",
            False,
            by_memorized(groups["loss"], groups["count"], 1.0, "cross-entropy in nats", ".3f"),
        )
    ]
    if train["forgetting"] is None:
        note = f"No correlation with forgetting events: {train['forgetting_note']}."
        return {"id": "hardness", "title": "Memorized layer and hardness", "lead": lead, "notes": [note]}, charts
    found = train["forgetting"]
    charts.append(
        (
            "hardness-forgetting",
            "Forgotten by memorized layer",
            f"Share of the training instances forgotten at least once, or never learnt, in {found['epochs']} epochs of "
            "initialisation.",
            False,
            by_memorized(train["forgotten"], groups["count"], 100.0, "instances in %", ".1f"),
        )
    )
    return {"id": "hardness", "title": "Memorized layer and hardness", "lead": lead, "notes": []}, charts


def _rewards(tree: Mapping[str, Any]) -> tuple[dict[str, Any], Charts]:
    parts = []
    for name, words in (("no_loss", "at no loss"), ("within_1", "within one point")):
        saved = {reward: found[name] for reward, found in tree["rewards"].items()}
        if all(saved.values()):
            shown = ", ".join(f"{100 * at['saved_layers']:.1f} % ({reward})" for reward, at in saved.items())
            parts.append(f"Saved layers {words}: {shown}.")
    lead = (
        "The vanilla reward is the negative loss less a price for every layer; the hardness-guided one lets hard "
        "instances pay less; correctness counts right answers in place of the loss. Policies of each were trained by "
        f"the exact gradient on the kept state store. {' '.join(parts)}"
    )
    caption = (
        "Dev split. Lines: the best that a reward reaches over all its alphas and thresholds. Marks: each alpha at the "
        "threshold 0.5. Points are chosen on the split they are shown on, for all rewards alike."
    )
    charts: Charts = [("rewards", "Score against mean exit layer", caption, True, rewards_chart(tree))]
    return {"id": "rewards", "title": "Rewards", "lead": lead, "notes": []}, charts


def _alphas(tree: Mapping[str, Any]) -> tuple[dict[str, Any], Charts]:
    own = tree["reward"]
    lead = (
        "Alpha is the price of a layer, in nats of cross-entropy or, for correctness, in right answers: a higher one "
        "saves more layers and costs score. "
        f"This run was trained with the {own['name']} reward at alpha {own['alpha']:g}. To train whole runs at several "
        "prices, use rl-exit sweep."
    )
    name = metric_name(tree["metric"])
    charts: Charts = [
        (
            "alpha-score",
            "Score by alpha",
            "Dev split, threshold 0.5.",
            False,
            alpha_chart(tree, "score", f"{name} in %"),
        ),
        (
            "alpha-saved",
            "Saved layers by alpha",
            "Dev split, threshold 0.5.",
            False,
            alpha_chart(tree, "saved_layers", "saved layers in %"),
        ),
    ]
    return {"id": "alphas", "title": "Alpha", "lead": lead, "notes": []}, charts
