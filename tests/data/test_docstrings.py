"""The built-in task: balanced, free of overlap, masked, and the same wherever the same versions are installed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rl_exit.data import docstrings
from rl_exit.data.docstring_text import MASKED_NAMES, PLACEHOLDER, content_words, normalised
from rl_exit.data.docstrings import LEAST_PER_CLASS, PER_CLASS, TOPICS, Topic, build, split_of
from rl_exit.data.tasks import Task
from rl_exit.errors import DataError

SMALL = (Topic("server", ("uvicorn",)), Topic("client", ("requests",)))
SMALL_SCRIPT = """
import hashlib, json
from rl_exit.data import docstrings
docstrings.TOPICS = (docstrings.Topic("server", ("uvicorn",)), docstrings.Topic("client", ("requests",)))
docstrings.LEAST_PER_CLASS = {"train": 1, "dev": 1, "test": 1}
task = docstrings.build()
rows = {name: [split.texts, split.labels.tolist()] for name, split in task.splits.items()}
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())
"""


@pytest.fixture(scope="session")  # tests that wander between processes leave the module and come back to it
def task() -> Task:
    return build()


def fingerprint(task: Task) -> str:
    rows = {name: [split.texts, split.labels.tolist()] for name, split in task.splits.items()}
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "TOPICS", SMALL)
    monkeypatch.setattr(docstrings, "LEAST_PER_CLASS", dict.fromkeys(PER_CLASS, 1))


@pytest.mark.slow
def test_sizes_and_balance(task: Task) -> None:
    assert task.metric == "accuracy"
    assert task.label_names == tuple(topic.label for topic in TOPICS)
    assert list(task.splits) == ["train", "dev", "test"]
    for name, split in task.splits.items():
        counts = np.bincount(split.labels, minlength=len(TOPICS))
        assert len(set(counts.tolist())) == 1, f"{name}: {counts}"
        assert LEAST_PER_CLASS[name] <= counts[0] <= PER_CLASS[name]
        assert len(np.unique(split.ids)) == len(split)
    assert min(len(task.splits[name]) for name in ("dev", "test")) >= 600
    assert 3_600 <= len(task.splits["train"]) <= 12_000


@pytest.mark.slow
def test_rows_mix_the_classes(task: Task) -> None:
    for split in task.splits.values():
        assert len(set(split.labels[:100].tolist())) == len(TOPICS)


@pytest.mark.slow
def test_no_text_twice(task: Task) -> None:
    keys = [normalised(text) for split in task.splits.values() for text in split.texts]
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
def test_no_near_duplicates_across_splits(task: Task) -> None:
    words = {name: [content_words(normalised(text)) for text in split.texts] for name, split in task.splits.items()}
    for one, other in (("train", "test"), ("dev", "test"), ("train", "dev")):
        for left in words[other][:60]:
            closest = max(len(left & right) / len(left | right) for right in words[one])
            assert closest < 0.75, f"{one} holds a near-duplicate of {sorted(left)} of {other}"


def test_near_duplicates_are_found_as_by_brute_force() -> None:
    def rows(*texts: str) -> list[docstrings._Text]:
        return [docstrings._Text("a.py", 0, text, normalised(text)) for text in texts]

    rng = np.random.default_rng(0)
    vocabulary = np.array(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"])
    texts = rows(*(" ".join(rng.choice(vocabulary, size=5, replace=False)) for _ in range(60)))
    others = rows(*(" ".join(rng.choice(vocabulary, size=6, replace=False)) for _ in range(3)))

    def far(text: docstrings._Text) -> bool:
        left = content_words(text.key)
        return all(len(left & right) < 0.75 * len(left | right) for right in (content_words(o.key) for o in others))

    kept = docstrings._unlike(texts, others)
    assert kept == [text for text in texts if far(text)]
    assert 0 < len(kept) < len(texts)


def test_no_file_in_two_splits(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    chosen: dict[str, set[str]] = {}
    balanced = docstrings._balanced

    def record(split: str, texts: list[docstrings._Text]) -> list[docstrings._Text]:
        rows = balanced(split, texts)
        chosen[split] = {row.path for row in rows}
        assert all(split_of(row.path) == split for row in rows)
        return rows

    monkeypatch.setattr(docstrings, "_balanced", record)
    build()
    assert len(chosen) == 3
    assert not chosen["train"] & chosen["dev"] and not chosen["train"] & chosen["test"]
    assert not chosen["dev"] & chosen["test"]


@pytest.mark.slow
def test_masks_hold(task: Task) -> None:
    words = {
        word.lower()
        for split in task.splits.values()
        for text in split.texts
        for word in re.findall(r"[A-Za-z][\w.-]*\w|[A-Za-z]", text)
    }
    packages = {folder.partition("/")[0] for topic in TOPICS for folder in topic.folders} | {"scikit-learn"}
    assert packages <= MASKED_NAMES
    assert not words & MASKED_NAMES
    assert PLACEHOLDER in words
    assert not [word for word in words if "_" in word]


@pytest.mark.slow
def test_texts_read_as_english(task: Task) -> None:
    for split in task.splits.values():
        for text in split.texts:
            assert text.isascii() and 6 <= len(text.split()) <= 40, text
            assert not re.search(r"[`=<>{}|]|>>>|::|:\w+:", text), text
            assert text.endswith((".", "!", "?")), text


@pytest.mark.slow
def test_description_names_libraries_versions_and_weaknesses(task: Task) -> None:
    for word in ("networkx 3", "ray.rllib", "scikit-learn 1", "near-duplicates", "Weaknesses", "train "):
        assert word in task.description


def test_same_task_in_any_folder_order_and_process(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    first = build()
    assert fingerprint(build(seed=5)) == fingerprint(first)
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(rglob(self, pattern))))
    assert fingerprint(build()) == fingerprint(first)
    done = subprocess.run(
        [sys.executable, "-c", SMALL_SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.stdout.split()[-1] == fingerprint(first)
    # The fingerprint sees a change: another order of the classes is another task.
    monkeypatch.setattr(docstrings, "TOPICS", SMALL[::-1])
    assert fingerprint(build()) != fingerprint(first)


def test_libraries_are_not_imported() -> None:
    script = (
        "import sys; from rl_exit.data.docstrings import find_packages; before = set(sys.modules); find_packages();"
        "print(sorted(name for name in set(sys.modules) - before if '.' not in name))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "TOPICS", (*SMALL, Topic("x", ("no_such_library",))))
    with pytest.raises(DataError, match=r"not installed: no_such_library\."):
        build()


def test_too_few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "TOPICS", SMALL)
    with pytest.raises(DataError, match=r"needs \d+ texts per class in \w+; the installed \w+ [\d.]+ hold only"):
        build()
