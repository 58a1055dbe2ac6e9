"""Where an episode's states come from: the store of a frozen model, or a live model that is stepped.

A source walks one instance at a time from layer 1 to the exit: ``begin(row)``, ``step()``..., ``outcome()``. The store
source is the rule (K trajectories cost one pass of the model, not K). The live source runs each layer when it is asked
for, and so serves rewards that are no sum over layers, for instance measured time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rl_exit.envs.shards import FloatArray, IntArray, MappedShard
from rl_exit.envs.state_store import StateStore
from rl_exit.method.rewards import memorized_layer

if TYPE_CHECKING:  # torch is needed by the live source only
    from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """How an episode ended; what a reward is a function of.

    Attributes:
        instance: Row of the instance.
        id: Its stable id.
        label: Its class.
        exit_layer: 1..L.
        num_layers: L.
        loss: CE of the exit taken, nats.
        correct: Whether that exit predicts the label.
        memorized: Memorized layer of the instance (Eq. 7); None where it is not known.
        logits: [C] float32, logits of the exit taken.
        seconds: Time the layers up to the exit took; 0 when they were read from a store.
    """

    instance: int
    id: int
    label: int
    exit_layer: int
    num_layers: int
    loss: float
    correct: bool
    memorized: int | None
    logits: FloatArray
    seconds: float

    @property
    def forced(self) -> bool:
        """Whether the exit was at L, where there is no choice."""
        return self.exit_layer == self.num_layers


class Source(Protocol):
    """One instance at a time, layer by layer. Holds a position: every environment needs a source of its own.

    Attributes:
        num_layers: L.
        hidden_size: H.
        rows: [n] int64, the instances that can be begun.
        knows_memorized: Whether outcomes carry the memorized layer.
    """

    num_layers: int
    hidden_size: int
    rows: IntArray
    knows_memorized: bool

    def begin(self, row: int) -> FloatArray:
        """Start on an instance; the state of layer 1, [H], the caller's to keep."""
        ...

    def step(self) -> FloatArray:
        """Go one layer up; its state, [H], the caller's to keep."""
        ...

    def outcome(self) -> Outcome:
        """Leave at the layer reached."""
        ...

    def id_of(self, row: int) -> int:
        """Stable id of an instance."""
        ...


class StoreSource:
    """Reads states, losses and flags from a store (which several sources may share).

    Args:
        store: An open store; its mapped rows are the instances.
    """

    knows_memorized = True

    def __init__(self, store: StateStore) -> None:
        self.store = store
        self.num_layers = store.num_layers
        self.hidden_size = store.hidden_size
        self.rows = store.rows
        self._row = -1
        self._layer = 0
        self._shard: MappedShard | None = None
        self._local = -1

    def begin(self, row: int) -> FloatArray:
        """Start on an instance; the state of layer 1, [H].

        Raises:
            ValueError: The store has no such row, or it is not mapped.
        """
        self._shard, self._local = self.store.locate(row)
        self._row, self._layer = row, 1
        return self._shard.state(self._local, 1)

    def step(self) -> FloatArray:
        """Go one layer up; its state, [H]."""
        shard = self._current()
        if self._layer == self.num_layers:
            raise ValueError(f"there is no layer above {self.num_layers}")
        self._layer += 1
        return shard.state(self._local, self._layer)

    def outcome(self) -> Outcome:
        """Leave at the layer reached."""
        shard, local, layer = self._current(), self._local, self._layer
        return Outcome(
            instance=self._row,
            id=int(shard.ids[local]),
            label=int(shard.labels[local]),
            exit_layer=layer,
            num_layers=self.num_layers,
            loss=float(shard.losses[local, layer - 1]),
            correct=bool(shard.correct[local, layer - 1]),
            memorized=int(memorized_layer(shard.correct[local : local + 1])[0]),
            logits=shard.logits[local, layer - 1].copy(),
            seconds=0.0,
        )

    def id_of(self, row: int) -> int:
        """Stable id of an instance."""
        shard, local = self.store.locate(row)
        return int(shard.ids[local])

    def _current(self) -> MappedShard:
        if self._shard is None:
            raise ValueError("begin(row) comes first")
        return self._shard


class LayerwiseModel(Protocol):
    """A model that can be run one layer at a time on a batch; the carry between layers is its own affair."""

    num_layers: int
    hidden_size: int

    def begin(self, batch: Mapping[str, Tensor]) -> Any:
        """Embed a batch; the carry before layer 1."""
        ...

    def step(self, layer: int, carry: Any) -> Any:
        """Run one layer, 1..L; the carry after it."""
        ...

    def state(self, layer: int, carry: Any) -> Tensor:
        """Pooled state that exit ``layer`` reads, [B, H]."""
        ...

    def logits(self, layer: int, state: Tensor) -> Tensor:
        """Logits of exit ``layer``, [B, C]."""
        ...


class InstanceBatches(Protocol):
    """What the live source needs of :class:`rl_exit.data.instances.Instances`."""

    ids: IntArray
    labels: IntArray

    def batch(self, rows: Sequence[int]) -> Mapping[str, Tensor]:
        """The model's inputs for some rows."""
        ...


class LiveSource:
    """Steps a live model, one layer per Continue.

    Args:
        model: An early-exit model (see :class:`LayerwiseModel`; ``EarlyExitModel`` through its stepped backbone), in
            eval mode and unchanged while episodes run.
        instances: Tokenised instances.
        memorized: [N] in 1..L, for the hardness-guided reward; e.g. ``StateStore.memorized()``.

    Raises:
        ValueError: ``memorized`` has the wrong length or range; the model is in training mode, or is neither layerwise
            nor an ``EarlyExitModel``.
    """

    def __init__(self, model: Any, instances: InstanceBatches, memorized: IntArray | None = None) -> None:
        self.model = _layerwise(model)
        self.instances = instances
        self.num_layers = self.model.num_layers
        self.hidden_size = self.model.hidden_size
        self.rows = np.arange(len(instances.ids), dtype=np.int64)
        self.memorized = None if memorized is None else np.asarray(memorized, dtype=np.int64)
        self.knows_memorized = memorized is not None
        if self.memorized is not None and (
            self.memorized.shape != self.rows.shape
            or (len(self.rows) and (self.memorized.min() < 1 or self.memorized.max() > self.num_layers))
        ):
            raise ValueError(f"memorized must be [{len(self.rows)}] within 1..{self.num_layers}")
        self._row = -1
        self._layer = 0
        self._carry: Any = None
        self._state: Any = None
        self._seconds = 0.0

    def begin(self, row: int) -> FloatArray:
        """Embed an instance and run layer 1; its state, [H].

        Raises:
            ValueError: There is no such row.
        """
        if not 0 <= row < len(self.rows):
            raise ValueError(f"row {row}; accepted: 0..{len(self.rows) - 1}")
        batch = self.instances.batch([row])
        self._row, self._layer, self._seconds = row, 0, 0.0
        start = time.perf_counter()
        with _inference():
            self._carry = self.model.begin(batch)
        self._seconds = time.perf_counter() - start
        return self._advance()

    def step(self) -> FloatArray:
        """Run the next layer; its state, [H]."""
        if self._row < 0:
            raise ValueError("begin(row) comes first")
        if self._layer == self.num_layers:
            raise ValueError(f"there is no layer above {self.num_layers}")
        return self._advance()

    def outcome(self) -> Outcome:
        """Run the exit classifier of the layer reached, and leave."""
        from torch.nn import functional as F

        if self._row < 0:
            raise ValueError("begin(row) comes first")
        start = time.perf_counter()
        with _inference():
            logits = self.model.logits(self._layer, self._state).float().cpu()[0]
        self._seconds += time.perf_counter() - start
        label = int(self.instances.labels[self._row])
        return Outcome(
            instance=self._row,
            id=self.id_of(self._row),
            label=label,
            exit_layer=self._layer,
            num_layers=self.num_layers,
            loss=float(-F.log_softmax(logits, dim=-1)[label]),
            correct=int(logits.argmax()) == label,
            memorized=None if self.memorized is None else int(self.memorized[self._row]),
            logits=logits.numpy(),
            seconds=self._seconds,
        )

    def id_of(self, row: int) -> int:
        """Stable id of an instance."""
        return int(self.instances.ids[row])

    def _advance(self) -> FloatArray:
        start = time.perf_counter()
        self._layer += 1
        with _inference():
            self._carry = self.model.step(self._layer, self._carry)
            self._state = self.model.state(self._layer, self._carry)
            state = self._state.float().cpu()[0].numpy().copy()
        self._seconds += time.perf_counter() - start
        return state


def as_source(source: Source | StateStore | str | os.PathLike[str]) -> Source:
    """A source from a source, an open store, or the path of a store.

    Raises:
        RunError: The path is no store.
    """
    if isinstance(source, (str, os.PathLike)):
        source = StateStore.open(source)
    return StoreSource(source) if isinstance(source, StateStore) else source


def _inference() -> Any:
    import torch

    return torch.inference_mode()


class _SteppedModel:
    """``EarlyExitModel`` as a :class:`LayerwiseModel`."""

    def __init__(self, model: Any) -> None:
        self.num_layers = int(model.num_layers)
        self.hidden_size = int(model.backbone.hidden_size)
        self._model = model

    def begin(self, batch: Mapping[str, Tensor]) -> Any:
        device = self._model.device
        return self._model.backbone.begin(**{name: values.to(device) for name, values in batch.items()})

    def step(self, layer: int, carry: Any) -> Any:
        return self._model.backbone.step(layer, carry)

    def state(self, layer: int, carry: Any) -> Tensor:
        return self._model.view(layer, carry).state

    def logits(self, layer: int, state: Tensor) -> Tensor:
        return self._model.exits.at(layer, state)


def _layerwise(model: Any) -> LayerwiseModel:
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode, where dropout makes its states random: call eval() first")
    if hasattr(model, "backbone") and hasattr(model, "exits"):
        return _SteppedModel(model)
    missing = [name for name in ("begin", "step", "state", "logits") if not callable(getattr(model, name, None))]
    if missing:
        raise ValueError(f"{type(model).__name__} cannot be run layer by layer: it has no {', '.join(missing)}")
    return model
