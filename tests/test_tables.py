from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from rl_exit.tables import plain_table, points_lost, print_table, results_table


def results(**changes: Any) -> dict[str, Any]:
    row = {
        "full_depth_score": 0.9267,
        "score": 0.9217,
        "mean_exit_layer": 2.4,
        "saved_layers": 0.6,
        "oracle_score": 0.97,
    }
    return {
        "task": "docs",
        "run_name": "run[bold]",
        "num_layers": 6,
        "dev": row,
        "test": {**row, "score": 0.9301},
        **changes,
    }


def printed(tree: dict[str, Any], **options: Any) -> str:
    buffer = io.StringIO()
    print_table(Console(file=buffer, **options), results_table(tree))
    return buffer.getvalue()


def test_piped_output_is_plain_aligned_text() -> None:
    text = printed(results(), width=20)
    lines = text.splitlines()
    assert text.isascii() and "\x1b" not in text
    assert lines[0].startswith("run[bold]:")
    assert lines[1].split("  ")[0] == "split" and "saved layers %" in lines[1] and "mean exit layer of 6" in lines[1]
    assert lines[2].split() == ["dev", "92.67", "92.17", "-0.50", "2.40", "60.0", "97.00"]
    assert lines[3].split() == ["test", "92.67", "93.01", "+0.34", "2.40", "60.0", "97.00"]
    assert len(lines) == 4
    assert len({line.rindex(".") for line in lines[2:]}) == 1


def test_terminal_output_is_coloured_and_fits_80_columns() -> None:
    text = printed(results(), width=80, force_terminal=True, color_system="standard")
    assert "\x1b[" in text and "…" not in text
    assert "run[bold]" in text and "-0.50" in text and "60.0" in text


def test_no_test_split() -> None:
    assert printed(results(test=None)).splitlines()[3].split() == ["test", *"------"]


def test_plain_table_leaves_the_table_alone() -> None:
    table = results_table(results())
    before = [column.header for column in table.columns]
    assert plain_table(table) == plain_table(table)
    assert [column.header for column in table.columns] == before and table.box is not None


@pytest.mark.parametrize(("with_exits", "expected"), [(0.9, 0.0), (0.89999999, 0.0), (0.895, -0.5), (0.912, 1.2)])
def test_points(with_exits: float, expected: float) -> None:
    points = points_lost({"full_depth_score": 0.9, "score": with_exits})
    assert points == pytest.approx(expected)
    assert not f"{points:+.2f}".startswith("-0.00")
