"""Raw rows from local files or from the Hugging Face hub, through the builders of `datasets`.

Only data files are read, never a dataset's own code. Local files go through a temporary folder that is removed at once,
so nothing is left in the user's cache and a read-only home is no obstacle; hub datasets use the usual cache.
"""

from __future__ import annotations

import csv
import errno
import glob
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rl_exit.errors import DataError, UserError, nearest

FORMATS = {
    ".parquet": "Parquet",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".jsonl": "JSONL",
    ".json": "JSONL",
}
DEV_NAMES = ("dev", "validation", "valid", "val", "validation_matched", "eval")

# train-00000-of-00001, train-00000, train-00000-of-00001-0123456789abcdef
_SHARD = re.compile(r"-\d{5}(-of-\d{5}(-[0-9a-f]+)?)?$")
_DEPTH = 3
_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class RawSplit:
    """One split as it was read.

    Attributes:
        where: Name for messages.
        table: All columns, in memory.
        class_names: Names of the classes of every column that declares them.
        typed: False for CSV and TSV, whose cells are all text until someone decides otherwise.
    """

    where: str
    table: pa.Table
    class_names: Mapping[str, tuple[str, ...]]
    typed: bool = True


@dataclass(frozen=True)
class Source:
    """Splits that can be read.

    Attributes:
        origin: Where they come from, in words.
        names: Names of the splits.
        read: Reads one of them.
    """

    origin: str
    names: tuple[str, ...]
    read: Callable[[str], RawSplit]


def open_local(path: str, subset: str | None = None, single: str = "train") -> Source:
    """Find the splits in a folder or file.

    In a folder a split is ``<split>.<format>``, shards such as ``<split>-00000-of-00002.<format>``, or a folder
    ``<split>/`` of files, also one or two folders down (``data/``); what lies nearest counts.

    Args:
        path: Folder or file.
        subset: Folder inside ``path`` to take.
        single: Name given to the one split of a file.

    Raises:
        DataError: Nothing there, no recognised files, or a split found twice.
    """
    if not path:
        raise DataError("task.path = '': a folder or file of Parquet, CSV, TSV or JSONL is accepted")
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"task.path = '{path}': no such file or folder (looked for {root.absolute()})")
    if root.is_file():
        _format(root)
        return Source(f"file {path}", (single,), lambda name: _read_files([root], str(root)))
    if not root.is_dir():
        raise DataError(f"task.path = '{path}': neither a file nor a folder")
    if subset is not None:
        if not (root / subset).is_dir():
            folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
            raise DataError(
                f"task.subset = '{subset}': no such folder in {path}.{nearest(subset, folders)} "
                f"Folders there: {', '.join(folders) or 'none'}"
            )
        root = root / subset
    files = sorted(_data_files(root, _DEPTH))
    if not files:
        raise DataError(
            f"task.path = '{path}': the folder holds no data files; accepted: train, dev and test as "
            f"{', '.join(FORMATS)}, e.g. {root / 'train.parquet'}"
        )
    groups = _group(root, files)
    return Source(f"folder {path}", tuple(groups), lambda name: _read_split(root, name, groups[name]))


def open_hub(dataset: str, subset: str | None = None, revision: str | None = None) -> Source:
    """Load a dataset of the hub, or its copy in the local cache where the hub is out of reach.

    Raises:
        DataError: Out of reach and not cached, unknown or gated dataset, unknown subset, or a dataset that consists of
            a program.
        UserError: No space left on the device.
    """
    import datasets

    if Path(dataset).exists():
        raise DataError(
            f"'{dataset}' is a hub dataset and also a folder here, which would hide it; for the folder use "
            f"task.name=local task.path={dataset}, otherwise start from another folder"
        )
    unreachable = _why_unreachable()
    with _quiet(progress=sys.stderr.isatty()), _offline(unreachable is not None):
        try:
            loaded = datasets.load_dataset(dataset, subset, revision=revision, keep_in_memory=True)
        except Exception as error:
            raise _hub_error(error, dataset, subset, unreachable) from error
    name = f"hub dataset {dataset}" + (f" [{subset}]" if subset else "")
    splits = {str(key): split for key, split in loaded.items()}
    return Source(name, tuple(splits), lambda key: _raw(splits[key], f"{name}, split '{key}'"))


def _data_files(folder: Path, depth: int) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith((".", "_")):
            continue
        if entry.is_dir() and depth > 1:
            yield from _data_files(entry, depth - 1)
        elif entry.suffix.lower() in FORMATS and entry.is_file():
            yield entry


def _group(root: Path, files: Sequence[Path]) -> dict[str, dict[tuple[Path, str], list[Path]]]:
    """Split name -> (folder, format) -> its files; more than one entry means that the split is ambiguous."""
    usual = {"train", "test", *DEV_NAMES}
    groups: dict[str, dict[tuple[Path, str], list[Path]]] = {}
    for file in files:
        name = _SHARD.sub("", file.stem) or file.stem
        if name not in usual and file.parent != root and file.parent.name in usual:
            name = file.parent.name
        groups.setdefault(name, {}).setdefault((file.parent, file.suffix.lower()), []).append(file)
    return groups


def _read_split(root: Path, name: str, candidates: Mapping[tuple[Path, str], list[Path]]) -> RawSplit:
    depth = min(len(folder.parts) for folder, _ in candidates)
    nearby = [files for (folder, _), files in candidates.items() if len(folder.parts) == depth]
    if len(nearby) > 1:
        found = ", ".join(str(files[0].relative_to(root)) for files in nearby)
        raise DataError(
            f"{root}: split '{name}' is there more than once ({found}); keep one, or give task.path its folder"
        )
    (files,) = nearby
    return _read_files(files, str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more")


def _format(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        raise DataError(f"{file}: files ending in '{suffix}' are not read; accepted: {', '.join(FORMATS)}")
    return FORMATS[suffix]


def _read_files(files: Sequence[Path], where: str) -> RawSplit:
    """Read files of one format as one split.

    Raises:
        DataError: Broken or empty files.
        UserError: No space left for the temporary copy.
    """
    import datasets

    kind = _format(files[0])
    options: dict[str, Any] = {}
    try:
        files = [file for file in files if not _is_empty(file, kind)]
        if not files:
            raise DataError(f"{where}: the file has no rows")
        if kind in ("CSV", "TSV"):
            options = _csv_options(files[0], kind)
        reader = {"Parquet": datasets.Dataset.from_parquet, "JSONL": datasets.Dataset.from_json}.get(
            kind, datasets.Dataset.from_csv
        )
        # Square brackets and stars in a folder's name are no patterns here.
        paths = [glob.escape(str(file.absolute())) for file in files]
        with tempfile.TemporaryDirectory(prefix="rl-exit-") as cache, _quiet():
            dataset = reader(paths, cache_dir=cache, keep_in_memory=True, **options)
    except UserError:
        raise
    except Exception as error:
        raise _file_error(error, where, kind) from error
    return _raw(dataset, where, typed=kind not in ("CSV", "TSV"))


def _raw(dataset: Any, where: str, typed: bool = True) -> RawSplit:
    _check_text(dataset.data.table, where)
    names = {column: tuple(feature.names) for column, feature in dataset.features.items() if hasattr(feature, "names")}
    # A filtered or sorted dataset keeps its order in an index beside the table; ours are fresh from the builder.
    return RawSplit(where, dataset.data.table, names, typed)


def _check_text(table: pa.Table, where: str) -> None:
    """Refuse strings that are not UTF-8, which the readers of JSONL and Parquet take over as they are."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            continue
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            binary = pa.binary() if pa.types.is_string(column.type) else pa.large_binary()
            cells = (cell for chunk in column.chunks for cell in chunk.view(binary).to_pylist())
            row = next((row for row, cell in enumerate(cells) if cell is not None and not _is_utf8(cell)), 0)
            raise DataError(f"{where}, column '{name}': not UTF-8 text in row {row} (counted from 0)") from None


def _is_utf8(cell: bytes) -> bool:
    try:
        cell.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_empty(file: Path, kind: str) -> bool:
    """Whether a file has no rows; the builders answer that with errors that say something else."""
    if kind == "Parquet":
        import pyarrow.parquet

        return bool(pyarrow.parquet.read_metadata(file).num_rows == 0)
    blank = {b"", b"\xef\xbb\xbf"}
    if kind == "JSONL":
        blank |= {b"null", b"{}", b"[]"}  # of nothing but these pyarrow's reader dies
    with file.open("rb") as stream:
        filled = (line for line in stream if line.strip() not in blank)
        header = kind in ("CSV", "TSV")
        return sum(1 for _, _ in zip(range(1 + header), filled, strict=False)) < 1 + header


def _csv_options(file: Path, kind: str) -> dict[str, Any]:
    """Read all cells as text: a column's type must not hang on which rows a chunk of 10000 happens to hold."""
    import datasets

    # Quotes are plain characters in TSV (the GLUE files have unpaired ones).
    dialect: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if kind == "TSV" else {"sep": ","}
    with file.open(encoding="utf-8-sig", newline="") as stream:
        lines = (line for line in stream if line.strip())
        rows = csv.reader(lines, delimiter=dialect["sep"], quoting=dialect.get("quoting", csv.QUOTE_MINIMAL))
        header = next(rows)
        try:
            first = next(rows, [])
        except csv.Error:  # a cell of more than 131072 characters, which pandas reads
            first = []
    # pandas refuses a longer row, but of the first one it drops the cells that have no column.
    if any(first[len(header) :]):
        raise DataError(
            f"{file}: {len(header)} columns in the header, {len(first)} in the first row; "
            f"a cell with {'tabs' if kind == 'TSV' else 'commas'} in it needs quotes in CSV"
        )
    columns = [name or f"Unnamed: {index}" for index, name in enumerate(header)]
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(f"{file}: the header names column '{twice[0]}' more than once")
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    # "NA", "null" and "None" are words; only an empty cell is a missing one. No column is an index.
    return {**dialect, "features": features, "keep_default_na": False, "na_values": [""], "index_col": False}


def _file_error(error: BaseException, where: str, kind: str) -> UserError:
    full = _no_space(error)
    if full:
        return full
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        return DataError(f"{where}: not UTF-8 text, {cause.reason} at byte {cause.start}")
    reason = " ".join(str(cause).split()) or type(cause).__name__
    return DataError(f"{where}: cannot be read as {kind}: {reason[:300]}")


def _no_space(error: BaseException) -> UserError | None:
    for link in _chain(error):
        if isinstance(link, OSError) and (link.errno == errno.ENOSPC or "Not enough disk space" in str(link)):
            return UserError(
                f"no space left on the device while reading data; temporary files go to {tempfile.gettempdir()} "
                "(TMPDIR), hub datasets to HF_HOME (default ~/.cache/huggingface)"
            )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _hub_error(error: Exception, dataset: str, subset: str | None, unreachable: str | None) -> UserError:
    full = _no_space(error)
    if full:
        return full
    reason = " ".join(str(error).split())[:300]
    local = "give local files with task.path=FOLDER (Parquet, CSV, TSV or JSONL)"
    if unreachable is not None:
        return DataError(
            f"hub dataset '{dataset}': {unreachable} and this machine's cache has no copy"
            f"{f' of subset {subset!r}' if subset else ''}; {local}, or use the built-in task.name=docstrings"
        )
    if "BuilderConfig" in reason or "Config name is missing" in reason:
        given = f"subset '{subset}' is unknown" if subset else "there are several subsets"
        return DataError(f"hub dataset '{dataset}': {given}; set task.subset. The hub says: {reason}")
    if "scripts are no longer supported" in reason:
        return DataError(f"hub dataset '{dataset}' consists of a program, which is never run here; {local}")
    return DataError(f"hub dataset '{dataset}' cannot be loaded: {reason or type(error).__name__}; or {local}")


def _why_unreachable() -> str | None:
    """Ask the hub once: its client spends 23 seconds on retries before it gives up on a machine without network."""
    import datasets
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        session = huggingface_hub.utils.get_session()
        session.head(huggingface_hub.constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception:  # noqa: BLE001 - the HTTP library, and so its exceptions, depend on huggingface_hub's version
        return "the hub cannot be reached from here"
    return None


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Let the hub client look only into its cache."""
    import huggingface_hub

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


@contextmanager
def _quiet(progress: bool = False) -> Iterator[None]:
    """Keep the builders' log lines and, unless wanted, progress bars off the terminal: errors are ours to tell."""
    import datasets

    level = datasets.utils.logging.get_verbosity()
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.utils.logging.set_verbosity(logging.CRITICAL + 1)
    # An environment variable that forces the bars either way makes these calls warn.
    switch = os.environ.get("HF_DATASETS_DISABLE_PROGRESS_BARS") is None and not progress and not bars
    if switch:
        datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)
        if switch:
            datasets.utils.enable_progress_bars()
