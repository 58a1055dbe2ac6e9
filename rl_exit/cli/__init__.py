"""The command line. Modules that bring in torch or Ray are imported by the command that needs them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# In the order in which --help lists their commands.
from rl_exit.cli import models, generation, deploy, serving, studies, clusters, catalogue, benchmarks  # isort: skip
from rl_exit.cli.apps import app

__all__ = [
    "app",
    "benchmarks",
    "catalogue",
    "clusters",
    "deploy",
    "generation",
    "main",
    "models",
    "serving",
    "studies",
]


def main() -> None:
    """Entry point of the ``rl-exit`` command."""
    # A stream that the caller closed: the next file opened would take its number, and what is printed.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - for as long as the process lives
    app()
