"""The command ``rl-exit`` and its groups of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from rl_exit import __version__

app = typer.Typer(
    name="rl-exit",
    help="Language models that stop early: train, evaluate and use models with learned exits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Example: `rl-exit train task.name=docstrings seed=1` · documentation in docs/",
)
config_app = typer.Typer(no_args_is_help=True, help="Show or check a configuration.")
app.add_typer(config_app, name="config")
bench_app = typer.Typer(no_args_is_help=True, help="Measure rl-exit on this machine.")
app.add_typer(bench_app, name="bench")
jobs_app = typer.Typer(no_args_is_help=True, help="Jobs on a cluster: list, look at, follow, stop.")
app.add_typer(jobs_app, name="jobs")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"rl-exit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Language models that stop early."""
