"""What a job carries: one archive whose name is the hash of its content, so that the same is never sent twice.

It holds the code, the resolved configuration and the user's own files. Nothing is followed out of a folder: a link that
leads back into it is left out (its target is sent anyway, once), one that leads elsewhere is refused.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import rl_exit
from rl_exit.errors import UserError

CONFIG_NAME = "rl-exit-job.yaml"
EXCLUDES = (
    *(".git", ".hg", ".svn", ".venv", "venv", "node_modules", "__pycache__", "*.pyc", "*.egg-info", ".*_cache", ".tox"),
    *(".ray", ".env", ".env.*", "*.pem", "*.key", "auth_token", ".netrc", ".aws", ".ssh", ".hypothesis", ".DS_Store"),
    *("runs", "dist", "build"),
)
"""Names that never travel: leftovers, environments, and where secrets usually lie."""
DEFAULT_LIMIT = 100 * 1024 * 1024
RAY_LIMIT = 500 * 1024 * 1024  # of the head's store for packages
_SAME_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Package:
    """Files by their names in the job's working directory.

    Attributes:
        files: Name -> the file here, or its content.
        code: Where the code comes from: ``installed``, a wheel's name, or ``this tree``.
    """

    files: Mapping[str, Path | bytes]
    code: str

    @property
    def size(self) -> int:
        """Bytes before compression."""
        return sum(len(item) if isinstance(item, bytes) else item.stat().st_size for item in self.files.values())

    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of names and contents."""
        total = hashlib.sha256()
        for name, item in sorted(self.files.items()):
            content = item if isinstance(item, bytes) else item.read_bytes()
            total.update(f"{name}\0{len(content)}\0".encode() + hashlib.sha256(content).digest())
        return total.hexdigest()[:16]

    def write(self, folder: Path) -> Path:
        """Write the archive; the same content gives the same bytes."""
        target = folder / f"rl-exit-{self.digest()}.zip"
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, item in sorted(self.files.items()):
                about = zipfile.ZipInfo(name, _SAME_DATE)
                about.external_attr = 0o644 << 16
                about.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(about, item if isinstance(item, bytes) else item.read_bytes())
        return target

    def check_size(self, limit: int) -> None:
        """Refuse what is too large, before anything is sent.

        Raises:
            UserError: With the largest files.
        """
        if self.size <= limit:
            return
        sizes = {name: len(i) if isinstance(i, bytes) else i.stat().st_size for name, i in self.files.items()}
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        shown = ", ".join(f"{name} ({_mb(sizes[name])})" for name in largest)
        raise UserError(
            f"the job would carry {_mb(self.size)}; at most {_mb(limit)} are sent (--max-upload). Largest: {shown}. "
            "Leave files out with --exclude, or put data and models where the cluster reads them and give absolute "
            "paths or hub names"
        )


def build_package(
    config: str,
    *,
    code: str = "tree",
    working_dir: Path | None = None,
    data: Mapping[str, Path] | None = None,
    excludes: Sequence[str] = (),
) -> Package:
    """Collect what a job carries.

    Args:
        config: The resolved configuration as YAML.
        code: ``tree``: the package that runs here; ``installed``: none, the cluster has it; else a wheel.
        working_dir: The user's own files, e.g. modules with an algorithm; put at the top.
        data: Name in the job's directory -> file or folder here.
        excludes: Patterns on names and paths, in addition to :data:`EXCLUDES`.

    Raises:
        UserError: A wheel or folder that cannot be used, or a name that two files want.
    """
    files: dict[str, Path | bytes] = {}
    if working_dir is not None:
        if not working_dir.is_dir():
            raise UserError(f"--working-dir {working_dir}: no such folder")
        files |= dict(walk(working_dir, excludes))
    brings_code = "rl_exit/__init__.py" in files
    name = "this tree"
    if code == "installed":
        name = "installed"
    elif code != "tree":
        name = Path(code).name
        files = {k: v for k, v in files.items() if not k.startswith("rl_exit/")} | _wheel(Path(code))
    elif not brings_code:
        here = Path(rl_exit.__file__).parent
        files |= {f"rl_exit/{inner}": path for inner, path in walk(here, ())}
    for top, source in (data or {}).items():
        if source.is_file():
            files[top] = source
        else:
            files |= {f"{top}/{inner}": path for inner, path in walk(source, excludes)}
    if CONFIG_NAME in files:
        raise UserError(f"--working-dir {working_dir}: has a file {CONFIG_NAME}, which is the name of the job's own")
    files[CONFIG_NAME] = config.encode()
    return Package(files, name)


def walk(folder: Path, excludes: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield (path below the folder, file), sorted, without what is excluded.

    Raises:
        UserError: A link that leads out of the folder.
    """
    top = folder.resolve()
    patterns = (*EXCLUDES, *excludes)
    for root, folders, names in os.walk(top):
        kept = []
        for name in sorted(folders):
            path = Path(root) / name
            if not _excluded(path.relative_to(top).as_posix(), patterns) and not _inner_link(path, top):
                kept.append(name)
        folders[:] = kept
        for name in sorted(names):
            path = Path(root) / name
            below = path.relative_to(top).as_posix()
            if not _excluded(below, patterns) and path.is_file() and not _inner_link(path, top):
                yield below, path


def _inner_link(path: Path, top: Path) -> bool:
    """Whether the path is a link to something that is sent under its own name."""
    if not path.is_symlink():
        return False
    if path.resolve().is_relative_to(top):
        return True
    raise UserError(f"{path}: is a link out of {top}; copy what it leads to, or leave it out with --exclude")


def _excluded(below: str, patterns: Sequence[str]) -> bool:
    name = PurePosixPath(below).name
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(below, p.rstrip("/")) for p in patterns)


def _wheel(path: Path) -> dict[str, Path | bytes]:
    """Content of a wheel of rl-exit; unpacked, it needs no installation on the cluster."""
    if path.suffix != ".whl" or not path.is_file():
        raise UserError(f"--code {path}: 'tree', 'installed' or a wheel of rl-exit is accepted")
    try:
        with zipfile.ZipFile(path) as archive:
            found = {i.filename: archive.read(i) for i in archive.infolist() if not i.is_dir()}
    except zipfile.BadZipFile:
        raise UserError(f"--code {path}: not a wheel") from None
    if "rl_exit/__init__.py" not in found or any(".." in PurePosixPath(name).parts for name in found):
        raise UserError(f"--code {path}: not a wheel of rl-exit")
    return dict(found)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
