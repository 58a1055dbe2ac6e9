"""The page of a comparison: one self-contained HTML file with curves, operating points and tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rl_exit.comparison.charts import groups_trade_off, points, trade_off
from rl_exit.comparison.tables import (
    GROUP_HEADER,
    METHOD_HEADER,
    POINTS,
    gain_text,
    group_rows,
    method_name,
    method_rows,
    signed,
    span,
    verdicts,
)
from rl_exit.figures import duration, metric_name
from rl_exit.files import write_text
from rl_exit.pages import render_page

Tree = Mapping[str, Any]
SECTIONS = (("result", "Result"), ("curves", "Curves"), ("methods", "Methods"), ("origin", "Origin"))
WITH_GROUPS = (*SECTIONS[:3], ("groups", "Groups"), *SECTIONS[3:])


def write_compare_page(tree: Tree, path: Path) -> Path:
    """Write the page, whole or not at all.

    Args:
        tree: From :func:`rl_exit.trainers.compare.compare_runs`.
        path: The file.

    Raises:
        UserError: No space left, or the folder cannot be written.
    """
    write_text(path, render_comparison(tree))
    return path


def render_comparison(tree: Tree) -> str:
    """The page as text."""
    sets = _sets(tree)
    figures: dict[str, Any] = {
        "trade-off": {key: trade_off(tree, group, exits) for key, _, group, exits in sets},
        "points": {key: points(tree, group, exits) for key, _, group, exits in sets},
    }
    many = len(tree["groups"]) > 1
    if many:
        figures["groups"] = groups_trade_off(tree)
    return render_page(
        "compare.html.j2",
        figures,
        title=tree["task"],
        facts=_facts(tree),
        sections=WITH_GROUPS if many else SECTIONS,
        sets=[(key, name) for key, name, _, _ in sets],
        headline=_headline(tree),
        tiles=_tiles(tree),
        method_header=METHOD_HEADER,
        method_tables=[(group["name"], method_rows(tree, group["name"])) for group in tree["groups"]],
        group_header=GROUP_HEADER,
        groups=group_rows(tree) if many else [],
        transferred=_transferred(tree),
        seeds=_by_seed(tree),
        notes=_notes(tree),
        origin=_origin(tree),
    )


def _sets(tree: Tree) -> list[tuple[str, str, str, str]]:
    """(key of the switch, words, group, exits) of every set of exits."""
    found = []
    for number, group in enumerate(tree["groups"]):
        here = {m["exits"] for m in tree["methods"].values() if m["group"] == group["name"]}
        for exits in ("final", "initial"):
            if exits in here:
                words = f"{exits} exits" if len(tree["groups"]) == 1 else f"{group['name']}, {exits}"
                found.append((f"set-{number}-{exits}", words, group["name"], exits))
    return found


def _facts(tree: Tree) -> list[tuple[str, str]]:
    return [
        ("split", f"{tree['split']}, {tree['num_instances']:,} instances"),
        ("seeds", ", ".join(map(str, tree["seeds"]))),
        ("layers", str(tree["num_layers"])),
        *([("a layer counts", _layer_costs(tree))] if tree.get("cost") == "latency" else []),
        ("metric", metric_name(tree["metric"])),
        ("full depth", f"{100 * tree['full_depth_score']['pooled']:.2f} %"),
    ]


def _layer_costs(tree: Tree) -> str:
    """The measured price of each layer, first seed."""
    steps = np.diff(tree["layer_costs"][0], prepend=0.0)
    return f"its time: {' '.join(f'{value:.2f}' for value in steps)}"


def _headline(tree: Tree) -> list[str]:
    found = [f"{text[0].upper()}{text[1:]}." for text in verdicts(tree)]
    if found:
        return found
    best = tree["best_baseline"]
    named = [f"{words}: {method_name(tree, best[point])}" for point, words in POINTS.items() if best[point]]
    return [f"Most layers saved, {'; '.join(named)}."] if named else []


def _tiles(tree: Tree) -> list[dict[str, str]]:
    tiles = []
    ours = tree["methods"].get(tree["ours"])
    for point, words in POINTS.items():
        if ours is not None:
            one = ours[point]
            tiles.append(
                ("main", f"saved layers, {words}", f"{100 * one['saved_layers']:.1f}", "%", span(one["interval"]))
            )
        if tree["difference"]:
            gain = tree["difference"][point]
            low = gain["interval"][0] if gain["interval"] else 0.0
            kind = "good" if low > 0 else "warn" if gain["saved_layers"] >= 0 else "cost"
            note = f"{span(gain['interval'])}; {method_name(tree, gain['baseline'])}"
            tiles.append((kind, f"over the best baseline, {words}", signed(gain["saved_layers"]), "points", note))
    oracle = tree["oracle"]
    tiles.append(("good", "oracle", f"{100 * oracle['saved_layers']:.1f}", "%", f"score {100 * oracle['score']:.2f} %"))
    return [dict(zip(("kind", "name", "value", "unit", "note"), tile, strict=True)) for tile in tiles]


def _transferred(tree: Tree) -> list[str]:
    if not tree["transferred"]:
        return []
    sentences = []
    for point, words in POINTS.items():
        found, ours = tree["transferred"][point], tree["methods"][tree["ours"]]["transferred"][point]
        sentences.append(
            f"{words[0].upper()}{words[1:]} on dev: ConsistentEE scores {100 * ours['score']:.2f} % here and saves "
            f"{100 * ours['saved_layers']:.1f} % of the layers; against {method_name(tree, found['baseline'])}, the "
            f"best baseline on dev, that is {gain_text(found)} points of saved layers and {signed(found['score'], 2)} "
            f"[{span(found['score_interval'])}] points of score."
        )
    return sentences


def _by_seed(tree: Tree) -> dict[str, Any] | None:
    """Saved layers of ours and the best baselines, seed by seed."""
    best = [key for key in dict.fromkeys(tree["best_baseline"].values()) if key]
    keys = [key for key in (tree["ours"], *best) if key]
    if len(tree["seeds"]) < 2 or not keys:
        return None
    header = ["seed", "full depth %"]
    header += [f"{method_name(tree, key)}, {words}, saved %" for key in keys for words in POINTS.values()]
    depth = {row["seed"]: row["score"] for row in tree["full_depth_score"]["by_seed"]}
    rows = []
    for seed in tree["seeds"]:
        cells = [str(seed), f"{100 * depth[seed]:.2f}"]
        for key in keys:
            for point in POINTS:
                found = {row["seed"]: row["saved_layers"] for row in tree["methods"][key][point]["by_seed"]}
                cells.append(f"{100 * found[seed]:.1f}" if seed in found else "–")
        rows.append(cells)
    return {"header": header, "rows": rows}


def _notes(tree: Tree) -> list[str]:
    notes = []
    if tree["split"] == "dev":
        notes.append("Measured on dev, on which the runs chose their round: all figures are a little optimistic.")
    missed = [key for key, m in tree["methods"].items() if not (m["no_loss"]["reached"] and m["within_1"]["reached"])]
    if missed:
        notes.append(
            "* At no threshold does every seed reach the score; a seed that does not counts as 0 % saved. Where none "
            "does, the score is that of its own full depth."
        )
    return notes


def _origin(tree: Tree) -> list[tuple[str, str]]:
    rows = [(f"runs of {group['name']}", ", ".join(group["runs"])) for group in tree["groups"]]
    rows += [("bootstrap", f"{tree['replicates']} replicates")]
    rows += [(f"time, {name}", duration(value)) for name, value in tree["seconds"].items()]
    rows += [(name, str(tree[name])) for name in ("command", "date") if tree[name]]
    return rows + [(name, str(value)) for name, value in {**tree["versions"], **tree["machine"]}.items()]
