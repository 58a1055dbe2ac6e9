"""Tasks: texts with labels in train, dev and (where labelled) test, and their way to tokenised instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rl_exit.config import TaskConfig
from rl_exit.data.instances import Instances
from rl_exit.data.labels import Classes, encode, find_classes, read_labels
from rl_exit.data.registry import BUILT_IN, LOCAL, Metric, TaskInfo, find_task, list_tasks
from rl_exit.data.sources import DEV_NAMES, RawSplit, Source, open_hub, open_local
from rl_exit.errors import DataError, nearest

__all__ = ["Task", "TaskInfo", "TextSplit", "list_tasks", "load_task", "task_kind", "tokenise"]

_NUMBER_TEXT = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
# One random stream per purpose, so that max_dev does not change what max_train takes.
_STREAMS = {"cut": 0, "train": 1, "dev": 2, "test": 3}


@dataclass(frozen=True, eq=False)
class TextSplit:
    """N texts with labels.

    Attributes:
        ids: [N] int64, unique: the row in the source split.
        texts: [N].
        pairs: [N] second texts, or None.
        labels: [N] int64, class numbers.
    """

    ids: npt.NDArray[np.int64]
    texts: list[str]
    pairs: list[str] | None
    labels: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        lengths = {
            len(self.ids),
            len(self.texts),
            len(self.labels),
            len(self.ids if self.pairs is None else self.pairs),
        }
        if len(lengths) > 1:
            raise ValueError(f"TextSplit: columns of different lengths {sorted(lengths)}")

    def __len__(self) -> int:
        """N."""
        return len(self.texts)

    def take(self, rows: npt.NDArray[np.int64]) -> TextSplit:
        """The given rows in the given order; ids go along."""
        pairs = None if self.pairs is None else [self.pairs[row] for row in rows]
        return TextSplit(self.ids[rows], [self.texts[row] for row in rows], pairs, self.labels[rows])


@dataclass(frozen=True, eq=False)
class Task:
    """What to learn.

    Attributes:
        name: ``task.name``.
        label_names: [C], in the order of the class numbers.
        metric: What counts: accuracy, F1 or Matthews' correlation.
        splits: ``train``, ``dev`` and, only where it has labels, ``test``.
        description: Origin, sizes, what was cut or left out.
    """

    name: str
    label_names: tuple[str, ...]
    metric: Metric
    splits: Mapping[str, TextSplit]
    description: str


def task_kind(config: TaskConfig) -> str:
    """``"classification"`` or ``"generation"``: ``task.kind``, or what the task is for.

    Raises:
        DataError: Unknown task, or a task of the other kind.
    """
    info = find_task(config.name)
    fixed = info.hub != info.name and info.name != LOCAL
    if config.kind is not None and fixed and config.kind != info.kind:
        raise DataError(f"task.kind = '{config.kind}': task '{config.name}' is for {info.kind}")
    return config.kind or info.kind


def load_task(config: TaskConfig, seed: int) -> Task:
    """Load the texts of a task.

    Args:
        config: The ``task`` section.
        seed: Decides which rows become dev where there is none, and which a ``max_*`` keeps. Rows stay in their order
            and keep their ids; a smaller ``max_*`` takes a subset of a larger one.

    Raises:
        DataError: Anything wrong with the name, the files, the columns, the texts or the labels.
        UserError: No space left on the device.
    """
    info = find_task(config.name)
    if task_kind(config) == "generation":
        raise DataError(
            f"task '{config.name}' has responses, not labels: it is for a decoder that generates "
            "(docs/generation-training.md), and this command is about classification"
        )
    task = (
        _built_in(config, seed) if info.name == BUILT_IN else _assemble(config, info, open_source(config, info), seed)
    )
    limits = {"train": config.max_train, "dev": config.max_dev, "test": config.max_test}
    splits = {name: _limit(split, limits[name], seed, name) for name, split in task.splits.items()}
    sizes = ", ".join(
        f"{name} {len(split)}" + (f" of {len(task.splits[name])}" if len(split) < len(task.splits[name]) else "")
        for name, split in splits.items()
    )
    return replace(task, splits=splits, description=f"{task.description.rstrip('. ')}. Rows: {sizes}.")


def load_labelled(path: str, config: TaskConfig, label_names: Sequence[str], labelled: bool = True) -> TextSplit:
    """Read one file or one folder's only split of more texts of a task that a model already knows.

    Args:
        path: File (Parquet, CSV, TSV, JSONL).
        config: The task that the model was trained on; its columns are looked for.
        label_names: The model's classes in the order of their numbers.
        labelled: Whether labels are needed; without them all are 0.

    Raises:
        DataError: Anything wrong with the file, its columns, texts or labels.
    """
    info = find_task(config.name)
    source = open_local(path)
    if len(source.names) != 1:
        raise DataError(f"{source.origin}: {len(source.names)} splits ({', '.join(source.names)}); name one file")
    raw = source.read(source.names[0])
    text, pair, label = config.text or info.text, config.text_pair or info.text_pair, config.label or info.label
    wanted = {"task.text": text, "task.text_pair": pair, **({"task.label": label} if labelled else {})}
    check_columns(raw, wanted)
    numbers = np.zeros(raw.table.num_rows, dtype=np.int64)
    if labelled:
        found = read_labels(raw, label)
        if found.all_unlabelled:
            raise DataError(f"{raw.where}, column '{label}': all labels are missing")
        numbers = encode(found, find_classes(found, raw, label_names, None))
    return _text_split(raw, text, pair, numbers)


def tokenise(split: TextSplit, tokenizer: Any, max_length: int) -> Instances:
    """Tokenise a split in one call.

    Args:
        split: N texts.
        tokenizer: A Hugging Face tokenizer; a fast one uses all cores.
        max_length: Tokens per instance, special tokens included; more are cut off (of a pair, from the longer text).
    """
    segments = "token_type_ids" in tokenizer.model_input_names
    encoded = tokenizer(
        split.texts,
        split.pairs,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=segments,
        verbose=False,
    )
    rows: list[list[int]] = encoded["input_ids"]
    types: list[list[int]] | None = encoded["token_type_ids"] if segments else None
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, 0)
    pad = next(token for token in known if token is not None)
    # Tokenizers without special tokens make nothing of a blank text; a model needs at least one position.
    for row, tokens in enumerate(rows):
        if not tokens:
            rows[row] = [next(token for token in (*known[1:4], pad) if token is not None)]
            if types is not None:
                types[row] = [0]
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    return Instances(
        ids=split.ids,
        labels=split.labels,
        tokens=np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=total),
        offsets=offsets,
        token_types=None if types is None else np.fromiter(chain.from_iterable(types), dtype=np.int8, count=total),
        pad_token_id=int(pad),
    )


def _built_in(config: TaskConfig, seed: int) -> Task:
    from rl_exit.data.docstrings import build

    for key in ("path", "subset", "text", "text_pair", "label", "labels", "dev", "test"):
        if getattr(config, key) is not None:
            raise DataError(
                f"task.{key} has no meaning for the built-in task '{BUILT_IN}'; for files of your own use "
                "task.name=local task.path=FOLDER"
            )
    task = build(seed)
    return task if config.metric is None else replace(task, metric=config.metric)


def open_source(config: TaskConfig, info: TaskInfo) -> Source:
    """The splits of a task: local files where ``task.path`` names them, else the hub.

    Raises:
        DataError: There is neither.
    """
    if config.path is not None:
        # The subset of a registered task names a part of the hub dataset, not a folder of the local files.
        return open_local(config.path, config.subset, single=config.train)
    if info.hub is None:
        kind = "local files need" if info.name == LOCAL else f"task '{info.name}' is not on the hub and needs"
        raise DataError(f"{kind} task.path, a folder or file of Parquet, CSV, TSV or JSONL")
    return open_hub(info.hub, config.subset or info.subset, info.revision)


def _assemble(config: TaskConfig, info: TaskInfo, source: Source, seed: int) -> Task:
    text = config.text or info.text
    pair = config.text_pair or info.text_pair
    label = config.label or info.label
    names = split_names(config, info, source)
    notes = []
    raw = {role: source.read(name) for role, name in names.items()}
    if "test" in raw and config.test is None and label not in raw["test"].table.column_names:
        del raw["test"]
        notes.append("its test split has no labels and is left out")
    for split in raw.values():
        check_columns(split, {"task.text": text, "task.text_pair": pair, "task.label": label})
    labels = {role: read_labels(split, label) for role, split in raw.items()}
    if "test" in labels and labels["test"].all_unlabelled:
        if config.test is not None:
            raise DataError(f"{raw['test'].where}: task.test = '{config.test}' has no labels to report on")
        del raw["test"], labels["test"]
        notes.append("its test split has no labels and is left out")
    classes = find_classes(labels["train"], raw["train"], config.labels, info.labels)
    splits = {role: _text_split(split, text, pair, encode(labels[role], classes)) for role, split in raw.items()}
    _check_train(splits["train"], classes, raw["train"].where, label)
    if "dev" not in splits:
        splits = {**_cut_dev(splits["train"], config.dev_fraction, seed, raw["train"].where), **_rest(splits)}
        notes.append(f"dev is cut from train (task.dev_fraction {config.dev_fraction:g}, seed {seed})")
    about = f"{info.description}; " if info.name != LOCAL else ""
    return Task(
        name=config.name,
        label_names=classes.names,
        metric=config.metric or info.metric,
        splits={role: splits[role] for role in ("train", "dev", "test") if role in splits},
        description="; ".join([f"{about}{source.origin}, {len(classes.names)} classes", *notes]),
    )


def _rest(splits: Mapping[str, TextSplit]) -> dict[str, TextSplit]:
    return {role: split for role, split in splits.items() if role != "train"}


def split_names(config: TaskConfig, info: TaskInfo, source: Source) -> dict[str, str]:
    """Role (train, dev, test) -> name of the split in the source.

    Raises:
        DataError: A split that is not there, or train named for another role.
    """
    chosen = {"train": config.train}
    if config.dev is not None:
        chosen["dev"] = config.dev
    else:
        usual = (info.dev, *DEV_NAMES) if info.dev else DEV_NAMES
        found = next((name for name in usual if name in source.names and name != config.train), None)
        if found is not None:
            chosen["dev"] = found
    if config.test is not None:
        chosen["test"] = config.test
    elif "test" in source.names and "test" not in chosen.values():
        chosen["test"] = "test"
    for role, name in chosen.items():
        if name not in source.names:
            raise DataError(
                f"{source.origin}: no split '{name}' (task.{role}).{nearest(name, source.names)} "
                f"Found: {', '.join(sorted(source.names))}"
            )
        if role != "train" and name == config.train:
            raise DataError(f"task.{role} = '{name}' is the split that is trained on; choose another")
    return chosen


def check_columns(split: RawSplit, wanted: Mapping[str, str | None]) -> None:
    """Refuse a split without rows or without a column; ``wanted`` has them by the key that names them.

    Raises:
        DataError: What is missing, and what is there.
    """
    columns = split.table.column_names
    for key, column in wanted.items():
        if column is not None and column not in columns:
            raise DataError(
                f"{split.where}: no column '{column}' ({key}).{nearest(column, columns)} "
                f"Columns there: {', '.join(columns)}"
            )
    if split.table.num_rows == 0:
        raise DataError(f"{split.where}: the split is empty")


def _text_split(split: RawSplit, text: str, pair: str | None, labels: npt.NDArray[np.int64]) -> TextSplit:
    return TextSplit(
        ids=np.arange(len(labels), dtype=np.int64),
        texts=_texts(split, text),
        pairs=None if pair is None else _texts(split, pair),
        labels=labels,
    )


def _texts(split: RawSplit, column: str) -> list[str]:
    array = split.table.column(column)
    where = f"{split.where}, column '{column}'"
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_null(array.type):
        raise DataError(f"{where}: all texts are missing")
    if column in split.class_names or not (
        pa.types.is_string(array.type) or pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type)
    ):
        kind = "numbers" if pa.types.is_integer(array.type) or pa.types.is_floating(array.type) else str(array.type)
        raise DataError(f"{where}: texts are expected, the column holds {kind}; task.text and task.text_pair name it")
    missing = np.asarray(array.is_null().to_numpy(), dtype=np.bool_)
    if missing.any():
        raise DataError(
            f"{where}: the text is missing in row {int(np.argmax(missing))} (counted from 0), {int(missing.sum())} of "
            f"{len(missing)} in all; remove these rows or fill them in"
        )
    if not split.typed and pc.all(pc.match_substring_regex(array, _NUMBER_TEXT)).as_py():
        raise DataError(f"{where}: texts are expected, the column holds numbers; task.text and task.text_pair name it")
    if pc.all(pc.equal(pc.utf8_trim_whitespace(array), "")).as_py():
        raise DataError(f"{where}: all texts are empty")
    texts: list[str] = array.to_pylist()
    return texts


def _check_train(train: TextSplit, classes: Classes, where: str, label: str) -> None:
    found = np.unique(train.labels)
    if len(found) < 2:
        raise DataError(
            f"{where}, column '{label}': at least 2 classes must occur in train, there is only "
            f"'{classes.names[int(found[0])]}'"
        )


def _cut_dev(train: TextSplit, fraction: float, seed: int, where: str) -> dict[str, TextSplit]:
    spare = len(train) - len(np.unique(train.labels))
    if spare < 1:
        raise DataError(f"{where}: {len(train)} rows are too few to cut dev from; give task.dev or more rows")
    count = min(max(round(len(train) * fraction), 1), spare)
    rng = np.random.default_rng([seed, _STREAMS["cut"]])
    dev = np.sort(_stratified(train.labels, rng, keep_last=True)[:count])
    return {"train": train.take(np.setdiff1d(np.arange(len(train)), dev)), "dev": train.take(dev)}


def _limit(split: TextSplit, most: int | None, seed: int, role: str) -> TextSplit:
    if most is None or most >= len(split):
        return split
    rng = np.random.default_rng([seed, _STREAMS[role]])
    return split.take(np.sort(_stratified(split.labels, rng, keep_last=False)[:most]))


def _stratified(labels: npt.NDArray[np.int64], rng: np.random.Generator, keep_last: bool) -> npt.NDArray[np.int64]:
    """All rows in a random order of which every beginning has about the classes' shares.

    Args:
        labels: [N].
        rng: Source of the order.
        keep_last: True puts one row of each class at the very end, so that the rest never lacks a class; False puts
            one row of each class first, so that the beginning lacks none.
    """
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    start = np.concatenate([[0], np.cumsum(counts)[:-1]])
    position = np.empty(len(labels), dtype=np.float64)
    rank = np.arange(len(labels)) - start[labels[by_class]]
    size = counts[labels[by_class]]
    share = (rank + 0.5) / size
    share = np.where(rank == size - 1, 2.0, share) if keep_last else np.where(rank == 0, -1.0, share)
    position[by_class] = share
    return order[np.argsort(position[order], kind="stable")].astype(np.int64, copy=False)
