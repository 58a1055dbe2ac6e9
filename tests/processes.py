"""Processes of their own that need not import torch, transformers and Ray again: forks of one that has done so.

Half the time of a short command is spent on imports. A command that is run here has its own process, working folder,
environment, standard streams and end, as one started from a shell has; it comes from a server that has read the
libraries and done nothing else. What the start of an interpreter is part of (``--help`` in time, a light import,
variables read by the interpreter) is tested with ``subprocess``.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "transformers.models.bert.modeling_bert",
        "sklearn.metrics",
        "torch.utils.tensorboard",
        "ray.rllib.algorithms.ppo",
        "ray.train.torch",
        "ray.rllib.algorithms.dqn",
        "datasets",
        "plotly.offline",
        "pyarrow.json",
        "rl_exit.cluster.session",
        "rl_exit.prediction",
        "rl_exit.report",
        "rl_exit.trainers.alternation",
        "rl_exit.trainers.evaluate",
    ]
)


def run(
    work: Callable[..., Any],
    *args: Any,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 280.0,
) -> CompletedProcess[str]:
    """Call ``work(*args)`` in a process of its own; ``work`` is a function of a module's top level.

    Args:
        work: What is done; it may end with ``SystemExit``.
        args: Its arguments.
        cwd: Working folder.
        env: Variables that differ from this process's.
        timeout: Seconds until it is killed, and an error is raised.
    """
    with tempfile.TemporaryDirectory(prefix="rl-exit-process-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = FORKS.Process(
            target=_run, args=(work, args, str(cwd or Path.cwd()), dict(env or {}), str(out), str(err))
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{work.__name__}{args}: not done after {timeout:.0f} s: {_text(err)[-2000:]}")
        return CompletedProcess([work.__name__, *map(str, args)], process.exitcode, _text(out), _text(err))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _run(work: Callable[..., Any], args: tuple[Any, ...], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(cwd)
    os.environ.update(env)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]  # read at a start only
    try:
        work(*args)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out, and Ray's shut-down is among them
        sys.stdout.flush()
        sys.stderr.flush()
