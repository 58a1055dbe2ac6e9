"""The built-in text for decoders: docstrings of the installed dependencies, cut into a prompt and what follows.

The files are those of the task ``docstrings`` (:mod:`rl_exit.data.docstrings`), read with :mod:`ast` and never
imported, and split by file as there. Every choice hangs on hashes of paths and texts, so that equal library versions
give equal examples on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from rl_exit.data.docstring_text import normalised
from rl_exit.data.docstrings import TOPICS, digest, find_packages, read_docstrings, split_of, topic_files
from rl_exit.data.examples import ExampleSplit, ExampleTask
from rl_exit.errors import DataError

SIZES = {"train": 6000, "dev": 300, "test": 300}
"""Examples of a split where the installed versions have enough."""

_PROMPT_WORDS = 8
_LEAST_WORDS, _MOST_WORDS = 20, 48
_FILES_PER_TOPIC = 200
_MOST_PER_FILE = 12
_SAME_WORDS = 10  # texts that begin with the same so many words count as one
_MARKUP = re.compile(r":(?:\w+:)+`~?([^`]*)`|`{1,2}([^`]*)`{1,2}")
_LINE = re.compile(r"[=\-~^*#\"'+]{3,}")


def build() -> ExampleTask:
    """Collect the examples from the installed libraries.

    Raises:
        DataError: A library is missing, or there are too few texts.
    """
    found: dict[str, dict[str, str]] = {role: {} for role in SIZES}
    seen: set[str] = set()
    for path, text in sorted(_texts(), key=lambda row: digest(f"{row[0]}\n{row[1]}")):
        key = " ".join(normalised(text).split()[:_SAME_WORDS])
        role = split_of(path)
        if key in seen or len(found[role]) >= SIZES[role]:
            continue
        seen.add(key)
        found[role][text] = path
    for role, texts in found.items():
        if len(texts) < SIZES[role] // 3:
            raise DataError(
                f"the built-in text needs {SIZES[role] // 3} docstrings in {role}; the installed libraries hold "
                f"{len(texts)}. Install the pinned versions, or choose another task (rl-exit tasks)"
            )
    files = ", ".join(f"{role} {len(set(texts.values()))}" for role, texts in found.items())
    return ExampleTask(
        "documentation",
        {role: _split(list(texts)) for role, texts in found.items()},
        f"Docstrings of installed libraries: the first {_PROMPT_WORDS} words are the prompt, up to "
        f"{_MOST_WORDS - _PROMPT_WORDS} words that follow the response. Source files: {files}; no file is in two "
        "splits, and no two texts begin alike. Other versions of the libraries give other examples",
    )


def _texts() -> Iterator[tuple[str, str]]:
    roots = find_packages()
    for topic in TOPICS:
        files = topic_files(topic, roots)
        for path in list(files)[:_FILES_PER_TOPIC]:
            texts = dict.fromkeys(filter(None, map(_plain, read_docstrings(files[path]))))
            for text in sorted(texts, key=digest)[:_MOST_PER_FILE]:
                yield path, text


def _plain(docstring: str) -> str:
    """A docstring on one line, at most so many words; empty where it is too short or not of ASCII."""
    text = " ".join(_LINE.sub(" ", _MARKUP.sub(lambda m: m[1] or m[2] or "", docstring)).split())
    words = text.split(" ")
    return " ".join(words[:_MOST_WORDS]) if len(words) >= _LEAST_WORDS and text.isascii() else ""


def _split(texts: list[str]) -> ExampleSplit:
    words = [text.split(" ") for text in texts]
    return ExampleSplit(
        ids=np.arange(len(texts), dtype=np.int64),
        prompts=[" ".join(row[:_PROMPT_WORDS]) for row in words],
        responses=[" " + " ".join(row[_PROMPT_WORDS:]) for row in words],
    )
