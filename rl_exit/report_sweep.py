"""The page of a sweep: what each setting reaches, with its spread over seeds, in one self-contained file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_exit.figures import Figure, plain
from rl_exit.files import read_json, write_text
from rl_exit.pages import render_page
from rl_exit.sweep_tables import settings_table, trials_table

_COLORS = ("var(--blue)", "var(--orange)", "var(--green)", "var(--pink)", "var(--sky)", "var(--red)")
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "star")


def write_sweep_page(folder: Path) -> Path:
    """Write ``index.html`` of a sweep from its ``sweep.json``.

    Raises:
        RunError: There is no sweep.
        UserError: No space left, or the folder cannot be written.
    """
    page = render_sweep(read_json(Path(folder) / "sweep.json"))
    write_text(Path(folder) / "index.html", page)
    return Path(folder) / "index.html"


def render_sweep(results: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        results: Tree of ``sweep.json``.
    """
    done = [row for row in results["trials"] if row["state"] == "finished"]
    notes = []
    if len(done) < len(results["trials"]):
        notes.append(f"{len(results['trials']) - len(done)} of {len(results['trials'])} runs are not finished.")
    charts: list[dict[str, Any]] = []
    drawn: dict[str, Figure] = {}
    for split in ("dev", "test"):
        if not any(row[split] for row in done):
            continue
        for key, title, wide, figure in (
            ("trade-off", "Score against saved layers", True, trade_off(results, split)),
            ("score", "Score by setting", False, by_setting(results, split, "score", "score in %")),
            (
                "saved",
                "Saved layers by setting",
                False,
                by_setting(results, split, "saved_layers", "saved layers in %"),
            ),
        ):
            what = "every run (small) and the mean of each setting" if wide else "means over the seeds"
            caption = f"The {split} split, {what}."
            charts.append({"id": f"{key}-{split}", "title": f"{title}: {split}", "caption": caption, "wide": wide})
            drawn[f"{key}-{split}"] = figure
    lead = (
        f"{len(done)} runs: {len(results['settings'])} settings, seeds {', '.join(map(str, results['seeds']))}. "
        "The bars are one standard deviation over the seeds."
    )
    sections = [
        {
            "id": "settings",
            "title": "Settings",
            "lead": lead,
            "notes": notes,
            "charts": charts,
            "table": settings_table(results),
        },
        {
            "id": "runs",
            "title": "Runs",
            "lead": "Each is a run directory of its own, with a report.",
            "notes": [],
            "charts": [],
            "table": trials_table(results),
        },
    ]
    return render_page(
        "sections.html.j2",
        drawn,
        kind="sweep",
        title=results["name"],
        facts=[(key, len(values)) for key, values in results["over"].items()],
        sections=sections,
        source="sweep.json",
    )


def trade_off(results: Mapping[str, Any], split: str) -> Figure:
    """Score against saved layers: small marks for runs, large ones with bars for settings."""
    data: list[Figure] = []
    for index, entry in enumerate(results["settings"]):
        color, symbol, name = _COLORS[index % 6], _SYMBOLS[index // 6 % 6], setting_name(results, entry["settings"])
        runs = [row for row in results["trials"] if row["settings"] == entry["settings"] and row[split]]
        if not runs:
            continue
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "legendgroup": name,
                "showlegend": False,
                "x": [100 * row[split]["saved_layers"] for row in runs],
                "y": [100 * row[split]["score"] for row in runs],
                "customdata": [plain(row["name"]) for row in runs],
                "marker": {"symbol": symbol, "size": 6, "color": color, "opacity": 0.55},
                "hovertemplate": "%{customdata}<br>%{x:.1f} % saved, %{y:.2f} %<extra></extra>",
            }
        )
        score, saved = entry[split]["score"], entry[split]["saved_layers"]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "legendgroup": name,
                "x": [100 * saved["mean"]],
                "y": [100 * score["mean"]],
                "error_x": _bar([saved], color),
                "error_y": _bar([score], color),
                "marker": {"symbol": symbol, "size": 13, "color": color, "line": {"width": 1, "color": "var(--card)"}},
                "hovertemplate": f"{name}<br>%{{x:.1f}} % saved, %{{y:.2f}} %<extra>mean</extra>",
            }
        )
    return {"data": data, "layout": _layout("saved layers in %", "score in %", 460)}


def by_setting(results: Mapping[str, Any], split: str, key: str, title: str) -> Figure:
    """Mean of one measure for each setting, with a bar of one standard deviation."""
    entries = [entry for entry in results["settings"] if entry[split]]
    values = [entry[split][key] for entry in entries]
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [setting_name(results, entry["settings"]) for entry in entries],
        "y": [100 * value["mean"] for value in values],
        "error_y": _bar(values, "var(--blue)"),
        "line": {"color": "var(--blue)", "width": 2},
        "marker": {"size": 9},
        "hovertemplate": "%{x}: %{y:.2f} %<extra></extra>",
    }
    layout = _layout("", title, 340)
    layout["xaxis"] |= {"type": "category", "automargin": True}
    return {"data": [trace], "layout": {**layout, "showlegend": False}}


def setting_name(results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """A setting in words: ``alpha 0.1, epochs 3``."""
    return plain(", ".join(f"{short} {settings[key]}" for key, short in results["keys"].items()) or "as configured")


def _bar(values: list[dict[str, float | None]], color: str) -> dict[str, Any]:
    spread = [100 * (value["sd"] or 0.0) for value in values]
    return {"type": "data", "array": spread, "color": color, "thickness": 1.5, "visible": any(spread)}


def _layout(x_title: str, y_title: str, height: int) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x_title}},
        "yaxis": {"title": {"text": y_title}},
        "showlegend": True,
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0},
        "hovermode": "closest",
        "height": height,
    }
