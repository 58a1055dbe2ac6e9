"""The copy of a run directory in its storage: complete after every step, taken back by a run that goes on elsewhere.

The run directory stays where the run's own process is, on a local disk. After a step the files that are new or changed
are uploaded, and last a manifest that names every file with its size and SHA-256: what the manifest names is there.
Before a file of the manifest is replaced, a manifest without it is written, so that one that is found is always true.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_exit.errors import RunError
from rl_exit.storage import Storage

MANIFEST = "manifest.json"
OWNER = "owner.json"
EXCHANGE = "exchange"
_FORMAT = 1
_NOT_KEPT = frozenset({"train"})  # Ray Train's own notes, of no use to another run
_TRIES = 3


@dataclass(frozen=True)
class _Seen:
    """A file at the moment it was uploaded."""

    inode: int
    changed: int
    size: int

    @classmethod
    def of(cls, path: Path) -> _Seen:
        found = path.stat()
        return cls(found.st_ino, found.st_mtime_ns, found.st_size)


class Mirror:
    """The copy of one run.

    Args:
        folder: The run directory here.
        storage: The run's own folder in the storage.
    """

    def __init__(self, folder: Path, storage: Storage) -> None:
        self.folder = folder
        self.storage = storage
        self._seen: dict[str, _Seen] = {}
        self._files: dict[str, dict[str, Any]] = {}
        self._nonce = uuid.uuid4().hex

    def open(self) -> None:
        """Make the folder and say whose it is now."""
        self.storage.open()
        about = {"nonce": self._nonce, "host": socket.gethostname(), "process": os.getpid(), "since": time.time()}
        self.storage.write_json(OWNER, about)

    def is_there(self) -> bool:
        """Whether the storage holds a run."""
        return self.storage.exists(MANIFEST)

    def discard(self) -> None:
        """Remove what the storage holds of the run, the manifest first."""
        self.storage.remove(MANIFEST)
        for name in (*self.storage.files(), *self.storage.folders()):
            if name != OWNER:
                self.storage.remove(name)
        self._files, self._seen = {}, {}

    def pull(self) -> bool:
        """Make the run directory here what the storage holds, unless it is at least as far; returns whether it did.

        Raises:
            RunError: The manifest is of another form.
            UserError: A file is missing or damaged.
        """
        manifest = self.storage.read_json(MANIFEST)
        if manifest is None:
            return False
        files = manifest.get("files")
        if manifest.get("format") != _FORMAT or not isinstance(files, dict) or not all(map(_is_inside, files)):
            raise RunError(f"{self.storage.url}/{MANIFEST}: not the manifest of a run")
        if self._is_ahead(files):
            self._remember(files)
            return False
        here = dict(self._walk())
        for name in here.keys() - files.keys():
            here[name].unlink()
        for name, about in sorted(files.items()):
            target = self.folder / name
            if name not in here or target.stat().st_size != about["size"] or _sha256(target) != about["sha256"]:
                self.storage.download(name, target, about["sha256"])
            self._seen[name] = _Seen.of(target)
        self._files = dict(files)
        return True

    def push(self) -> int:
        """Bring the storage up to date.

        Returns:
            Bytes uploaded.

        Raises:
            RunError: Another process has taken the run over.
            UserError: The storage stays away.
        """
        self._check_owner()
        sent = 0
        for attempt in range(_TRIES):
            here = dict(self._walk())
            now = {name: _Seen.of(path) for name, path in here.items() if path.exists()}
            changed = [name for name, seen in now.items() if self._seen.get(name) != seen or name not in self._files]
            gone = [name for name in self._files if name not in now]
            if not changed and not gone:
                break
            if any(name in self._files for name in changed) or (gone and changed):
                kept = {name: about for name, about in self._files.items() if name in now and name not in changed}
                self._write_manifest(kept)
            for name in changed:
                try:
                    size, digest = self.storage.upload(here[name], name)
                except FileNotFoundError:  # replaced meanwhile; the next look finds what is there then
                    continue
                sent += size
                self._files[name], self._seen[name] = {"size": size, "sha256": digest}, now[name]
            for name in gone:
                self._files.pop(name, None)
                self._seen.pop(name, None)
            if attempt + 1 < _TRIES and self._moving(now):
                continue  # a checkpoint was replaced while it was read: its files must be of one moment
            self._write_manifest(self._files)
            for name in gone:
                self.storage.remove(name)
            break
        return sent

    def _moving(self, before: dict[str, _Seen]) -> bool:
        parts = ((self.folder / name, seen) for name, seen in before.items() if _is_checkpoint(name))
        return any(not path.exists() or _Seen.of(path) != seen for path, seen in parts)

    def _write_manifest(self, files: dict[str, dict[str, Any]]) -> None:
        self._check_owner()
        about = {"format": _FORMAT, "written": time.time(), "files": dict(sorted(files.items()))}
        self.storage.write_json(MANIFEST, about)

    def _check_owner(self) -> None:
        owner = self.storage.read_json(OWNER)
        if owner is not None and owner.get("nonce") != self._nonce:
            raise RunError(
                f"{self.storage.url}: process {owner.get('process')} on {owner.get('host')} has taken this run over"
            )

    def _is_ahead(self, files: dict[str, Any]) -> bool:
        """Whether the directory here is of the same run and has every finished step of the storage."""
        started = files.get("run.json")
        local = self.folder / "run.json"
        if started is None or not local.is_file() or _sha256(local) != started["sha256"]:
            return False
        steps = {name for name in files if name.startswith("steps/")}
        mine = {name for name, _ in self._walk() if name.startswith("steps/")}
        if not steps <= mine or any(_sha256(self.folder / name) != files[name]["sha256"] for name in steps):
            return False
        return steps < mine or all((self.folder / name).is_file() for name in files if not _is_checkpoint(name))

    def _remember(self, files: dict[str, Any]) -> None:
        """Know what need not be uploaded again."""
        self._files = dict(files)
        for name, about in files.items():
            path = self.folder / name
            if path.is_file() and path.stat().st_size == about["size"] and _sha256(path) == about["sha256"]:
                self._seen[name] = _Seen.of(path)

    def _walk(self) -> Iterator[tuple[str, Path]]:
        for root, folders, names in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _NOT_KEPT)
            for name in sorted(names):
                if not name.startswith("."):
                    path = Path(root) / name
                    yield path.relative_to(self.folder).as_posix(), path


def _is_checkpoint(name: str) -> bool:
    """Whether a file is of a checkpoint, whose files belong together."""
    return any(part.endswith("checkpoint") for part in name.split("/")[:-1])


def _is_inside(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/") and "\\" not in name


def _sha256(path: Path) -> str:
    with path.open("rb") as given:
        return hashlib.file_digest(given, "sha256").hexdigest()


def mirror_of(folder: Path, storage_path: str | None, name: str) -> Mirror | None:
    """The copy of a run named ``name`` in a storage; None where the run has none.

    Raises:
        UserError: The storage is not known.
    """
    return None if storage_path is None else Mirror(folder, Storage(storage_path).below(name))
