"""A whole split from stored arrays: exit layers and scores, the same as the live engine's, without the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from rl_exit.criteria.base import Carry, Criterion, LayerView, Scored

Stored = Tensor | npt.NDArray[np.generic]
States = Stored | Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]]


@dataclass(frozen=True)
class StoredSplit:
    """What a model said of N instances at every layer.

    Attributes:
        labels: [N] in 0..C-1.
        logits: [N, L, C] of the exits.
        losses: [N, L], cross-entropy of every exit, nats.
        correct: [N, L] bool, whether each exit is right.
        states: Pooled states: [N, L, H], or a function from rows [n] to [n, L, H] (``StateStore.states``), or None.
        exit_logits: [N, L-1], the policy's log-odds of Exit, or None.
    """

    labels: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    losses: npt.NDArray[np.float32]
    correct: npt.NDArray[np.bool_]
    states: States | None = None
    exit_logits: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        states = None if callable(self.states) else self.states
        _check(states, self.logits, self.exit_logits)
        count, layers = self.logits.shape[:2]
        for name, array, shape in (
            ("labels", self.labels, (count,)),
            ("losses", self.losses, (count, layers)),
            ("correct", self.correct, (count, layers)),
        ):
            if tuple(array.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got shape {tuple(array.shape)}")

    @classmethod
    def from_logits(
        cls,
        labels: npt.ArrayLike,
        logits: npt.ArrayLike,
        states: States | None = None,
        exit_logits: npt.ArrayLike | None = None,
    ) -> StoredSplit:
        """A split whose losses and right answers follow from the logits.

        Args:
            labels: [N] in 0..C-1.
            logits: [N, L, C].
            states: As the attribute.
            exit_logits: [N, L-1], or None.
        """
        truth, given = np.asarray(labels, dtype=np.int64), np.asarray(logits, dtype=np.float32)
        if given.ndim != 3 or truth.shape != given.shape[:1]:
            raise ValueError(f"logits must be [N, L, C] and labels [N], got {given.shape} and {truth.shape}")
        every = torch.from_numpy(np.array(given)).transpose(1, 2)
        target = torch.from_numpy(np.array(truth))[:, None].expand(-1, given.shape[1])
        return cls(
            labels=truth,
            logits=given,
            losses=F.cross_entropy(every, target, reduction="none").numpy(),
            correct=given.argmax(-1) == truth[:, None],
            states=states,
            exit_logits=None if exit_logits is None else np.asarray(exit_logits, dtype=np.float32),
        )

    @property
    def num_instances(self) -> int:
        """N."""
        return int(self.logits.shape[0])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.logits.shape[1])

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.logits.shape[2])

    def states_of(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """States of some rows, float32 [n, L, H].

        Raises:
            ValueError: The split has none.
        """
        if self.states is None:
            raise ValueError("this criterion reads states, which were not given")
        return _tensor(self.states(rows) if callable(self.states) else self.states[rows]).float()

    def select(self, rows: npt.NDArray[np.int64]) -> StoredSplit:
        """The given rows; states that are a function stay one."""
        states = self.states
        if callable(states):
            whole = states
            chosen: States | None = lambda some: whole(rows[some])  # noqa: E731
        else:
            chosen = None if states is None else states[rows]
        return replace(
            self,
            labels=self.labels[rows],
            logits=self.logits[rows],
            losses=self.losses[rows],
            correct=self.correct[rows],
            states=chosen,
            exit_logits=None if self.exit_logits is None else self.exit_logits[rows],
        )


@torch.inference_mode()
def exits_from_store(
    criterion: Criterion,
    states: States | None,
    logits: Stored,
    exit_logits: Stored | None,
    batch_size: int = 8192,
) -> Tensor:
    """Layer at which each stored instance leaves.

    Args:
        criterion: The criterion; it is asked at layers 1..L-1 as the engine asks it.
        states: [N, L, H], or a function from rows [n] to [n, L, H], or None where the criterion reads none.
        logits: [N, L, C].
        exit_logits: [N, L-1], or None where the criterion does not ask the policy.
        batch_size: Instances at a time; bounds the memory; heads may round differently in the last bit.

    Returns:
        [N] int64 in 1..L.

    Raises:
        ValueError: Shapes do not fit, or the criterion reads an array that is None.
    """
    _check(None if callable(states) else states, logits, exit_logits)
    num_layers = int(logits.shape[1])
    exit_layer = torch.full((int(logits.shape[0]),), num_layers, dtype=torch.int64)
    for part, views in _blocks(states, logits, exit_logits, batch_size):
        out = exit_layer[part]
        inside = torch.ones(len(out), dtype=torch.bool)
        carry = criterion.start(len(out), torch.device("cpu"))
        for view in views:
            # Rows that have left stay in the block and are ignored: a row's decision never depends on others.
            leaving = criterion.leave(view.layer, view, carry) & inside
            out[leaving] = view.layer
            inside &= ~leaving
    return exit_layer


@torch.inference_mode()
def scores_from_store(criterion: Criterion, split: StoredSplit, batch_size: int = 8192) -> npt.NDArray[np.float32]:
    """Scores of a criterion at layers 1..L-1, turned so that larger leaves earlier.

    The exits at every threshold follow from them: a row leaves at the first layer whose score passes it. They do not
    depend on the criterion's own threshold. :func:`leaving_above` gives the criterion that leaves above a value.

    Args:
        criterion: A scored criterion (:class:`rl_exit.criteria.base.Scored`).
        split: The stored arrays that it reads.
        batch_size: Instances at a time; bounds the memory; heads may round differently in the last bit.

    Returns:
        float32 [N, L-1]; ``-inf`` where a row cannot leave at any threshold.

    Raises:
        ValueError: The criterion has no scores, or reads an array that is None.
    """
    score, sign = _score_of(criterion)
    scores = np.empty((split.num_instances, split.num_layers - 1), dtype=np.float32)
    for part, views in _blocks(split.states, split.logits, split.exit_logits, batch_size):
        carry = criterion.start(len(range(*part.indices(split.num_instances))), torch.device("cpu"))
        for view in views:
            scores[part, view.layer - 1] = sign * score(view.layer, view, carry).float().numpy()
    return scores


def leaving_above(criterion: Criterion, value: float) -> Criterion:
    """The same criterion at the threshold where it leaves wherever its turned score exceeds ``value``.

    Args:
        criterion: A scored criterion; its own threshold does not matter.
        value: On the scale of :func:`scores_from_store`; ``-inf`` leaves as early as the criterion can.

    Returns:
        The criterion with its threshold replaced, within the bounds that it accepts.

    Raises:
        ValueError: The criterion has no scores.
    """
    if not isinstance(criterion, Scored):
        raise ValueError(_no_scores(criterion))
    return replace(criterion, **{criterion.swept: criterion.threshold_above(value)})  # type: ignore[type-var]


def _score_of(criterion: Criterion) -> tuple[Callable[[int, LayerView, Carry], Tensor], float]:
    score = getattr(criterion, "score", None)
    if score is not None:
        return score, -1.0 if getattr(criterion, "comparison", ">") == "<" else 1.0
    raise ValueError(_no_scores(criterion))


def _no_scores(criterion: Criterion) -> str:
    return f"criterion '{criterion.name}' has no scores; derive its class from rl_exit.criteria.Scored"


def _blocks(
    states: States | None, logits: Stored, exit_logits: Stored | None, batch_size: int
) -> Iterator[tuple[slice, Iterator[LayerView]]]:
    """Parts of the split, with the views of layers 1..L-1 of each."""
    for start in range(0, int(logits.shape[0]), batch_size):
        part = slice(start, min(start + batch_size, int(logits.shape[0])))
        yield part, _views(part, states, logits, exit_logits)


def _views(part: slice, states: States | None, logits: Stored, exit_logits: Stored | None) -> Iterator[LayerView]:
    rows, num_layers = np.arange(part.start, part.stop), int(logits.shape[1])
    # States behind a function are read once per block, and only if the criterion asks.
    read: list[Stored] = []

    def state(layer: int) -> Tensor:
        if callable(states):
            if not read:
                read.append(states(rows))
            return _tensor(read[0][:, layer - 1])
        return _column(states, part, layer, "states")

    for layer in range(1, num_layers):
        yield LayerView(
            layer,
            num_layers,
            len(rows),
            torch.device("cpu"),
            # Logits and log-odds do not come from the state here, so an absent state costs only who reads it.
            state=lambda layer=layer: state(layer),  # type: ignore[misc]
            logits=lambda layer=layer: _column(logits, part, layer, "logits"),  # type: ignore[misc]
            exit_logit=lambda _, layer=layer: _column(exit_logits, part, layer, "exit_logits"),  # type: ignore[misc]
        )


def _column(array: Stored | None, part: slice, layer: int, name: str) -> Tensor:
    if array is None:
        raise ValueError(f"this criterion reads {name}, which were not given")
    return _tensor(array[part, layer - 1])


def _tensor(piece: Any) -> Tensor:
    # Copied: torch warns about the read-only memory of a memory map.
    return piece if isinstance(piece, Tensor) else torch.from_numpy(np.array(piece))


def _check(states: Stored | None, logits: Stored, exit_logits: Stored | None) -> None:
    if logits.ndim != 3:
        raise ValueError(f"logits must be [N, L, C], got shape {tuple(logits.shape)}")
    count, num_layers = logits.shape[:2]
    if states is not None and (states.ndim != 3 or tuple(states.shape[:2]) != (count, num_layers)):
        raise ValueError(f"states must be [{count}, {num_layers}, H], got shape {tuple(states.shape)}")
    if exit_logits is not None and tuple(exit_logits.shape) != (count, num_layers - 1):
        raise ValueError(f"exit_logits must be [{count}, {num_layers - 1}], got shape {tuple(exit_logits.shape)}")
