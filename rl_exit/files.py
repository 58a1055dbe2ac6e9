"""Writing to disk so that nothing is lost or half written: write beside, then rename."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rl_exit.errors import RunError, StorageError, UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes the place of ``path`` when the block ends well.

    Raises:
        UserError: No space left, or the folder cannot be written.
    """
    with telling_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        beside = Path(name)
        try:
            yield beside
            beside.chmod(0o644)
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; it takes the place of ``path`` when the block ends well.

    A folder that is already there is moved aside first and removed last, so that one of the two is always whole.

    Raises:
        UserError: No space left, or the folder cannot be written.
    """
    with telling_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield beside
            beside.chmod(0o755)
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                path.replace(old)
                beside.replace(path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                beside.replace(path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping.

    Raises:
        RunError: Missing, or not a JSON mapping.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise RunError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise RunError(f"{path}: a JSON mapping is expected")
    return dict(value)


def explain_os_error(error: OSError, path: Path) -> str | None:
    """A message for the disk errors a user can mend, else None."""
    where = error.filename or path
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_space(where)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}: no access ({error.strerror})"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{where}: a file stands where a folder is needed"
    if error.errno in _TOLD or error.errno in AWAY:
        return f"{where if len(str(where)) < 200 else str(where)[:200] + '...'}: {(error.strerror or '').lower()}"
    return None


# A name too long, links in a circle, a file over the limit, too many open files, a failing or vanished disk.
_TOLD = frozenset(
    {
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EMFILE, errno.ENFILE),
        errno.ETXTBSY,
    }
)
# Storage that is away: a disk or a network file system that fails, and may be back in a moment.
AWAY = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EREMOTEIO),
    }
)


def _kind(number: int | None) -> type[UserError]:
    return StorageError if number in AWAY else UserError


def _no_space(where: object) -> str:
    return f"{where}: no space left on the device; free some and start again with --resume"


@contextmanager
def telling_disk_errors(path: Path) -> Iterator[None]:
    """Turn the disk errors a user can mend into a :class:`UserError`; ``path`` is named where the error names none."""
    try:
        yield
    except OSError as error:
        message = explain_os_error(error, path)
        if message is None:
            raise
        raise _kind(error.errno)(message) from error
    except Exception as error:  # libraries written in Rust tell disk errors in words only
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else errno.ENOSPC if "No space left on device" in str(error) else None
        if number is None or isinstance(error, UserError):
            raise
        message = explain_os_error(OSError(number, os.strerror(number)), path)
        if message is None:
            raise
        raise _kind(number)(message) from error
