"""Tables for the terminal: coloured there, plain aligned text where the output is piped."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 10_000  # Columns of a pipe: nothing is folded or cut.


def results_table(results: Mapping[str, Any]) -> Table:
    """The outcome of a run, one row per split.

    Args:
        results: The tree of ``results.json``: scores and saved layers are fractions, shown in percent and points.

    Returns:
        A table; print it with :func:`print_table`.
    """
    title = f"{results.get('run_name') or results.get('task', 'run')}: early exit against full depth"
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    layers = results["num_layers"]
    table.add_column("split", no_wrap=True)
    for header in (
        "full\ndepth %",
        "with\nexits %",
        "difference\npoints",
        f"mean exit\nlayer of {layers}",
        "saved\nlayers %",
        "oracle\nscore %",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for split in ("dev", "test"):
        row = results.get(split)
        if row is None:
            table.add_row(split, *["-"] * 6, style="dim")
            continue
        points = points_lost(row)
        table.add_row(
            split,
            f"{100 * row['full_depth_score']:.2f}",
            Text(f"{100 * row['score']:.2f}", style="bold"),
            Text(f"{points:+.2f}", style=_cost_style(points)),
            f"{row['mean_exit_layer']:.2f}",
            Text(f"{100 * row['saved_layers']:.1f}", style="bold cyan"),
            f"{100 * row['oracle_score']:.2f}",
        )
    return table


def points_lost(row: Mapping[str, Any]) -> float:
    """Score with exits minus full depth, in points rounded to two digits; negative where exits cost something."""
    return round(100 * (row["score"] - row["full_depth_score"]), 2) + 0.0  # + 0.0 turns -0.0 into 0.0


def print_table(console: Console, table: Table) -> None:
    """Print a table: with borders and colours on a terminal, as plain aligned columns anywhere else.

    Args:
        console: Where to; ``console.is_terminal`` decides.
        table: Any table; it is not changed.
    """
    if console.is_terminal:
        console.print(table)
        return
    console.file.write(plain_table(table))


def plain_table(table: Table) -> str:
    """The table as text: title, one header line, one line per row; no colours, borders, folding or cut cells."""
    plain = copy.copy(table)
    plain.columns = [copy.copy(column) for column in table.columns]
    for column in plain.columns:
        column.header = str(column.header).replace("\n", " ")
    plain.title, plain.box, plain.pad_edge, plain.padding = None, None, False, (0, 2, 0, 0)
    buffer = io.StringIO()
    Console(file=buffer, width=_WIDE, force_terminal=False, color_system=None).print(plain)
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    if table.title is not None:
        lines.insert(0, str(table.title))
    return "\n".join(lines) + "\n"


def _cost_style(points: float) -> str:
    if points >= 0:
        return "green"
    return "yellow" if points >= -1 else "red"
