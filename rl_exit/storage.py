"""Folders anywhere: a path, or a URL of any fsspec file system (s3, gs, abfs, hdfs, ...), with whole files only.

A file appears under its name complete or not at all. What fails because the storage is away for a while is tried again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from rl_exit.errors import UserError

PATIENCE_SECONDS = 600.0  # for a storage that is away, before the run gives up (it can be resumed)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
# An upload appears only when it is complete; elsewhere it is written beside and renamed.
_WHOLE_PUTS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory", "hf"})
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "abfss": "adlfs",
}
MARK = ".rl-exit-storage"

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Storage:
    """A folder of a file system.

    Args:
        url: Path or URL.
        patience: Seconds to try again for while the file system fails.

    Raises:
        UserError: A file system that is not known, or whose package is not installed.
    """

    def __init__(self, url: str, patience: float = PATIENCE_SECONDS) -> None:
        import fsspec

        self.url = url.rstrip("/") or "/"
        self.patience = patience
        protocol = url.partition("://")[0] if "://" in url else "file"
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            package = _PACKAGES.get(protocol)
            hint = f"pip install {package}" if package else str(error)
            raise UserError(
                f"storage_path={url}: the package for {protocol}:// is not installed here: {hint}"
            ) from None
        except (ValueError, OSError) as error:
            raise UserError(f"storage_path={url}: {error}") from None
        self._root = self._root.rstrip("/")
        self._opened = False
        self.is_path = protocol in ("file", "local")
        self._whole = protocol in _WHOLE_PUTS

    @property
    def path(self) -> Path:
        """The folder where it is a path of this machine."""
        return Path(self._root)

    def below(self, name: str) -> Storage:
        """A folder in this one."""
        return Storage(f"{self.url}/{name}", self.patience)

    def open(self) -> None:
        """Make the folder. Later, writing fails where it has gone: a mount that is away must not be written under.

        Raises:
            UserError: It cannot be made.
        """

        def make() -> None:
            self._fs.makedirs(self._root, exist_ok=True)
            if self.is_path and not (self.path / MARK).exists():
                (self.path / MARK).touch()

        try:
            make()
            self._opened = True
        except (OSError, ValueError) as error:
            raise UserError(f"storage_path={self.url}: cannot be written: {error}") from None
        except Exception as error:  # noqa: BLE001 - each file system raises its own
            raise UserError(f"storage_path={self.url}: {_first_line(error)}") from None

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return bool(self._patiently(f"look for {name}", lambda: self._there(name)))

    def read(self, name: str) -> bytes | None:
        """A file's content, None where it is not there."""

        def get() -> bytes | None:
            if not self._there(name):
                return None
            return bytes(self._fs.cat_file(self._at(name)))

        return self._patiently(f"read {name}", get)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON mapping, None where it is not there.

        Raises:
            UserError: It is none.
        """
        content = self.read(name)
        if content is None:
            return None
        try:
            found = json.loads(content)
        except ValueError as error:
            raise UserError(f"{self.url}/{name}: cannot be read as JSON: {error}") from None
        if not isinstance(found, dict):
            raise UserError(f"{self.url}/{name}: a JSON mapping is expected")
        return found

    def write(self, name: str, content: bytes) -> None:
        """Write a file."""

        def put() -> None:
            with _Target(self, name) as out:
                out.write(content)

        self._patiently(f"write {name}", put)

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON."""
        self.write(name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def upload(self, source: Path, name: str) -> tuple[int, str]:
        """Write a file from the disk here; it may be replaced meanwhile.

        Returns:
            Size and SHA-256 of what was written.
        """

        def put() -> tuple[int, str]:
            with source.open("rb") as given, _Target(self, name) as out:
                return _copy(given, out)

        return self._patiently(f"write {name}", put, gone=source)

    def download(self, name: str, target: Path, sha256: str | None = None) -> None:
        """Fetch a file to the disk here.

        Raises:
            UserError: Its content is not the one expected.
        """

        def get() -> str:
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
            try:
                with self._fs.open(self._at(name), "rb") as given, beside.open("wb") as out:
                    _, digest = _copy(given, out)
                if sha256 is not None and digest != sha256:
                    raise UserError(f"{self.url}/{name}: its content is not what the run has written")
                beside.replace(target)
                return digest
            finally:
                beside.unlink(missing_ok=True)

        self._patiently(f"read {name}", get)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all in it; nothing where there is none."""

        def drop() -> None:
            self._fs.invalidate_cache()
            if self._kind(self._at(name)) is not None:
                self._fs.rm(self._at(name), recursive=True)

        self._patiently(f"remove {name}", drop)

    def folders(self) -> list[str]:
        """Names of the folders in this one."""
        return self._patiently("list it", lambda: self._names("directory"))

    def files(self) -> list[str]:
        """Names of the files in this folder itself."""
        return self._patiently("list it", lambda: self._names("file"))

    def _names(self, kind: str) -> list[str]:
        self._fs.invalidate_cache()
        if self._kind(self._root) is None:
            return []
        items = self._fs.ls(self._root, detail=True)
        names = (item["name"].rstrip("/").rpartition("/")[2] for item in items if item["type"] == kind)
        return sorted(name for name in names if name != MARK)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _there(self, name: str) -> bool:
        self._fs.invalidate_cache()
        if self.is_path and self._opened and not self.path.exists():
            raise FileNotFoundError(f"{self._root}: the storage is away")
        return self._kind(self._at(name)) == "file"

    def _kind(self, path: str) -> str | None:
        """``"file"``, ``"directory"``, None where nothing is; fsspec's own isfile takes any failure for nothing."""
        try:
            return str(self._fs.info(path)["type"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _patiently(self, what: str, work: Callable[[], T], gone: Path | None = None) -> T:
        """Do something, again while the file system fails; ``gone``: a file here whose absence is no such failure."""
        until, pause = time.monotonic() + self.patience, _FIRST_PAUSE
        while True:
            try:
                return work()
            except UserError:
                raise
            except Exception as error:
                if gone is not None and not gone.exists():
                    raise
                if time.monotonic() + pause > until:
                    raise UserError(
                        f"{self.url}: cannot {what} ({_first_line(error)}), tried for {self.patience:.0f} s; when it "
                        "is back, the same command with --resume goes on"
                    ) from error
                logger.warning("%s: cannot %s (%s); trying again", self.url, what, _first_line(error))
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)


class _Target:
    """A file being written; it takes its name when the block ends well."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name
        folder, _, last = name.rpartition("/")
        beside = f".{last}.{uuid.uuid4().hex[:8]}"
        self._written = name if storage._whole else (f"{folder}/{beside}" if folder else beside)

    def __enter__(self) -> BinaryIO:
        store = self._storage
        if store.is_path:
            if not (store.path / MARK).is_file():
                raise FileNotFoundError(f"{store.path}: the storage is away (it has no {MARK})")
            (store.path / self._written).parent.mkdir(parents=True, exist_ok=True)
        elif not store._whole:
            store._fs.makedirs(store._at(self._written).rpartition("/")[0], exist_ok=True)
        self._out = store._fs.open(store._at(self._written), "wb")
        return self._out

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        store = self._storage
        if kind is not None:
            discard = getattr(self._out, "discard", None)
            if store._whole and discard is not None:
                discard()
            else:
                self._out.close()
                if not store._whole and store._fs.exists(store._at(self._written)):
                    store._fs.rm(store._at(self._written))
            return
        self._out.close()
        if store.is_path:
            os.replace(store.path / self._written, store.path / self._name)  # noqa: PTH105
        elif not store._whole:
            store._fs.mv(store._at(self._written), store._at(self._name))


def _copy(given: BinaryIO, out: BinaryIO) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while part := given.read(4 << 20):
        digest.update(part)
        out.write(part)
        size += len(part)
    return size, digest.hexdigest()


def _first_line(error: BaseException) -> str:
    words = str(error).strip().splitlines()
    return words[0][:200] if words else type(error).__name__
