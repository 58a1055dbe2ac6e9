"""The engine that really skips layers: rows that leave are taken out of the batch, padding shrinks with them.

After each layer the criterion says which rows leave; the survivors' hidden states are compacted and cut to the longest
survivor, so the next layer runs on what is left and on nothing else. Results equal those of all exits computed at full
depth, whatever rows share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rl_exit.criteria.base import Criterion, LayerView, compact
from rl_exit.criteria.policy import ConsistentEE
from rl_exit.errors import ConfigError, DataError
from rl_exit.progress import Progress, Silent, Terminal

if TYPE_CHECKING:
    from rl_exit.data.instances import Instances
    from rl_exit.models.backbones import SteppedBackbone, StepState


class LayeredModel(Protocol):
    """What the engine needs of a model (:class:`rl_exit.models.early_exit.EarlyExitModel`)."""

    backbone: SteppedBackbone
    num_layers: int
    training: bool

    @property
    def device(self) -> torch.device:
        """Where the batches go."""

    def view(self, layer: int, state: StepState) -> LayerView:
        """What a criterion sees after ``layer``."""

    def train(self, mode: bool = True) -> Any:
        """Set training mode."""


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
    device = model.device
    state = model.backbone.begin(**{key: value.to(device) for key, value in batch.items()})
    carry = criterion.start(state.batch_size, device)
    rows = torch.arange(state.batch_size)  # original row of each row still inside; on the CPU, as are state.lengths
    exit_layer = torch.full((state.batch_size,), model.num_layers)
    logits: Tensor | None = None
    answer = getattr(criterion, "answer", None)  # a criterion may answer otherwise than the exit does
    for layer in range(1, model.num_layers + 1):
        state = model.backbone.step(layer, state)
        view = model.view(layer, state)
        leave = view.everyone(True) if layer == model.num_layers else criterion.leave(layer, view, carry)
        leave = leave.cpu()  # the one question to the device per layer
        leaving = leave.nonzero().squeeze(1)
        if len(leaving) == 0:
            continue
        gone = rows[leaving]
        said = view.logits if answer is None else answer(layer, view, carry)
        if logits is None:
            logits = said.new_zeros((len(exit_layer), said.shape[1]))
        logits[gone.to(device)] = said[leaving.to(device)]
        exit_layer[gone] = layer
        if len(leaving) == len(rows):
            break
        staying = (~leave).nonzero().squeeze(1)
        rows = rows[staying]
        carry = compact(carry, staying.to(device))
        state = state.select(staying, length=max(int(state.lengths[staying].max()), 1))
    assert logits is not None  # at layer L all rows leave
    return EngineOutput(logits, exit_layer)


def run_instances(
    model: LayeredModel,
    instances: Instances,
    criterion: Criterion,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> EngineOutput:
    """Run tokenised instances in batches of similar length.

    The model is put into evaluation mode for the time and back afterwards.

    Args:
        model: The model.
        instances: N >= 1 instances.
        criterion: Who leaves.
        batch_size: Rows at a time; changes speed, not results.
        progress: Told the number of rows done.

    Returns:
        Logits [N, C] and exit layers [N], on the CPU, in the order of the instances.

    Raises:
        ConfigError: batch_size below 1.
        ValueError: No instances.
    """
    from rl_exit.data.batching import length_sorted_batches

    check_batch_size(batch_size)
    if len(instances) == 0:
        raise ValueError("run_instances needs at least one instance")
    logits: Tensor | None = None
    exit_layer = torch.empty(len(instances), dtype=torch.int64)
    done = 0
    with evaluating(model):
        for rows in length_sorted_batches(instances.lengths, batch_size):
            out = run_batch(model, instances.batch(rows), criterion)
            if logits is None:
                logits = torch.empty((len(instances), out.logits.shape[1]), dtype=torch.float32)
            where = torch.from_numpy(rows)
            logits[where] = out.logits.to("cpu", torch.float32)
            exit_layer[where] = out.exit_layer
            done += len(rows)
            if progress is not None:
                progress.update(done)
    assert logits is not None
    return EngineOutput(logits, exit_layer)


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
