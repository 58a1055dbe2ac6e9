"""Commands around one model: train, evaluate, predict, report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rl_exit.cli.apps import app
from rl_exit.cli.common import (
    Json,
    Params,
    Rule,
    Words,
    print_json,
    print_results,
    print_table,
    read_lines,
    split_words,
    told,
)
from rl_exit.errors import UserError


@app.command(epilog="Example: `rl-exit train configs/stackoverflow.yaml task.path=data/stackoverflow seed=1`")
@told
def train(
    words: Words = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of the same name.")] = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train a model with learned exits: initialisation, then rounds of policy and task step."""
    from rl_exit.config import load_config

    config = load_config(*split_words(words))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from rl_exit.cluster.reach import check_reach
    from rl_exit.cluster.session import ray_session
    from rl_exit.progress import Silent, Terminal
    from rl_exit.trainers.alternation import train as run

    with ray_session(config) as plan:
        check_reach(config)
        display = Silent() if quiet else Terminal()
        if plan.phases:
            display.say(plan.describe())
        results = run(config, display, resume=resume, overwrite=overwrite, kept=plan.kept)
    _show_results(results, config.run_dir, as_json)
    if config.storage_path is not None and not as_json:
        typer.echo(f"kept in: {config.storage_path.rstrip('/')}/{config.run_name}")


def _show_results(results: dict[str, Any], run_dir: Path, as_json: bool) -> None:
    if "num_layers" not in results:
        raise UserError(f"{run_dir / 'results.json'}: damaged; 'rl-exit evaluate {run_dir}' measures the model again")
    if as_json:
        print_json(results)
        return
    print_results(results)
    typer.echo(f"model:   {run_dir / 'model'}\nreport: {run_dir / 'report' / 'index.html'}")


@app.command(epilog="Example: `rl-exit evaluate runs/docstrings` · `rl-exit evaluate my-model task.name=sst2`")
@told
def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run directory or a model folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[task.key=value]...", help="Other data than it was trained on.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="dev or test; default: both where there are labels.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Leave where pi is above it; default: the model's.")] = None,
    criterion: Rule = None,
    param: Params = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per batch.")] = 32,
    as_json: Json = False,
) -> None:
    """Score a model with exits against its full depth, layers and time."""
    from rl_exit.trainers.evaluate import evaluate_model

    results = evaluate_model(target, overrides or [], split, threshold, batch_size, criterion, param or [])
    if as_json:
        print_json(results)
    else:
        print_results(results)


@app.command(epilog='Example: `rl-exit predict runs/docstrings/model --text "Return the eigenvalues of a matrix."`')
@told
def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a run directory or a hub id.")],
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; may be given several times.")] = None,
    text_pair: Annotated[list[str] | None, typer.Option("--text-pair", help="Second text of each --text.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", help="One text a line, blank lines left out ('-': standard input); a tab parts text pairs."
        ),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Leave where pi is above it; default: the model's.")] = None,
    criterion: Rule = None,
    param: Params = None,
    point: Annotated[str | None, typer.Option(help="Operating point that calibrate has saved, e.g. fast.")] = None,
    speed: Annotated[float | None, typer.Option(help="Place on the dial, 0 (full depth) to 1.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per batch.")] = 32,
    as_json: Json = False,
) -> None:
    """Label texts, with the layer at which each left."""
    from rl_exit.prediction import predict_texts

    texts, pairs = _read_texts(text, text_pair, file)
    rows = predict_texts(model, texts, pairs, threshold, batch_size, criterion, param or [], point, speed)
    if as_json:
        print_json(rows)
        return
    from rl_exit.listings import predictions_table

    print_table(predictions_table(texts, rows))


def _read_texts(
    text: list[str] | None, text_pair: list[str] | None, file: Path | None
) -> tuple[list[str], list[str] | None]:
    if (text is None) == (file is None):
        raise UserError("give either --text or --file")
    if text is not None:
        if text_pair and len(text_pair) != len(text):
            raise UserError(f"{len(text)} --text and {len(text_pair)} --text-pair were given; one for each is needed")
        return text, text_pair or None
    assert file is not None
    if text_pair:
        raise UserError("--text-pair goes with --text; in a file a tab parts the two texts of a line")
    lines = read_lines(file)
    tabs = {line.count("\t") for line in lines}
    if len(tabs) > 1 or max(tabs) > 1:
        found = " and ".join(str(count) for count in sorted(tabs)[:3])
        raise UserError(f"{file}: lines with {found} tabs; one tab in every line parts text pairs, texts hold none")
    if tabs == {1}:
        parts = [line.split("\t") for line in lines]
        return [a for a, _ in parts], [b for _, b in parts]
    return lines, None


@app.command(epilog="Example: `rl-exit report runs/docstrings`")
@told
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]) -> None:
    """Write the HTML report of a finished run again."""
    from rl_exit.report import write_report

    typer.echo(str(write_report(run)))
