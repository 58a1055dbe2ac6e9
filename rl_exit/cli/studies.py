"""Commands that look at several policies, criteria or runs: analyse, compare, sweep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rl_exit.cli.apps import app
from rl_exit.cli.common import (
    INTERRUPTED,
    Json,
    Words,
    fail,
    print_json,
    print_table,
    split_words,
    told,
)
from rl_exit.errors import UserError


@app.command(epilog="Example: `rl-exit analyse runs/docstrings --alphas 0.05,0.1,0.2`")
@told
def analyse(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run directory.")],
    alphas: Annotated[
        str | None, typer.Option(help="Prices of a layer, with commas between; default: around the run's own.")
    ] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """The paper's figures for a run: exits under both objectives, hardness, rewards, alpha."""
    from rl_exit.analysis.tables import analysis_tables
    from rl_exit.progress import Silent, Terminal
    from rl_exit.report_analysis import write_analysis_page
    from rl_exit.trainers.analyse import analyse as run_analysis
    from rl_exit.trainers.analyse import parse_alphas

    tree = run_analysis(run, Silent() if quiet else Terminal(), parse_alphas(alphas))
    page = write_analysis_page(run)
    if as_json:
        print_json(tree)
        return
    for table in analysis_tables(tree).values():
        print_table(table.for_terminal())
    typer.echo(f"figures: {page}")


@app.command(epilog="Example: `rl-exit compare runs/docstrings` · `rl-exit compare runs/a-seed* runs/b-seed* --json`")
@told
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories of one task.")],
    split: Annotated[str | None, typer.Option(help="dev or test; default: test where it is labelled.")] = None,
    methods: Annotated[str | None, typer.Option(help="Criteria, separated by commas; default: all.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="A folder, or a .json or .html file; default: compare/ in the first run.")
    ] = None,
    replicates: Annotated[int, typer.Option(min=0, help="Draws of the bootstrap; usual 1000-10000.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    cost: Annotated[str, typer.Option(help="layers, or latency: each layer counts its measured time.")] = "layers",
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """The peers' exit criteria on the exits of finished runs: trade-offs, operating points, intervals."""
    from rl_exit.comparison.tables import compare_table, groups_table, verdicts
    from rl_exit.progress import Silent, Terminal
    from rl_exit.trainers.compare import compare_runs, outputs, write_comparison

    words = [word.strip() for word in (methods or "").split(",") if word.strip()]
    if cost not in ("layers", "latency"):
        raise UserError(f"--cost {cost}: accepted: layers, latency")
    where = outputs(runs, output)
    tree = compare_runs(
        runs,
        Silent() if quiet else Terminal(),
        split=split,
        methods=words,
        replicates=replicates,
        seed=seed,
        command=" ".join(["rl-exit", *sys.argv[1:]]),
        cost="latency" if cost == "latency" else "layers",
    )
    write_comparison(tree, where)
    if as_json:
        print_json(tree)
        return
    print_table(compare_table(tree))
    if len(tree["groups"]) > 1:
        print_table(groups_table(tree))
    for sentence in verdicts(tree):
        typer.echo(sentence)
    typer.echo(f"page: {where.page}\njson: {where.json}")


@app.command(epilog="Example: `rl-exit sweep configs/stackoverflow.yaml --over alpha=0.003,0.01 --seeds 3`")
@told
def sweep(
    words: Words = None,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", metavar="KEY=V1,V2,...", help="Values of a key; several --over give every combination."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each setting, from seed=... on.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the sweep; default: after the task and the keys.")
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option("--max-concurrent", min=1, help="Most runs at once; default: by processors.")
    ] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train at several settings and seeds; the same command goes on with an interrupted sweep."""
    from rl_exit.trainers.sweep_plan import check_resumable, plan_sweep

    plan = plan_sweep(*split_words(words), over or [], seeds, output)
    check_resumable(plan)
    from rl_exit.cluster.reach import check_reach
    from rl_exit.cluster.sweeps import sweep_session
    from rl_exit.progress import Silent, Terminal
    from rl_exit.report_sweep import write_sweep_page
    from rl_exit.trainers.sweep import run_sweep

    try:
        with sweep_session(plan, max_concurrent) as (shares, at_once):
            check_reach(plan.trials[0].config)
            results = run_sweep(plan, Silent() if quiet else Terminal(), shares, at_once)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on with the sweep", err=True)
        raise typer.Exit(INTERRUPTED) from None
    page = write_sweep_page(plan.folder)
    if as_json:
        print_json(results)
    else:
        from rl_exit.sweep_tables import settings_table, trials_table

        print_table(settings_table(results).for_terminal())
        print_table(trials_table(results).for_terminal())
        typer.echo(f"figures: {page}\ncompare: rl-exit compare {plan.folder}/*/")
    failed = [row["name"] for row in results["trials"] if row["state"] != "finished"]
    if failed:
        fail(f"{len(failed)} of {len(results['trials'])} runs did not finish; the same command tries them again")
