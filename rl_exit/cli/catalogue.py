"""Commands that tell what there is: tasks, algorithms, config."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rl_exit.cli.apps import app, config_app
from rl_exit.cli.common import Json, Words, print_json, print_table, split_words, told
from rl_exit.errors import UserError


@app.command(epilog="Example: `rl-exit tasks docstrings`")
@told
def tasks(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Describe one task in full.")] = None,
    as_json: Json = False,
) -> None:
    """List the tasks known by name."""
    from rl_exit.data.tasks import list_tasks
    from rl_exit.errors import nearest
    from rl_exit.listings import tasks_table

    known = list_tasks()
    if name is not None:
        names = [task.name for task in known]
        if name not in names:
            raise UserError(f"unknown task '{name}'.{nearest(name, names)}")
        known = [task for task in known if task.name == name]
    if as_json:
        from dataclasses import asdict

        print_json([asdict(task) for task in known])
    elif name is not None:
        typer.echo(f"{name}: {_full_description(name)}")
    else:
        print_table(tasks_table(known))


@app.command(epilog="Example: `rl-exit algorithms` · then `rl-exit train algorithm=ppo`")
@told
def algorithms(as_json: Json = False) -> None:
    """List the RL algorithms that train the exit policy."""
    from dataclasses import asdict

    from rl_exit.listings import algorithms_table
    from rl_exit.trainers.rllib.registry import algorithms as known

    if as_json:
        print_json([asdict(info) for info in known()])
    else:
        print_table(algorithms_table(known()))


def _full_description(name: str) -> str:
    """What a task is; the built-in one is assembled first, since its sizes depend on what is installed."""
    if name != "docstrings":
        from rl_exit.data.registry import find_task

        return find_task(name).description
    from rl_exit.config import TaskConfig
    from rl_exit.data.tasks import load_task

    return load_task(TaskConfig(name=name), 0).description


@config_app.command("show", epilog="Example: `rl-exit config show configs/stackoverflow.yaml policy.epochs=3`")
@told
def config_show(
    words: Words = None,
    keys: Annotated[bool, typer.Option("--keys", help="Every key with its default and usual range.")] = False,
) -> None:
    """Print the resolved configuration, or explain every key."""
    from rl_exit.config import describe_keys, dump_config, load_config

    if keys:
        from rl_exit.listings import keys_table

        print_table(keys_table(describe_keys()))
        return
    sys.stdout.write(dump_config(load_config(*split_words(words))))


@config_app.command("validate", epilog="Example: `rl-exit config validate configs/stackoverflow.yaml`")
@told
def config_validate(words: Words = None) -> None:
    """Check a configuration; exit code 2 and one line per problem if it is not accepted."""
    from rl_exit.config import load_config

    config = load_config(*split_words(words))
    typer.echo(f"valid; the run goes to {config.run_dir}")
