"""Commands that measure this machine: bench sampling, learning, inference, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rl_exit.cli.apps import bench_app
from rl_exit.cli.common import Json, print_json, print_table, told


@bench_app.command("sampling", epilog="Example: `rl-exit bench sampling --quick`")
@told
def bench_sampling(
    quick: Annotated[bool, typer.Option("--quick", help="Within a minute, fewer repetitions.")] = False,
    as_json: Json = False,
) -> None:
    """Trajectory sampling and policy training against RLlib's own runner and the bare torch loop."""
    from rl_exit.listings import bench_table
    from rl_exit.progress import Terminal
    from rl_exit.trainers.bench.sampling import run

    results = run(quick, Terminal())
    if as_json:
        print_json(results)
    else:
        print_table(bench_table(results))


@bench_app.command("learning", epilog="Example: `rl-exit bench learning runs/docstrings/rounds/2/store-train --quick`")
@told
def bench_learning(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A state store, e.g. runs/NAME/rounds/1/store-train.")],
    quick: Annotated[bool, typer.Option("--quick", help="A twentieth of the trajectories, for a look.")] = False,
    as_json: Json = False,
) -> None:
    """Share of the best reachable return that each algorithm reaches, by trajectories drawn."""
    from rl_exit.progress import Terminal
    from rl_exit.trainers.bench.learning import run
    from rl_exit.trainers.bench.learning_report import learning_table

    results = run(store, Terminal(), quick=quick)
    if as_json:
        print_json(results)
    else:
        print_table(learning_table(results))


@bench_app.command("inference", epilog="Example: `rl-exit bench inference runs/docstrings --quick`")
@told
def bench_inference(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Run directories, or models of a run.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds.")] = False,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1, 8, 32 and 128.")] = None,
    speedup: Annotated[float, typer.Option(help="What is asked for.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Time saved by layers saved, overhead of the exits, speed asked for against measured, and the guarantee."""
    from rl_exit.engine_bench import run
    from rl_exit.listings import inference_table
    from rl_exit.progress import Terminal

    results = run(models, Terminal(), quick=quick, batch_sizes=batch_size or (), speedup=speedup)
    if as_json:
        print_json(results)
    else:
        print_table(inference_table(results))


@bench_app.command("generation", epilog="Example: `rl-exit bench generation --quick`")
@told
def bench_generation(
    quick: Annotated[bool, typer.Option("--quick", help="Short contexts and few repetitions.")] = False,
    as_json: Json = False,
) -> None:
    """Tokens per second with exits against full depth, and the share of the saved layers that the clock shows."""
    from rl_exit.listings import generation_table
    from rl_exit.progress import Terminal
    from rl_exit.trainers.bench.generation import run

    results = run(quick, Terminal())
    if as_json:
        print_json(results)
    else:
        print_table(generation_table(results))
