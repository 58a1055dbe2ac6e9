"""What a sweep found as rows of text, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl_exit.analysis.tables import TextTable


def settings_table(results: Mapping[str, Any]) -> TextTable:
    """One row per setting, means over its finished seeds with the standard deviation behind ±."""
    short = results["keys"]
    rows = []
    for entry in results["settings"]:
        cells = [str(entry["settings"][key]) for key in short]
        cells.append(f"{len(entry['seeds'])} of {len(results['seeds'])}")
        for split in ("dev", "test"):
            found = entry[split]
            for name, scale, digits in (("score", 100, 2), ("mean_exit_layer", 1, 2), ("saved_layers", 100, 1)):
                cells.append("-" if found is None else _shown(found[name], scale, digits))
        rows.append(tuple(cells))
    header = (
        *short.values(),
        "seeds",
        *(f"{split}: {what}" for split in ("dev", "test") for what in ("score %", "mean exit layer", "saved layers %")),
    )
    return TextTable(f"{results['name']}: settings", header, tuple(rows))


def trials_table(results: Mapping[str, Any]) -> TextTable:
    """One row per run, with its state."""
    rows = []
    for row in results["trials"]:
        cells = [row["name"], row["state"]]
        for split in ("dev", "test"):
            found = row[split]
            cells += ["-", "-"] if not found else [f"{100 * found['score']:.2f}", f"{100 * found['saved_layers']:.1f}"]
        rows.append((*cells, row["error"] or ""))
    header = ("run", "state", "dev: score %", "saved layers %", "test: score %", "saved layers %", "error")
    return TextTable(f"{results['name']}: runs", header, tuple(rows))


def _shown(spread: Mapping[str, float | None], scale: float, digits: int) -> str:
    mean, sd = spread["mean"], spread["sd"]
    assert mean is not None
    return f"{scale * mean:.{digits}f}" + ("" if sd is None else f" ± {scale * sd:.{digits}f}")
