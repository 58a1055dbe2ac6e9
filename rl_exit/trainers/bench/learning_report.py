"""Table and curves of ``rl-exit bench learning``, from its results alone."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

# Okabe-Ito, as in the report; readable on light and dark pages.
COLOURS = {
    "exact": "#7f7f7f",
    "pg": "#0072b2",
    "ppo": "#d55e00",
    "appo": "#009e73",
    "impala": "#cc79a7",
    "dqn": "#e69f00",
}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 64, 24, 96, 56
LOWEST, HIGHEST = 0.80, 1.0


def learning_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The results as text.

    Args:
        results: From :func:`rl_exit.trainers.bench.learning.run`.

    Returns:
        (header, one row per algorithm). Shares are means over the seeds of the policy that is judged, the last ones
        with their range; columns before the end are those that all algorithms have run to.
    """
    entries = results["algorithms"]
    count = results["store"]["num_instances"]
    shortest = min(entry["per_instance"] for entry in entries.values())
    marks = [mark for mark in (shortest // 10, shortest) if mark > 0]
    header = ["algorithm", *(f"at {_millions(mark * count)}" for mark in marks)]
    header += ["trajectories", "at the end (range)", "greedy", "target", "reached", "trajectories/s"]
    rows = []
    for name, entry in entries.items():
        end = entry[entry["judged"]]
        drawn = entry["curve"][-1]["trajectories"]
        rate = drawn * len(entry["runs"]) / max(1e-9, sum(run["seconds"] for run in entry["runs"]))
        rows.append(
            [
                name,
                *(percent(share_at(entry, mark * count)) for mark in marks),
                _millions(drawn),
                f"{percent(end['mean'])} ({100 * end['min']:.1f} to {100 * end['max']:.1f})",
                percent(entry["greedy"]["mean"]),
                f"{100 * entry['target']:.0f} %",
                "yes" if reached(entry) else "no",
                f"{rate:,.0f}",
            ]
        )
    return header, rows


def learning_table(results: Mapping[str, Any]) -> Table:
    """The same for the terminal."""
    header, rows = learning_rows(results)
    table = Table(title="bench learning", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, words in enumerate(header):
        table.add_column(words, justify="left" if index < 1 else "right", overflow="fold")
    for cells in rows:
        table.add_row(*map(Text, cells))
    return table


def reached(entry: Mapping[str, Any]) -> bool:
    """Whether the mean over the seeds reaches the target."""
    return bool(entry[entry["judged"]]["mean"] >= entry["target"])


def share_at(entry: Mapping[str, Any], trajectories: float) -> float:
    """Mean share at the first point of the curve with so many trajectories."""
    points = entry["curve"]
    return float(next((p["mean"] for p in points if p["trajectories"] >= 0.999 * trajectories), points[-1]["mean"]))


def percent(share: float) -> str:
    """``0.9912`` -> ``"99.1 %"``; rounded down, so that what is shown as reached is reached."""
    return f"{math.floor(1000 * share + 1e-9) / 10:.1f} %"


def _millions(number: float) -> str:
    return f"{number / 1e6:.2f}M"


def learning_svg(results: Mapping[str, Any]) -> str:
    """Share against trajectories, on a logarithmic axis: a line (mean) and a band (range of the seeds) each."""
    entries = results["algorithms"]
    last = max(entry["curve"][-1]["trajectories"] for entry in entries.values())
    first = min(point["trajectories"] for entry in entries.values() for point in entry["curve"][1:])
    span = math.log(last / first)

    def x(trajectories: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(max(trajectories, first) / first) / span

    def y(share: float) -> float:
        inside = (min(max(share, LOWEST), HIGHEST) - LOWEST) / (HIGHEST - LOWEST)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - inside)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13" role="img">',
        "<title>Share of the best reachable return by trajectories drawn</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for tenth in range(round(100 * LOWEST), round(100 * HIGHEST) + 1, 5):
        parts += [_line(LEFT, y(tenth / 100), WIDTH - RIGHT, y(tenth / 100), "#dddddd")]
        parts += [_text(LEFT - 8, y(tenth / 100) + 4, f"{tenth} %", "end")]
    for target in sorted({entry["target"] for entry in entries.values()}):
        parts += [_line(LEFT, y(target), WIDTH - RIGHT, y(target), "#888888", 'stroke-dasharray="5 4"')]
    for power in range(math.ceil(math.log10(first)), math.floor(math.log10(last)) + 1):
        parts += [_line(x(10**power), TOP, x(10**power), HEIGHT - BOTTOM, "#dddddd")]
        parts += [_text(x(10**power), HEIGHT - BOTTOM + 18, f"{10**power:,}", "middle")]
    parts += [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "trajectories", "middle")]
    ends: list[float] = []
    for name, entry in entries.items():
        colour = COLOURS.get(name, "#000000")
        points = [point for point in entry["curve"][1:] if point["mean"] >= LOWEST]
        if not points:
            continue
        upper = [f"{x(p['trajectories']):.1f},{y(p['max']):.1f}" for p in points]
        lower = [f"{x(p['trajectories']):.1f},{y(p['min']):.1f}" for p in reversed(points)]
        middle = [f"{x(p['trajectories']):.1f},{y(p['mean']):.1f}" for p in points]
        parts += [f'<polygon points="{" ".join(upper + lower)}" fill="{colour}" opacity="0.15"/>']
        parts += [f'<polyline points="{" ".join(middle)}" fill="none" stroke="{colour}" stroke-width="2"/>']
        at = y(points[-1]["mean"]) + 4
        while any(abs(at - taken) < 13 for taken in ends):
            at += 2
        ends.append(at)
        parts += [_text(x(points[-1]["trajectories"]) + 6, at, name, "start", colour)]
    return "\n".join([*parts, "</svg>", ""])


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {more}/>'


def _text(x: float, y: float, words: str, anchor: str, colour: str = "#333333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{html.escape(words)}</text>'
