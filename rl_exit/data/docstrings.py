"""The built-in task: what is a piece of documentation about?

The texts are the opening sentences of docstrings in installed dependencies, read with :mod:`ast` and never imported.
The label is the subject, that is, the library or sub-packages the file belongs to. What would give the label away
without being read is taken out by :mod:`rl_exit.data.docstring_text`. Every choice hangs on hashes of paths inside
the packages and of texts, so that equal library versions give an equal task on every machine.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rl_exit.data.docstring_text import PLACEHOLDER, content_words, normalised, opening
from rl_exit.data.tasks import Task, TextSplit
from rl_exit.errors import DataError


@dataclass(frozen=True)
class Topic:
    """A class of the task.

    Attributes:
        label: Name of the class.
        folders: Folders of source files, the package first, ``/`` between.
        leave_out: Folder names skipped inside them: utilities, which have no subject of their own.
    """

    label: str
    folders: tuple[str, ...]
    leave_out: tuple[str, ...] = ()


_SYMPY = """
    assumptions calculus categories combinatorics concrete core functions geometry holonomic integrals liealgebras
    logic matrices ntheory polys series sets simplify solvers
"""
_WEB = ("aiohttp", "fastapi", "requests", "starlette", "urllib3", "uvicorn", "websockets", "werkzeug")

TOPICS = (
    Topic("charts", ("plotly",)),
    Topic("graphs", ("networkx",), ("utils",)),
    Topic("mathematics", tuple(f"sympy/{part}" for part in _SYMPY.split())),
    Topic("neural networks", ("transformers/models",)),
    Topic("reinforcement learning", ("gymnasium", "ray/rllib")),
    Topic("statistics", ("scipy/stats", "sklearn"), ("utils",)),
    Topic("tables", ("pandas",)),
    Topic("web", _WEB),
)

PER_CLASS: Mapping[str, int] = {"train": 750, "dev": 90, "test": 180}
"""Texts per class where the installed versions have enough."""

LEAST_PER_CLASS: Mapping[str, int] = {"train": 450, "dev": 67, "test": 67}
"""Below these a task would say little: :class:`~rl_exit.errors.DataError`."""

_SHARES = (("train", 0.70), ("dev", 0.81), ("test", 1.0))  # cumulative shares of the files
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
_NO_SUBJECT = frozenset(("_vendor", "examples", "externals", "test", "testing", "tests", "vendor"))
_GENERATED = ("conftest.py", "convert_", "modular_", "test_")  # modular_*: their text is repeated in modeling_*
_MOST_BYTES = 100_000  # larger files take long to parse and, per file, give no more texts
_MOST_FILES = 1_500  # per topic
_MARGIN = 1.4  # read on until so many times the wanted number is found: some will turn out as duplicates
_MOST_PER_FILE = 20  # so that no single file makes up much of a class
_ALIKE = 0.75  # Jaccard similarity of the content words from which two texts count as the same


@dataclass(frozen=True)
class _Text:
    path: str
    topic: int
    text: str
    key: str

    @property
    def rank(self) -> str:
        return digest(f"{self.path}\n{self.text}")


def build(seed: int = 0) -> Task:
    """Build the task from the installed libraries.

    Args:
        seed: Has no effect: the task is the same in every run, so that runs with several seeds can be compared. The
            argument is there because a loader of a task has one.

    Raises:
        DataError: A library is missing, or the installed versions hold too few usable texts.
    """
    del seed
    roots = find_packages()
    with _no_garbage_collection():
        found = [text for number, topic in enumerate(TOPICS) for text in _read_topic(number, topic, roots)]
    by_split: dict[str, list[_Text]] = {name: [] for name, _ in _SHARES}
    for text in _without_duplicates(found):
        by_split[split_of(text.path)].append(text)
    by_split["dev"] = _unlike(by_split["dev"], by_split["test"])
    by_split["train"] = _unlike(by_split["train"], by_split["test"] + by_split["dev"])
    chosen = {name: _balanced(name, texts) for name, texts in by_split.items()}
    return Task(
        name="docstrings",
        label_names=tuple(topic.label for topic in TOPICS),
        metric="accuracy",
        splits={name: _split(texts) for name, texts in chosen.items()},
        description=_describe(chosen),
    )


def split_of(path: str) -> str:
    """The split that all texts of a file belong to; ``path`` starts with the package and has ``/`` between parts."""
    share = int(digest(f"split {path}")[:8], 16) / 2**32
    return next(name for name, upper in _SHARES if share < upper)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees are many objects without cycles: the collector finds nothing and takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def digest(text: str) -> str:
    """A hash that orders paths and texts."""
    return hashlib.sha256(text.encode()).hexdigest()


def _packages() -> list[str]:
    return sorted({folder.partition("/")[0] for topic in TOPICS for folder in topic.folders})


def find_packages() -> dict[str, Path]:
    """Package -> its folder, without importing it.

    Raises:
        DataError: Some are not installed.
    """
    roots = {}
    for package in _packages():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots[package] = Path(next(iter(spec.submodule_search_locations)))
    missing = [_DISTRIBUTIONS.get(package, package) for package in _packages() if package not in roots]
    if missing:
        raise DataError(
            f"the built-in task 'docstrings' is made of the documentation of installed libraries, and these are not "
            f"installed: {', '.join(missing)}. They come with rl-exit's own dependencies; install them "
            f"(pip install {' '.join(missing)}) or choose another task (rl-exit tasks)"
        )
    return roots


def topic_files(topic: Topic, roots: Mapping[str, Path]) -> dict[str, Path]:
    """Source files of a topic by their path from the package on, in the order in which to read them."""
    files = {}
    for folder in topic.folders:
        package, _, inner = folder.partition("/")
        for file in (roots[package] / inner).rglob("*.py"):
            path = f"{package}/{file.relative_to(roots[package]).as_posix()}"
            parts = path.split("/")[:-1]
            if _NO_SUBJECT.isdisjoint(parts) and set(topic.leave_out).isdisjoint(parts):
                files[path] = file
    names = [path for path in files if not path.rpartition("/")[2].startswith(_GENERATED)]
    return {path: files[path] for path in sorted(names, key=lambda path: digest(f"read {path}"))[:_MOST_FILES]}


def _read_topic(number: int, topic: Topic, roots: Mapping[str, Path]) -> Iterator[_Text]:
    keys: dict[str, set[str]] = {split: set() for split in PER_CLASS}
    for path, file in topic_files(topic, roots).items():
        if all(len(keys[split]) >= _MARGIN * PER_CLASS[split] for split in keys):
            return
        texts = {text: normalised(text) for text in _read_file(file, _own_names(path))}
        rows = sorted((_Text(path, number, text, key) for text, key in texts.items()), key=lambda row: row.rank)
        keys[split_of(path)].update(row.key for row in rows[:_MOST_PER_FILE])
        yield from rows[:_MOST_PER_FILE]


def _own_names(path: str) -> tuple[str, ...]:
    """Names to mask in one file only: the model that a folder of transformers is named after."""
    parts = path.split("/")
    return (parts[2],) if parts[:2] == ["transformers", "models"] and len(parts) > 3 else ()


def _read_file(file: Path, names: tuple[str, ...]) -> Iterator[str]:
    """The usable openings of a file's docstrings."""
    for docstring in read_docstrings(file):
        text = opening(docstring, names)
        if text:
            yield text


def read_docstrings(file: Path) -> Iterator[str]:
    """All docstrings of a file; none where it is too large or this Python cannot parse it.

    Raises:
        DataError: It cannot be read.
    """
    try:
        source = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read for the built-in tasks: {error}") from None
    if len(source) > _MOST_BYTES or (b'"""' not in source and b"'''" not in source):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in other people's files
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    yield from _docstrings(tree)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """All docstrings below a node. Only statements are visited: ``ast.walk`` spends most of its time in expressions."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        inner = getattr(node, block, None)
        for child in inner if isinstance(inner, list) else ():
            yield from _docstrings(child)


def _without_duplicates(texts: list[_Text]) -> list[_Text]:
    """One text per normalised form; none of those that occur in several topics, for they tell nothing."""
    topics: dict[str, set[int]] = defaultdict(set)
    for text in texts:
        topics[text.key].add(text.topic)
    first: dict[str, _Text] = {}
    for text in sorted(texts, key=lambda text: text.rank):
        if len(topics[text.key]) == 1:
            first.setdefault(text.key, text)
    return list(first.values())


def _unlike(texts: list[_Text], others: list[_Text]) -> list[_Text]:
    """Those of ``texts`` that are near-duplicates of none of ``others``."""
    sets = [content_words(text.key) for text in others]
    holders: dict[str, list[int]] = defaultdict(list)
    for row, words in enumerate(sets):
        for word in words:
            holders[word].append(row)

    def alike(words: frozenset[str]) -> bool:
        # A text that shares the fraction a of the union shares at least a * len(words) words, so it holds one of the
        # rarest (1 - a) * len(words) + 1 of them: only the holders of these need a closer look.
        rarest = sorted(words, key=lambda word: (len(holders.get(word, ())), word))
        need = rarest[: int((1 - _ALIKE) * len(words)) + 1]
        rows = {row for word in need for row in holders.get(word, ())}
        return any(len(words & sets[row]) >= _ALIKE * len(words | sets[row]) for row in rows)

    return [text for text in texts if not alike(content_words(text.key))]


def _balanced(split: str, texts: list[_Text]) -> list[_Text]:
    """Equally many texts per topic, at most ``PER_CLASS``, in an order that mixes the topics."""
    counts = Counter(text.topic for text in texts)
    scarce = min(range(len(TOPICS)), key=lambda number: counts[number])
    count = min(PER_CLASS[split], counts[scarce])
    if count < LEAST_PER_CLASS[split]:
        raise DataError(
            f"the built-in task 'docstrings' needs {LEAST_PER_CLASS[split]} texts per class in {split}; the installed "
            f"{_versions(TOPICS[scarce])} hold only {counts[scarce]} for '{TOPICS[scarce].label}'. Install the pinned "
            "versions, or choose another task (rl-exit tasks)"
        )
    taken: Counter[int] = Counter()
    chosen = []
    for text in sorted(texts, key=lambda text: text.rank):
        if taken[text.topic] < count:
            taken[text.topic] += 1
            chosen.append(text)
    return chosen


def _split(texts: list[_Text]) -> TextSplit:
    return TextSplit(
        ids=np.arange(len(texts), dtype=np.int64),
        texts=[text.text for text in texts],
        pairs=None,
        labels=np.array([text.topic for text in texts], dtype=np.int64),
    )


def _versions(topic: Topic) -> str:
    """``scikit-learn 1.9.1 (sklearn), scipy 1.17.1 (scipy.stats)``: what a topic is made of."""
    inside: dict[str, list[str]] = defaultdict(list)
    for folder in topic.folders:
        package, _, inner = folder.partition("/")
        inside[package].append(inner)
    words = []
    for package, folders in inside.items():
        name = _DISTRIBUTIONS.get(package, package)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "of unknown version"
        parts = [folder for folder in folders if folder]
        shown = f" ({package}.{parts[0]})" if len(parts) == 1 else f" ({len(parts)} sub-packages)" if parts else ""
        words.append(f"{name} {version}{shown}")
    return ", ".join(words)


def _describe(chosen: Mapping[str, list[_Text]]) -> str:
    sizes = ", ".join(f"{name} {len(texts) // len(TOPICS)}" for name, texts in chosen.items())
    files = ", ".join(f"{name} {len({text.path for text in texts})}" for name, texts in chosen.items())
    classes = "; ".join(f"{topic.label}: {_versions(topic)}" for topic in TOPICS)
    return (
        "What is a piece of documentation about? English openings (one or two sentences) of docstrings in installed "
        f"libraries; the class is the library or group of sub-packages the file belongs to. Classes: {classes}. "
        f"Texts per class: {sizes}; source files: {files}; no file is in two splits. Duplicates and near-duplicates "
        "across splits are removed, and so are texts that occur in several classes. Names of libraries and models and "
        f"all code identifiers are replaced by '{PLACEHOLDER}', leading verbs put into the imperative. "
        "Weaknesses: the label is where the file lies, so a general sentence in a library has an unguessable label "
        "and the best possible score is well below 1; words decide more than their order: a linear model on TF-IDF of "
        "words and word pairs scored as high as MiniLM at full depth (both 0.81 on test, 2026-11-22, versions of that "
        "day); some classes keep a house style ('Set the ...' of charts) and library jargon; other versions of the "
        "libraries give another task, so scores compare only under the same "
        "lock file"
    )
