"""Small C functions, compiled where a C compiler is at hand and kept for the next process; nobody has to have one.

A machine without a compiler, or with ``RL_EXIT_NATIVE=0``, runs the same computation on numpy or torch, slower. What is
compiled lies in a folder of the user's own (``$XDG_CACHE_HOME/rl-exit``, default ``~/.cache/rl-exit``), under a name
that depends on source, compiler and processor; a folder that others may write to is not used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

FLAGS = ("-O3", "-march=native", "-std=c99", "-fPIC", "-shared", "-fno-math-errno")
COMPILERS = ("cc", "gcc", "clang")
PATIENCE = 60.0  # seconds that a compiler may take


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled form of a C file; None where there is none to be had.

    Args:
        source: C99 that needs nothing but libm.
    """
    if os.environ.get("RL_EXIT_NATIVE") == "0" or os.name != "posix":
        return None
    compiler = next((path for word in COMPILERS if (path := shutil.which(word))), None)
    try:
        text = source.read_bytes()
        folder = _own_folder()
        file = folder / f"{source.stem}-{_name(text, compiler or '')}.so"
        if not file.is_file():
            if compiler is None:
                return None
            _compile(compiler, source, file)
        return ctypes.CDLL(str(file))
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None


def function(source: Path, name: str, arguments: Sequence[Any], result: Any) -> Callable[..., Any] | None:
    """A function of a C file, by ctypes; None where it cannot be had.

    Args:
        source: As in :func:`library`.
        name: The function's.
        arguments: Types of its arguments.
        result: Type of what it returns.
    """
    found = library(source)
    if found is None:
        return None
    made: Any = getattr(found, name)
    made.argtypes, made.restype = arguments, result
    called: Callable[..., Any] = made
    return called


def _own_folder() -> Path:
    """The user's folder for what was compiled.

    Raises:
        OSError: It cannot be made, or others may write to it.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "rl-exit"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.stat()
    if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder}: belongs to somebody else, or others may write to it")
    return folder


def _compile(compiler: str, source: Path, file: Path) -> None:
    """Compile beside the file, then rename: processes that start at once do not see each other's halves."""
    handle, name = tempfile.mkstemp(suffix=".so", prefix=f".{file.stem}.", dir=file.parent)
    os.close(handle)
    beside = Path(name)
    try:
        command = [compiler, *FLAGS, str(source), "-o", name, "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def _name(text: bytes, compiler: str) -> str:
    """What the compiled form depends on: a home directory may be shared by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    processor = [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2]
    parts = [
        text,
        " ".join(FLAGS).encode(),
        compiler.encode(),
        platform.machine().encode(),
        "".join(processor).encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
