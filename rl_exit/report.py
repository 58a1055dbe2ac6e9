"""The report of a run: one self-contained HTML page, written from the run directory's files.

Reads ``results.json`` (required), ``evaluation.json``, ``metrics.parquet`` and ``config.yaml``; where one of the last
three is missing or unreadable the page says so. The page holds plotly.js and loads nothing.

``evaluation.json``: ``{"dev": split, "test": split, "label_names": [...], "init": {"dev": {...}, "test": {...}}}``
where ``split`` is the dict of :class:`rl_exit.evaluation.SplitResult` and ``init`` holds ``exit_scores`` and
``exit_losses`` of the exits before the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from rl_exit import figures
from rl_exit.config import describe_keys, parse_yaml
from rl_exit.errors import RunError
from rl_exit.files import read_json, write_text
from rl_exit.pages import render_page
from rl_exit.report_generation import generation_section
from rl_exit.report_training import training_charts
from rl_exit.tables import points_lost

SECTIONS = (
    ("result", "Result"),
    ("exits", "Exits"),
    ("text", "Text"),
    ("training", "Training"),
    ("time", "Time"),
    ("configuration", "Configuration"),
    ("versions", "Versions"),
)
SPLITS = ("test", "dev")
_SCORES = ("full_depth_score", "score", "mean_exit_layer", "saved_layers", "oracle_score")
_SPLIT_KEYS = (
    *("metric", "num_instances", "num_layers", "curve", "exit_scores", "exit_losses", "exit_histogram"),
    *("histogram_by_class", "histogram_by_memorized", "oracle_mean_exit_layer", *_SCORES),
)


def write_report(run_dir: Path) -> Path:
    """Write ``report/index.html`` of a finished run, whole or not at all.

    Args:
        run_dir: The run directory.

    Returns:
        Path of the page.

    Raises:
        RunError: No or malformed results.
        UserError: No space left, or the folder cannot be written.
    """
    folder = Path(run_dir)
    page = render(*_read_run(folder))
    target = folder / "report" / "index.html"
    write_text(target, page)
    return target


def render(
    results: Mapping[str, Any],
    evaluation: Mapping[str, Any] | str | None,
    metrics: Mapping[str, list[Any]] | str,
    config: str,
) -> str:
    """The page as text.

    Args:
        results: Tree of ``results.json``.
        evaluation: Tree of ``evaluation.json``, None where there is none, or a sentence that says why it is not used.
        metrics: Columns of ``metrics.parquet``, or a sentence that says why there are none.
        config: Text of ``config.yaml``, empty where there is none.
    """
    found = evaluation if isinstance(evaluation, Mapping) else {}
    splits = [split for split in SPLITS if found.get(split)]
    main = next(split for split in SPLITS if results.get(split))
    charts, drawn = _exit_charts(found, splits)
    training, curves = training_charts(metrics) if not isinstance(metrics, str) else ([], {})
    phases = {k: float(v) for k, v in (results.get("seconds") or {}).items() if v is not None and math.isfinite(v)}
    sections, config_note = _config_sections(config)
    text = generation_section(found, results.get("timing"))
    metric = figures.metric_name(results.get("metric") or (found[splits[0]]["metric"] if splits else "score"))
    return render_page(
        "report.html.j2",
        {**drawn, **curves, **({"seconds": figures.seconds(phases)} if phases else {})},
        run_name=results.get("run_name") or results.get("task", "run"),
        facts=_facts(results, metric),
        sections=[pair for pair in SECTIONS if pair[0] != "text" or text],
        text=text,
        main_split=main if main in splits else (splits or [main])[0],
        splits=splits,
        headline=_headline(results, found, main, metric),
        tiles=_tiles(results, found, main, metric),
        table=_table(results, found),
        notes=[*_notes(results, splits), *([evaluation] if isinstance(evaluation, str) else [])],
        exit_charts=charts,
        training=training,
        training_note=metrics if isinstance(metrics, str) else "metrics.parquet holds no rows.",
        total_time=_total_time(phases),
        phases=_phase_rows(phases),
        config=sections,
        config_note=config_note,
        versions=list((results.get("versions") or {}).items()),
    )


# Steps that train exits or backbone: what plain fine-tuning of as many epochs would cost too.
_FINE_TUNING = ("init", "task")


def _total_time(phases: Mapping[str, float]) -> str:
    """The sum in words, and how many times the fine-tuning in it that is."""
    if not phases:
        return ""
    total = sum(phases.values())
    tuning = sum(value for name, value in phases.items() if name.rsplit("-", 1)[-1] in _FINE_TUNING)
    # Less than that is no training: the initialisation was taken from elsewhere.
    ratio = f" That is {total / tuning:.2f} times its fine-tuning (init and task steps)." if tuning > total / 20 else ""
    return f"{figures.duration(total)} in all phases together.{ratio}"


def _phase_rows(phases: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Phase, time, share."""
    total = sum(phases.values()) or 1.0
    return [
        (name.replace("_", " "), figures.duration(value), f"{100 * value / total:.1f} %")
        for name, value in phases.items()
    ]


def _read_run(
    folder: Path,
) -> tuple[dict[str, Any], dict[str, Any] | str | None, dict[str, list[Any]] | str, str]:
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run directory")
    if not (folder / "results.json").exists():
        raise RunError(
            f"{folder}: no results.json; the run has not finished (continue it with rl-exit train --resume) "
            "or this is no run directory"
        )
    results = read_json(folder / "results.json")
    _check_results(results, folder / "results.json")
    path = folder / "config.yaml"
    try:
        config = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    evaluation = _read_evaluation(folder / "evaluation.json")
    return results, evaluation, _read_metrics(folder / "metrics.parquet"), config


def _read_evaluation(path: Path) -> dict[str, Any] | str | None:
    if not path.exists():
        return None
    unused = "so there are no curves of the exits"
    try:
        tree = read_json(path)
    except RunError as error:
        return f"evaluation.json cannot be read, {unused}: {str(error).removeprefix(f'{path}: ')}"
    for split in SPLITS:
        found = tree.get(split) or dict.fromkeys(_SPLIT_KEYS)
        missing = [key for key in _SPLIT_KEYS if not isinstance(found, dict) or key not in found]
        if missing:
            return f"evaluation.json is incomplete, {unused}: {split}: {', '.join(missing)} missing"
    if not isinstance(tree.get("init") or {}, dict) or not isinstance(tree.get("label_names") or [], list):
        return f"evaluation.json is not of the expected form, {unused}: init, label_names"
    return tree


def _check_results(results: Mapping[str, Any], path: Path) -> None:
    present = [split for split in SPLITS if results.get(split)]
    if not present or not isinstance(results.get("num_layers"), int):
        raise RunError(f"{path}: 'num_layers' and at least one of 'dev' and 'test' are expected")
    for split in present:
        row = results[split]
        wrong = [
            key for key in _SCORES if not isinstance(row.get(key) if isinstance(row, dict) else None, (int, float))
        ]
        if wrong:
            raise RunError(f"{path}: {split}: a number is expected for {', '.join(wrong)}")
    for key in ("seconds", "versions", "initial_full_depth", "timing"):
        if not isinstance(results.get(key) or {}, dict):
            raise RunError(f"{path}: {key}: a mapping is expected")
    wrong = [
        key for key, value in (results.get("seconds") or {}).items() if not isinstance(value, (int, float, NoneType))
    ]
    if wrong:
        raise RunError(f"{path}: seconds: a number is expected for {', '.join(wrong)}")


def _read_metrics(path: Path) -> dict[str, list[Any]] | str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return "This run has no metrics.parquet, so there are no training curves."
    columns = ["phase", "round", "step", "epoch", "metric", "value"]
    try:
        return pq.read_table(path, columns=columns).to_pydict()
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        return f"metrics.parquet cannot be read, so there are no training curves: {str(error).splitlines()[0]}"


def _facts(results: Mapping[str, Any], metric: str) -> list[tuple[str, Any]]:
    facts = [(key, results.get(key)) for key in ("task", "algorithm", "seed")]
    facts += [("layers", results["num_layers"]), ("metric", metric), ("threshold", _number(results.get("threshold")))]
    if results.get("policy_rule") == "confidence":
        facts.append(("leaves by", "confidence: the policy was no better on instances new to it"))
    return [(name, value) for name, value in facts if value not in (None, "")]


def _headline(results: Mapping[str, Any], found: Mapping[str, Any], main: str, metric: str) -> list[str]:
    row, layers = results[main], results["num_layers"]
    count = row.get("num_instances") or (found.get(main) or {}).get("num_instances")
    points = points_lost(row)
    full, left = f"{100 * row['full_depth_score']:.2f}\u00a0%", f"{100 * row['score']:.2f}\u00a0%"
    where = f"On the {main} split" + (f" ({count:,} instances)" if count else "")
    sentences = [
        f"{where} the model answers after {row['mean_exit_layer']:.2f} of {layers} layers on average: "
        f"{100 * row['saved_layers']:.1f}\u00a0% of the layers are saved."
    ]
    if points < 0:
        sentences.append(f"That costs {-points:.2f} points of {metric}: {full} at full depth, {left} with exits.")
    elif points > 0:
        sentences.append(f"It costs nothing: {metric} is {full} at full depth and {left} with exits.")
    else:
        sentences.append(f"It costs nothing: {metric} is {full} either way.")
    before = (results.get("initial_full_depth") or {}).get(main)
    if before is not None:
        change = round(100 * (row["full_depth_score"] - before), 2) + 0.0
        sentences.append(
            f"Before the rounds, full depth stood at {100 * before:.2f}\u00a0% ({_signed(change)} points since)."
        )
    timing = (results.get("timing") or {}).get(main) or {}
    if timing.get("speedup"):
        size = timing.get("batch_size")
        where = f" in batches of {size}" if size else ""
        sentences.append(f"Measured{where}, that is {timing['speedup']:.2f} times the speed of full depth.")
    return sentences


def _tiles(results: Mapping[str, Any], found: Mapping[str, Any], main: str, metric: str) -> list[dict[str, str]]:
    row, layers = results[main], results["num_layers"]
    points = points_lost(row)
    oracle = (found.get(main) or {}).get("oracle_mean_exit_layer")
    kind = "good" if points >= 0 else "warn" if points > -1 else "cost"
    tiles = [
        ("main", "layers saved", f"{100 * row['saved_layers']:.1f}", "%", f"{main} split"),
        ("main", "mean exit layer", f"{row['mean_exit_layer']:.2f}", f"of {layers}", "forced exit at the last"),
        (
            "main",
            f"{metric} with exits",
            f"{100 * row['score']:.2f}",
            "%",
            f"full depth {100 * row['full_depth_score']:.2f} %",
        ),
        (kind, "difference", _signed(points), "points", "with exits minus full depth"),
        (
            "good",
            "oracle",
            f"{100 * row['oracle_score']:.2f}",
            "%",
            f"at layer {oracle:.2f}" if oracle else "upper bound",
        ),
    ]
    return [dict(zip(("kind", "name", "value", "unit", "note"), tile, strict=True)) for tile in tiles]


def _table(results: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    columns = [
        *("instances", "full depth %", "with exits %", "difference, points", "mean exit layer", "saved layers %"),
        *("oracle %", "oracle exit layer", "full depth before the rounds %"),
    ]
    rows = []
    for split in reversed(SPLITS):
        row, more = results.get(split), found.get(split) or {}
        if not row:
            continue
        before = (results.get("initial_full_depth") or {}).get(split)
        cells = [
            f"{more['num_instances']:,}" if more else "–",
            f"{100 * row['full_depth_score']:.2f}",
            f"{100 * row['score']:.2f}",
            _signed(points_lost(row)),
            f"{row['mean_exit_layer']:.2f} of {results['num_layers']}",
            f"{100 * row['saved_layers']:.1f}",
            f"{100 * row['oracle_score']:.2f}",
            f"{more['oracle_mean_exit_layer']:.2f}" if more else "–",
            f"{100 * before:.2f}" if before is not None else "–",
        ]
        rows.append({"split": split, "cells": cells})
    return {"columns": columns, "rows": rows}


def _notes(results: Mapping[str, Any], splits: Iterable[str]) -> list[str]:
    notes = []
    if not results.get("test"):
        notes.append(
            "This task has no labelled test split. The threshold was chosen on dev, so the dev figures are a little "
            "optimistic."
        )
    missing = [split for split in SPLITS if results.get(split) and split not in splits]
    if missing and splits:
        notes.append(f"evaluation.json holds no curves for: {', '.join(missing)}.")
    return notes


def _exit_charts(found: Mapping[str, Any], splits: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    names = list(found.get("label_names") or [])
    many = any(len(found[split]["histogram_by_class"]) > figures.MAX_CLASSES for split in splits)
    ends = f" The {figures.MAX_CLASSES // 2} earliest and latest classes are shown." if many else ""
    charts = [
        ("trade-off", "Score against mean exit layer", True, "Up and to the left is better. Every point of the curve "
         "is one threshold of the exit policy; the oracle leaves at the first layer that is right."),
        ("histogram", "Where instances leave", False, "Stacked by memorized layer m, the first layer from which an "
         "exit stays right: dark is easy, bright is hard (or never right)."),
        ("by-memorized", "Exit layer by memorized layer", False, "Row percentages (instances in brackets). On the "
         "diagonal an instance leaves exactly when it is understood; left of it too early, right of it too late."),
        ("by-class", "Exit layer by class", True, "Row percentages (instances in brackets), the class that leaves "
         "earliest on top." + ends),
        ("exit-scores", "Score of each exit", False, "Everyone forced to leave at that layer."),
        ("exit-losses", "Loss of each exit", False, "Mean cross-entropy, everyone forced to leave at that layer."),
    ]  # fmt: skip
    drawn: dict[str, dict[str, Any]] = {chart[0]: {} for chart in charts}
    for name in splits:
        split, before = found[name], _before(found.get("init"), name)
        drawn["trade-off"][name] = figures.trade_off(split)
        drawn["histogram"][name] = figures.histogram(split)
        drawn["by-memorized"][name] = figures.by_memorized(split)
        drawn["by-class"][name] = figures.by_class(split, names)
        drawn["exit-scores"][name] = figures.exit_scores(split, before)
        drawn["exit-losses"][name] = figures.exit_losses(split, before)
    items = [dict(zip(("id", "title", "wide", "caption"), chart, strict=True)) for chart in charts]
    return items, drawn if splits else {}


def _before(init: Mapping[str, Any] | None, split: str) -> Mapping[str, Any] | None:
    if not init:
        return None
    # A bare dict of exits (without splits) is that of dev.
    return init.get(split) or (init if split == "dev" and "exit_scores" in init else None)


def _config_sections(text: str) -> tuple[list[dict[str, Any]], str]:
    if not text:
        return [], "This run has no config.yaml."
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError:
        return [], "config.yaml is not valid YAML."
    known = {key: (default, meaning) for key, default, meaning in describe_keys()}
    grouped: dict[str, list[dict[str, Any]]] = {}
    for key, value in _flat(tree if isinstance(tree, dict) else {}, ""):
        section = key.partition(".")[0] if "." in key else "run"
        default, meaning = known.get(key, (None, ""))
        shown = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).split("\n")[0]
        changed = default is not None and yaml.safe_load(default) != value
        row = {"key": key, "value": shown, "default": default, "changed": changed, "help": meaning}
        grouped.setdefault(section, []).append(row)
    sections = [
        {"name": name, "rows": rows, "changed": sum(row["changed"] for row in rows)} for name, rows in grouped.items()
    ]
    total = sum(section["changed"] for section in sections)
    return sections, f"{total or 'No'} settings differ from the defaults{'; they are marked.' if total else '.'}"


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _signed(points: float) -> str:
    return f"{points:+.2f}".replace("-", "−")


def _number(value: Any) -> str | None:
    return f"{value:.4g}" if isinstance(value, (int, float)) else None
