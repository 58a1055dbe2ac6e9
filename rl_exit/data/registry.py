"""The tasks that have a name: where their texts come from and what the columns are called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rl_exit.errors import DataError, nearest

Metric = Literal["accuracy", "f1", "mcc"]

BUILT_IN = "docstrings"
BUILT_IN_TEXT = "documentation"
LOCAL = "local"


@dataclass(frozen=True)
class TaskInfo:
    """What is known of a task before it is loaded.

    Attributes:
        name: The word for ``task.name``.
        description: One line for people: what is asked.
        note: Sizes and whatever else one should know before choosing it.
        kind: Whether texts get a label, or prompts a response.
        hub: Hub dataset id, or None.
        subset: Hub configuration name.
        revision: Hub revision that is asked for, where the newest would not do.
        text: Column of the text.
        text_pair: Column of the second text.
        label: Column of the label, or of the response.
        labels: Class names in the order of their numbers, where the task fixes them.
        classes: C, where known beforehand.
        metric: Metric of the task.
        dev: Split to choose on, where the usual names do not say it.
    """

    name: str
    description: str
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None
    classes: int | None = None
    metric: Metric = "accuracy"
    dev: str | None = None
    note: str = ""
    kind: Literal["classification", "generation"] = "classification"

    @property
    def origin(self) -> str:
        """Where the texts come from, in words."""
        if self.name in (BUILT_IN, BUILT_IN_TEXT):
            return "built in"
        if self.hub is None:
            return "local files (task.path)"
        return f"hub: {self.hub}" + (f" [{self.subset}]" if self.subset else "")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read: text, the second text if any, label."""
        return (self.text, *((self.text_pair,) if self.text_pair else ()), self.label)

    @property
    def needs_hub(self) -> bool:
        """Whether the task is downloaded unless ``task.path`` names local files."""
        return self.hub is not None


_GLUE = "nyu-mll/glue"

_TASKS = (
    TaskInfo(
        BUILT_IN,
        "what is a sentence of documentation about: charts, graphs, statistics, web, ...",
        note="first sentences of docstrings in the installed dependencies, giveaway names masked; no download",
    ),
    TaskInfo(
        "rte",
        "GLUE: does the first sentence entail the second?",
        _GLUE,
        "rte",
        text="sentence1",
        text_pair="sentence2",
        labels=("entailment", "not_entailment"),
        classes=2,
        note="2490 pairs, test labels withheld",
    ),
    TaskInfo(
        "mrpc",
        "GLUE, Microsoft Research paraphrase corpus: do two sentences of news mean the same?",
        _GLUE,
        "mrpc",
        text="sentence1",
        text_pair="sentence2",
        labels=("not_equivalent", "equivalent"),
        classes=2,
        metric="f1",
        note="3668 pairs",
    ),
    TaskInfo(
        "sst2",
        "GLUE, Stanford sentiment treebank: is a phrase of a film review positive?",
        _GLUE,
        "sst2",
        text="sentence",
        labels=("negative", "positive"),
        classes=2,
        note="67349 phrases, test labels withheld",
    ),
    TaskInfo(
        "qnli",
        "GLUE: does the sentence answer the question?",
        _GLUE,
        "qnli",
        text="question",
        text_pair="sentence",
        labels=("entailment", "not_entailment"),
        classes=2,
        note="104743 pairs, test labels withheld",
    ),
    TaskInfo(
        "qqp",
        "GLUE, Quora question pairs: do two questions ask the same?",
        _GLUE,
        "qqp",
        text="question1",
        text_pair="question2",
        labels=("not_duplicate", "duplicate"),
        classes=2,
        metric="f1",
        note="363846 pairs, test labels withheld",
    ),
    TaskInfo(
        "mnli",
        "GLUE: does the premise entail the hypothesis?",
        _GLUE,
        "mnli",
        text="premise",
        text_pair="hypothesis",
        labels=("entailment", "neutral", "contradiction"),
        classes=3,
        dev="validation_matched",
        note="392702 pairs, test labels withheld; dev is validation_matched, task.test may be validation_mismatched",
    ),
    TaskInfo(
        "cola",
        "GLUE, corpus of linguistic acceptability: is the sentence grammatical?",
        _GLUE,
        "cola",
        text="sentence",
        labels=("unacceptable", "acceptable"),
        classes=2,
        metric="mcc",
        note="8551 sentences, test labels withheld",
    ),
    TaskInfo(
        "stackoverflow",
        "titles of Stack Overflow questions by tag (Xu et al. 2015)",
        classes=20,
        note="18000 titles; no hub copy is registered, task.path gives the files (text, label, label_name)",
    ),
    TaskInfo(
        "mcid",
        "M-CID: intents of questions about Covid-19 (Arora et al. 2020)",
        classes=16,
        note="no hub copy is registered, task.path gives the files (text, label)",
    ),
    TaskInfo(
        "clinc150",
        "requests to an assistant, 150 intents and one class for what is out of scope (Larson et al. 2019)",
        "clinc/clinc_oos",
        "plus",
        label="intent",
        classes=151,
        note="15250 requests",
    ),
    TaskInfo(
        "banking77",
        "questions of bank customers by intent (Casanueva et al. 2020)",
        "mteb/banking77",
        # The first data revision: it holds all rows of the paper; later ones drop duplicates.
        revision="0fd18e25b25c072e09e0d92ab615fda904d66300",
        classes=77,
        note="10003 questions, dev is cut from train",
    ),
    TaskInfo(
        "trec",
        "questions by the kind of answer (Li and Roth 2002)",
        "SetFit/TREC-QC",
        label="label_coarse",
        classes=6,
        note="5452 questions, dev is cut from train; task.label=label gives the 50 fine classes",
    ),
    TaskInfo(
        "ag_news",
        "news by section (Zhang et al. 2015)",
        "fancyzhx/ag_news",
        labels=("World", "Sports", "Business", "Sci/Tech"),
        classes=4,
        note="120000 texts, dev is cut from train",
    ),
    TaskInfo(
        BUILT_IN_TEXT,
        "continue a piece of documentation",
        text="prompt",
        label="response",
        note="docstrings of the installed dependencies, cut in two; no download; for a decoder",
        kind="generation",
    ),
    TaskInfo(
        "alpaca",
        "follow an instruction (Taori et al. 2023)",
        "tatsu-lab/alpaca",
        text="instruction",
        text_pair="input",
        label="output",
        note="52002 examples, dev is cut from train; CC BY-NC 4.0; for a decoder",
        kind="generation",
    ),
    TaskInfo(
        "dolly",
        "follow an instruction (Databricks 2023)",
        "databricks/databricks-dolly-15k",
        text="instruction",
        text_pair="context",
        label="response",
        note="15011 examples in one split; CC BY-SA 3.0; for a decoder",
        kind="generation",
    ),
    TaskInfo(LOCAL, "any Parquet, CSV, TSV or JSONL: task.path and, where they differ, task.text and task.label"),
)

_BY_NAME = {task.name: task for task in _TASKS}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def list_tasks() -> list[TaskInfo]:
    """All tasks that have a name, in the order in which to show them."""
    return list(_TASKS)


def find_task(name: str) -> TaskInfo:
    """What is known of a registered task, 'local', or any 'owner/name' dataset of the hub.

    Raises:
        DataError: The name is neither registered nor a hub id; the nearest registered one is suggested.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return TaskInfo(name, f"dataset {name} of the hub", hub=name)
    if "/" in name or "\\" in name:
        raise DataError(f"task.name = '{name}' looks like a path; local files are given as task.name=local task.path=…")
    raise DataError(
        f"task.name = '{name}' is no registered task.{nearest(name, _BY_NAME)} Accepted: {', '.join(_BY_NAME)}, "
        "or a hub dataset as 'owner/name'"
    )
