"""What all commands share: options, errors for the user, output for people and programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rl_exit.errors import EXIT_CODE, ConfigError, UserError

INTERRUPTED = 130

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG.yaml] [key=value]...", help="A configuration file and keys that override it."),
]
Rule = Annotated[
    str | None,
    typer.Option("--criterion", metavar="WORD", help="Exit criterion in place of the policy, e.g. pabee."),
]
Params = Annotated[
    list[str] | None, typer.Option("--param", metavar="KEY=VALUE", help="Parameter of the criterion, e.g. patience=2.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def told(command: Callable[..., None]) -> Callable[..., None]:
    """Errors for the user become one message and exit code 2."""

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            fail(str(error))
        except OSError as error:
            from rl_exit.files import explain_os_error

            message = explain_os_error(error, Path("standard output"))
            if message is None:
                raise
            fail(message)
        except KeyboardInterrupt:
            resumable = command.__name__ == "train"
            further = "; the same command with --resume goes on from here" if resumable else ""
            typer.echo(f"interrupted{further}", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return guarded


def fail(message: str) -> NoReturn:
    """Say what is wrong and end with exit code 2."""
    typer.echo(f"rl-exit: {message}", err=True)
    raise typer.Exit(EXIT_CODE)


def split_words(words: list[str] | None) -> tuple[str | None, list[str]]:
    """The configuration file, if any, and the overrides."""
    files = [word for word in words or [] if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"one configuration file is accepted, not {len(files)}: {', '.join(files)}")
    return (files[0] if files else None), [word for word in words or [] if "=" in word]


def read_lines(file: Path) -> list[str]:
    """Lines of a text file ('-': standard input) without the blank ones.

    Raises:
        UserError: No such file, not UTF-8 text, or nothing in it.
    """
    try:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        # Only the ends of lines part texts, not the other characters at which Python's splitlines() cuts.
        lines = [line.removesuffix("\r") for line in raw.decode("utf-8-sig").split("\n") if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{file}: is a folder; a text file is expected") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from None
    if not lines:
        raise UserError(f"{file}: holds no text")
    return lines


def print_json(value: Any) -> None:
    """Print for programs."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_table(table: Any) -> None:
    """Print for people."""
    from rich.console import Console

    from rl_exit.tables import print_table as show

    show(Console(), table)


def print_results(results: dict[str, Any]) -> None:
    """Scores, layers and time of a model."""
    from rl_exit.tables import results_table

    print_table(results_table(results))
    for split, timing in results["timing"].items():
        typer.echo(
            f"{split}: {timing['speedup']:.2f} times as fast as full depth on this machine "
            f"(batch size {timing['batch_size']})"
        )
