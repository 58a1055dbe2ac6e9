"""Tables of decoders, from the files that benchmarks/generation.py and finished runs leave."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rl_exit.report_generation import RULES

SPEEDS = (1.25, 1.5, 1.75, 2.0, 2.5)
"""Full depth over mean exit layer at which the curves are read."""

GAP, GAP_TO_FULL = 0.3, 0.25
"""Of saved layers: between points further apart a curve is not read; the second from full depth, where it is steep."""

CURVES = {
    "policy": "policy, one for each price",
    "policy_at_one_price": "policy, one swept",
    **{word: RULES[word] for word in ("calm_softmax", "calm_saturation", "calm_meta", "fixed")},
}

Points = Sequence[dict[str, Any]]


def read_at(points: Points, saved: float, value: Callable[[dict[str, Any]], float], by: str) -> float | None:
    """A curve's value at a share of saved layers, on the line between near neighbours; None where there are none."""
    ordered = sorted((row[by], value(row)) for row in points)
    for (x0, y0), (x1, y1) in itertools.pairwise(ordered):
        if x0 <= saved <= x1 and x1 - x0 <= (GAP if x0 > 0.0 else GAP_TO_FULL):
            return y0 if x1 == x0 else y0 + (y1 - y0) * (saved - x0) / (x1 - x0)
    return None


MEASURES: tuple[tuple[str, str, Callable[[dict[str, Any]], float], Callable[[float], float], float], ...] = (
    ("agreement %", "saved_layers", lambda row: row["agreement"], lambda value: value, 100.0),
    ("perplexity", "saved_layers", lambda row: math.log(row["perplexity"]), math.exp, 1.0),
    ("Rouge-L to full depth", "written_saved_layers", lambda row: row["rouge_l_full"], lambda value: value, 100.0),
)


def curve_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): for each speed and rule the mean over seeds of each measure, with least and greatest."""
    seeds = results["seeds"]
    header = ["rule", "layers, times", *(measure[0] for measure in MEASURES)]
    rows = []
    for speed in SPEEDS:
        for word, name in CURVES.items():
            cells = [name, f"{speed:g}"]
            for _, by, value, back, scale in MEASURES:
                found = [read_at(_with_full(seed, word), 1.0 - 1.0 / speed, value, by) for seed in seeds]
                known = [scale * back(one) for one in found if one is not None]
                cells.append(_spread(known) if len(known) == len(seeds) else "–")
            rows.append(cells)
    return header, rows


def _with_full(seed: dict[str, Any], word: str) -> list[dict[str, Any]]:
    """A rule's points and full depth, where every curve begins."""
    return [*seed["rules"][word], *seed["rules"]["full"]]


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} [{min(values):.2f} to {max(values):.2f}]"


def proven_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): what Learn-then-Test allows, seed by seed."""
    rows = []
    for seed in results["seeds"]:
        for word, found in seed["learn_then_test"]["rules"].items():
            shown = ["–", "–", "–"]
            if "threshold" in found:
                shown = [
                    f"{found['threshold']:g}",
                    f"{100 * (1 - found['agreement']):.1f}",
                    f"{100 * found['saved_layers']:.1f}",
                ]
            rows.append([RULES[word], str(seed["seed"]), *shown])
    return ["rule", "seed", "lambda", "changed tokens on test, %", "saved layers %"], rows


def written_rows(runs: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): the figures of finished runs of decoders."""
    header = [
        "run",
        "split",
        "tokens",
        "accuracy % at full depth",
        "with exits",
        "agreement %",
        "perplexity at full depth",
    ]
    header += [
        "with exits",
        "saved layers %",
        "Rouge-L at full depth",
        "with exits",
        "BERTScore-F",
        "with exits",
        "speed-up",
    ]
    rows = []
    for name, run in sorted(runs.items()):
        found = run["results"]
        for split in ("dev", "test"):
            if not found.get(split):
                continue
            text, row = found["generation"][split], found[split]
            bert = text.get("bert_f") or {}
            rows.append(
                [
                    name,
                    split,
                    str(row["num_instances"]),
                    f"{100 * row['full_depth_score']:.2f}",
                    f"{100 * row['score']:.2f}",
                    f"{100 * text['teacher_forced']['agreement']:.1f}",
                    f"{text['full_depth_perplexity']:.2f}",
                    f"{text['teacher_forced']['perplexity']:.2f}",
                    f"{100 * row['saved_layers']:.1f}",
                    *(f"{100 * text['rouge_l'][key]:.2f}" for key in ("full", "exits")),
                    *(f"{100 * bert[key]:.2f}" if key in bert else "–" for key in ("full", "exits")),
                    f"{found['timing'][split]['speedup']:.2f}",
                ]
            )
    return header, rows
