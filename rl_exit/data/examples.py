"""Examples for a decoder: a prompt and the response that it shall learn to give.

Loss and episodes are on the tokens of the response alone. A tokenised example is one row of
:class:`~rl_exit.data.instances.Instances`: prompt and response one after the other, and ``labels`` says how many of the
tokens are the prompt's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from string import Formatter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rl_exit.config import TaskConfig
from rl_exit.data.instances import Instances
from rl_exit.data.registry import BUILT_IN_TEXT, LOCAL, TaskInfo, find_task
from rl_exit.data.sources import RawSplit, Source
from rl_exit.data.tasks import check_columns, open_source, split_names
from rl_exit.errors import DataError, nearest

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_STREAMS = {"cut": 10, "train": 11, "dev": 12, "test": 13}


@dataclass(frozen=True, eq=False)
class ExampleSplit:
    """N examples.

    Attributes:
        ids: [N] int64, unique: the row in the source split.
        prompts: [N].
        responses: [N].
    """

    ids: npt.NDArray[np.int64]
    prompts: list[str]
    responses: list[str]

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.prompts) == len(self.responses):
            raise ValueError(f"ExampleSplit: {len(self.ids)} ids, {len(self.prompts)}, {len(self.responses)} texts")

    def __len__(self) -> int:
        """N."""
        return len(self.ids)

    def take(self, rows: npt.NDArray[np.int64]) -> ExampleSplit:
        """The given rows in the given order; ids go along."""
        return ExampleSplit(self.ids[rows], [self.prompts[r] for r in rows], [self.responses[r] for r in rows])


@dataclass(frozen=True, eq=False)
class ExampleTask:
    """What to learn to write.

    Attributes:
        name: ``task.name``.
        splits: ``train``, ``dev`` and, where there is one, ``test``.
        description: Origin, sizes, what was cut.
    """

    name: str
    splits: Mapping[str, ExampleSplit]
    description: str


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """The prompt of Stanford Alpaca; ``given`` is the input, in a form of its own where it is blank."""
    if given.strip():
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=given)
    return ALPACA_WITHOUT_INPUT.format(instruction=instruction)


def load_examples(config: TaskConfig, seed: int) -> ExampleTask:
    """Load the examples of a task.

    Args:
        config: The ``task`` section.
        seed: Decides which rows become dev where there is none, and which a ``max_*`` keeps.

    Raises:
        DataError: Anything wrong with the name, the files, the columns, the template or the texts.
        UserError: No space left on the device.
    """
    info = find_task(config.name)
    for key in ("labels", "metric", "label"):
        if getattr(config, key) is not None:
            raise DataError(f"task.{key} is for classification; a response is named by task.response")
    task = _built_in(config) if info.name == BUILT_IN_TEXT else _from_source(config, info, seed)
    splits = dict(task.splits)
    notes = [task.description]
    if config.test_name is not None:
        splits["test"], note = _other_test(config)
        notes.append(note)
    limits = {"train": config.max_train, "dev": config.max_dev, "test": config.max_test}
    kept = {role: _limit(split, limits[role], seed, role) for role, split in splits.items()}
    sizes = ", ".join(
        f"{role} {len(split)}" + (f" of {len(splits[role])}" if len(split) < len(splits[role]) else "")
        for role, split in kept.items()
    )
    return replace(task, splits=kept, description=f"{'; '.join(notes)}. Rows: {sizes}.")


def tokenise_examples(split: ExampleSplit, tokenizer: Any, max_length: int) -> tuple[Instances, int]:
    """Tokenise examples; the cut between prompt and response is between two tokens.

    An example is the prompt (with the tokenizer's special tokens in front), the response and the end-of-text token; the
    response is cut where ``max_length`` is reached, then without end-of-text. The text is tokenised as a whole where
    that begins with the tokens of the prompt, else prompt and response each by itself.

    Args:
        split: N examples.
        tokenizer: A Hugging Face tokenizer with an end-of-text token.
        max_length: Tokens of an example.

    Returns:
        (instances whose ``labels`` are the numbers of prompt tokens, how many examples were left out because their
        prompt leaves no room for a response).

    Raises:
        DataError: No example is left.
    """
    rows, starts, ids = [], [], []
    prompts = encode_prompts(split.prompts, tokenizer)
    responses = tokenizer(split.responses, add_special_tokens=False, verbose=False)["input_ids"] if len(split) else []
    wholes = encode_prompts([a + b for a, b in zip(split.prompts, split.responses, strict=True)], tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for number, prompt, alone, whole in zip(split.ids.tolist(), prompts, responses, wholes, strict=True):
        response = whole[len(prompt) :] if whole[: len(prompt)] == prompt else alone
        if len(prompt) >= max_length or not (response or end):
            continue
        rows.append([*prompt, *response, *end][:max_length])
        starts.append(len(prompt))
        ids.append(number)
    if not rows:
        raise DataError(
            f"none of {len(split)} examples has room for a response: every prompt has model.max_length = {max_length} "
            "tokens or more; raise it, or give a shorter task.template"
        )
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    instances = Instances(
        ids=np.array(ids, dtype=np.int64),
        labels=np.array(starts, dtype=np.int64),
        tokens=np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(lengths.sum())),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_types=None,
        pad_token_id=int(pad or 0),
    )
    return instances, len(split) - len(rows)


def encode_prompts(prompts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts, with what the tokenizer puts in front and without what it puts behind.

    A prompt of no token at all becomes the beginning-of-text token (or end-of-text, which separates texts where there
    is no other): a decoder needs a token to start from.
    """
    if not prompts:
        return []
    rows: list[list[int]] = tokenizer(prompts, verbose=False)["input_ids"]
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    first = next(token for token in known if token is not None)
    for number, row in enumerate(rows):
        while len(row) > 1 and row[-1] == tokenizer.eos_token_id:
            row.pop()
        rows[number] = row or [first]
    return rows


def _built_in(config: TaskConfig) -> ExampleTask:
    from rl_exit.data.documentation import build

    for key in ("path", "subset", "text", "text_pair", "response", "template", "dev", "test"):
        if getattr(config, key) is not None:
            raise DataError(f"task.{key} has no meaning for the built-in task '{BUILT_IN_TEXT}'")
    return build()


def _from_source(config: TaskConfig, info: TaskInfo, seed: int) -> ExampleTask:
    source = open_source(config, info)
    names = split_names(config, info, source)
    splits = {role: _read(source, name, config, info) for role, name in names.items()}
    notes = [source.origin]
    if "dev" not in splits:
        train = splits["train"]
        if len(train) < 2:
            raise DataError(f"{source.origin}: {len(train)} rows are too few to cut dev from; give task.dev")
        count = min(max(round(len(train) * config.dev_fraction), 1), len(train) - 1)
        order = np.random.default_rng([seed, _STREAMS["cut"]]).permutation(len(train))
        splits = {"train": train.take(np.sort(order[count:])), "dev": train.take(np.sort(order[:count]))} | {
            role: split for role, split in splits.items() if role != "train"
        }
        notes.append(f"dev is cut from train (task.dev_fraction {config.dev_fraction:g}, seed {seed})")
    ordered: dict[str, ExampleSplit] = {role: splits[role] for role in ("train", "dev", "test") if role in splits}
    return ExampleTask(config.name, ordered, "; ".join(notes))


def _other_test(config: TaskConfig) -> tuple[ExampleSplit, str]:
    """The test split of another task: the split of that name, or the only one there is."""
    info = find_task(str(config.test_name))
    if info.kind != "generation" and info.hub is not None and info.hub != info.name:
        raise DataError(f"task.test_name = '{config.test_name}' is a task with labels, not with responses")
    other = TaskConfig(name=info.name, path=config.test_path)
    source = open_source(other, info)
    name = "test" if "test" in source.names else source.names[0] if len(source.names) == 1 else None
    if name is None:
        raise DataError(f"{source.origin}: no split 'test' (task.test_name). Found: {', '.join(sorted(source.names))}")
    return _read(source, name, other, info), f"test: {source.origin}, split '{name}'"


def _read(source: Source, name: str, config: TaskConfig, info: TaskInfo) -> ExampleSplit:
    split = source.read(name)
    plain = info.name == LOCAL or info.hub == info.name
    instruction = config.text or (_first_of(split, ("instruction", "prompt", "text")) if plain else info.text)
    given = config.text_pair or (_first_of(split, ("input", "context"), None) if plain else info.text_pair)
    answer = config.response or (_first_of(split, ("response", "output", "completion")) if plain else info.label)
    check_columns(split, {"task.response": answer})
    responses = _column(split, answer)
    if config.template is not None:
        fields = _fields(config.template, split)
        columns = {field: _column(split, field) for field in fields}
        prompts = [
            config.template.format(**{field: columns[field][row] for field in fields}) for row in range(len(responses))
        ]
    else:
        check_columns(split, {"task.text": instruction, "task.text_pair": given})
        first = _column(split, instruction)
        second = [""] * len(first) if given is None else _column(split, given)
        # A column called "prompt" is one already; instructions get Alpaca's format.
        ready = instruction == "prompt" and given is None
        prompts = first if ready else [alpaca_prompt(a, b) for a, b in zip(first, second, strict=True)]
    filled = np.array([row for row, text in enumerate(responses) if text.strip()], dtype=np.int64)
    if not len(filled):
        raise DataError(f"{split.where}, column '{answer}': all responses are empty")
    return ExampleSplit(np.arange(len(responses), dtype=np.int64), prompts, responses).take(filled)


def _first_of(split: RawSplit, names: tuple[str, ...], default: str | None = "") -> Any:
    found = next((name for name in names if name in split.table.column_names), None)
    return found if found is not None or default is None else names[0]


def _fields(template: str, split: RawSplit) -> list[str]:
    """Columns that a template names.

    Raises:
        DataError: It cannot be read, names none, or one that is not there.
    """
    try:
        fields = [field for _, field, spec, conversion in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise DataError(f"task.template: {error}; a brace that is no column is written twice: {{{{") from None
    columns = split.table.column_names
    for field in fields:
        if field not in columns:
            raise DataError(
                f"task.template: {{{field}}} is no column of {split.where}.{nearest(field, columns)} "
                f"Columns there: {', '.join(columns)}"
            )
    if not fields:
        raise DataError("task.template names no column; write e.g. 'Question: {question}\\nAnswer:'")
    return list(dict.fromkeys(fields))


def _column(split: RawSplit, name: str) -> list[str]:
    """Texts of a column; a missing one is empty."""
    array = split.table.column(name)
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if not (
        pa.types.is_null(array.type)
        or pa.types.is_string(array.type)
        or pa.types.is_large_string(array.type)
        or pa.types.is_string_view(array.type)
    ):
        raise DataError(f"{split.where}, column '{name}': texts are expected, the column holds {array.type}")
    return [text or "" for text in array.to_pylist()]


def _limit(split: ExampleSplit, most: int | None, seed: int, role: str) -> ExampleSplit:
    if most is None or most >= len(split):
        return split
    order = np.random.default_rng([seed, _STREAMS[role]]).permutation(len(split))
    return split.take(np.sort(order[:most]))
