"""The engine that really skips layers: rows that leave are taken out of the batch, padding shrinks with them.

After each layer the criterion says which rows leave; the survivors' hidden states are compacted and cut to the longest
survivor, so the next layer runs on what is left and on nothing else. Over many texts, survivors of several batches are
put together again (:mod:`rl_exit.pooling`). Results equal those of all exits computed at full depth, whatever rows
share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rl_exit.criteria.base import Criterion
from rl_exit.criteria.policy import ConsistentEE
from rl_exit.errors import ConfigError, DataError
from rl_exit.pooling import run_pooled
from rl_exit.progress import Progress, Silent, Terminal
from rl_exit.stepping import LayeredModel, Left, Survivors, advance, enter, enter_instances, enter_singly

if TYPE_CHECKING:
    from rl_exit.data.instances import Instances

SINGLES = 16
"""Texts that are embedded together where they run one at a time."""


@dataclass(frozen=True)
class EngineOutput:
    """Answers of N rows, in their order.

    Attributes:
        logits: [N, C], of the exit at which each row left, or the criterion's own answer there.
        exit_layer: [N] int64 on the CPU, 1..L.
    """

    logits: Tensor
    exit_layer: Tensor


@torch.inference_mode()
def run_batch(model: LayeredModel, batch: Mapping[str, Tensor], criterion: Criterion) -> EngineOutput:
    """Run a batch until every row has left.

    The model must be in evaluation mode (dropout would make the answers random).

    Args:
        model: The model.
        batch: ``input_ids`` [B, T] with ``attention_mask`` and ``token_type_ids`` where there are any; B >= 1, padded
            on the right.
        criterion: Who leaves.

    Returns:
        Logits [B, C] on the model's device and exit layers [B].

    Raises:
        ValueError: The model is in training mode, or the padding is not on the right.
    """
    if model.training:
        raise ValueError("run_batch needs a model in evaluation mode: call model.eval() first")
    inside: Survivors | None = enter(model, batch, criterion)
    exit_layer = torch.full((len(batch["input_ids"]),), model.num_layers)
    logits: Tensor | None = None
    while inside is not None:
        step = advance(model, inside, criterion)
        inside, left = step.inside, step.left
        if left is None:
            continue
        if logits is None:
            if inside is None:
                exit_layer[:] = left.layer
                return EngineOutput(left.logits.contiguous(), exit_layer)
            logits = left.logits.new_zeros((len(exit_layer), left.logits.shape[1]))
        logits[torch.from_numpy(left.rows).to(logits.device)] = left.logits
        exit_layer[torch.from_numpy(left.rows)] = left.layer
    assert logits is not None  # at layer L all rows leave
    return EngineOutput(logits, exit_layer)


def run_instances(
    model: LayeredModel,
    instances: Instances,
    criterion: Criterion,
    batch_size: int = 32,
    progress: Progress | None = None,
    pooled: bool = True,
) -> EngineOutput:
    """Run tokenised instances in batches of similar length, survivors of several batches together.

    The model is put into evaluation mode for the time and back afterwards.

    Args:
        model: The model.
        instances: N >= 1 instances.
        criterion: Who leaves.
        batch_size: Rows at a time; changes speed, not results.
        progress: Told the number of rows done.
        pooled: Whether survivors of different batches are put together (:mod:`rl_exit.pooling`); False: each batch runs
            to its end alone, as a stream of single requests would. Changes speed, not results.

    Returns:
        Logits [N, C] and exit layers [N], on the CPU, in the order of the instances.

    Raises:
        ConfigError: batch_size below 1.
        ValueError: No instances.
    """
    check_batch_size(batch_size)
    if len(instances) == 0:
        raise ValueError("run_instances needs at least one instance")
    answers = Answers(len(instances))
    with evaluating(model), torch.inference_mode():
        for left in stream_answers(model, instances, criterion, batch_size, pooled):
            if left is None:
                continue
            answers.put(left)
            if progress is not None:
                progress.update(answers.done)
    return answers.output()


class Answers:
    """Collects rows as they leave.

    Attributes:
        done: How many have left so far.
    """

    def __init__(self, count: int) -> None:
        """Of ``count`` rows, N."""
        # Filled by numpy: a few rows come at a time, for which torch takes several times as long.
        self._logits: npt.NDArray[np.float32] | None = None
        self._exit_layer = np.empty(count, dtype=np.int64)
        self.done = 0

    def put(self, left: Left) -> None:
        """Rows that left at one layer; their numbers are 0..N-1, each comes once."""
        if self._logits is None:
            self._logits = np.empty((len(self._exit_layer), left.logits.shape[1]), dtype=np.float32)
        given = left.logits
        near = given.is_cpu and given.dtype == torch.float32
        self._logits[left.rows] = (given if near else given.to("cpu", torch.float32)).numpy()
        self._exit_layer[left.rows] = left.layer
        self.done += len(left.rows)

    def output(self) -> EngineOutput:
        """Logits [N, C] and exit layers [N], on the CPU, once all have left."""
        assert self._logits is not None and self.done == len(self._exit_layer)
        return EngineOutput(torch.from_numpy(self._logits), torch.from_numpy(self._exit_layer))


def stream_answers(
    model: LayeredModel, instances: Instances, criterion: Criterion, batch_size: int, pooled: bool = True
) -> Iterator[Left | None]:
    """Rows as they leave, numbered by their place among the instances: what :func:`run_instances` collects.

    Yielded after each layer of a group (:func:`rl_exit.pooling.run_pooled`); None where nobody left.

    Args:
        model: In evaluation mode, under ``torch.inference_mode()`` for as long as the iterator is used.
        instances: N >= 1 instances.
        criterion: Who leaves.
        batch_size: Rows at a time.
        pooled: Whether survivors of different batches are put together.
    """
    from rl_exit.data.batching import length_sorted_batches

    def entering() -> Iterator[Callable[[], Survivors]]:
        if batch_size > 1:
            for rows in length_sorted_batches(instances.lengths, batch_size):
                yield partial(enter_instances, model, instances, criterion, rows)
            return
        for rows in length_sorted_batches(instances.lengths, SINGLES):
            singles = enter_singly(model, instances, criterion, rows)
            yield from (partial(next, singles) for _ in rows)

    arrivals = entering()
    if pooled:
        yield from run_pooled(model, arrivals, criterion, batch_size)
        return
    for arrival in arrivals:
        yield from run_pooled(model, iter([arrival]), criterion, batch_size)


def run_texts(
    model: Any,
    texts: Iterable[str],
    text_pairs: Iterable[str] | None,
    criterion: Criterion,
    batch_size: int,
    progress: bool,
) -> EngineOutput:
    """Tokenise and run texts; see :meth:`rl_exit.models.early_exit.EarlyExitModel.predict`.

    Raises:
        UserError: Something other than texts was given.
    """
    from rl_exit.data.tasks import TextSplit, tokenise

    check_batch_size(batch_size)
    first = checked_texts(texts, "texts")
    second = None if text_pairs is None else checked_texts(text_pairs, "text_pairs")
    if second is not None and len(second) != len(first):
        raise DataError(f"{len(first)} texts and {len(second)} text_pairs; accepted: one second text for each text")
    if not first:
        return EngineOutput(torch.empty((0, model.config.num_labels)), torch.empty(0, dtype=torch.int64))
    split = TextSplit(np.arange(len(first)), first, second, _no_labels(len(first)))
    instances = tokenise(split, model.tokenizer, model.config.max_tokens)
    display = Terminal() if progress else Silent()
    with display.step("predict", len(first)) as bar:
        return run_instances(model, instances, criterion, batch_size, bar)


def choose_criterion(criterion: Criterion | None, threshold: float | None, default: float) -> Criterion:
    """The criterion given, or the policy at a threshold.

    Raises:
        ConfigError: Both were given, or the threshold is no number within 0..1.
    """
    if criterion is not None:
        if threshold is not None:
            raise ConfigError("threshold belongs to the policy: give either threshold or criterion, not both")
        if not hasattr(criterion, "leave"):
            raise ConfigError(
                f"criterion {criterion!r}; accepted: e.g. rl_exit.criteria.criterion('entropy', threshold=0.1)"
            )
        return criterion
    value = default if threshold is None else threshold
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not math.isfinite(value):
        raise ConfigError(f"threshold = {value!r}; accepted: a number from 0 to 1")
    return ConsistentEE(float(value))


def check_batch_size(batch_size: int) -> None:
    """Refuse what is no count.

    Raises:
        ConfigError: Not an integer of at least 1.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size!r}; accepted: a whole number from 1")


def checked_texts(texts: Iterable[str], name: str) -> list[str]:
    """The texts as a list.

    Args:
        texts: Any iterable of strings but a string itself.
        name: For messages.

    Raises:
        DataError: Something else; the first bad entry is named.
    """
    if isinstance(texts, str):
        raise DataError(f"{name}: a list of texts is expected, got one string; write [text]")
    if texts is None or isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise DataError(f"{name}: a list of texts is expected, got {type(texts).__name__}")
    found = list(texts)
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise DataError(f"{name}[{number}]: a string is expected, got {type(text).__name__} ({text!r:.40})")
        if not text.isascii() and not _is_unicode(text):
            raise DataError(
                f"{name}[{number}]: not valid Unicode (a lone surrogate); decode the bytes with errors='replace'"
            )
    return found


@contextmanager
def evaluating(model: LayeredModel) -> Iterator[None]:
    """Evaluation mode for a while."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_labels(count: int) -> npt.NDArray[np.int64]:
    return np.zeros(count, dtype=np.int64)
