"""One interface for every exit criterion, whether it drives the live engine or reads stored arrays.

A criterion is asked after each layer 1..L-1 which of the rows at hand leave (at L all do). It sees the rows through a
:class:`LayerView`, whose parts are computed only when read, and keeps what it must remember in a *carry*: tensors with
one row per instance still inside. The caller compacts the carry together with the hidden states when rows leave, so a
criterion never handles indices. Examples of what fits:

* a threshold on one layer (ConsistentEE, entropy, ...): no carry;
* patience (PABEE, PCEE-BERT, BEEM): ``carry["count"]`` and ``carry["last"]``, from :meth:`Criterion.start` or set at
  the first layer;
* CALM state saturation, PALBERT: ``carry["state"] = view.state`` for the next layer to compare with.

All published criteria are a score with a threshold (:class:`Scored`): the score of a layer does not depend on the
threshold, so one pass over a split gives the exits of every threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rl_exit.errors import ConfigError

Carry = dict[str, Tensor]


class Parted(NamedTuple):
    """Numbers of the rows of a batch that leave, one at least, and of those that stay; int64, each rising."""

    leaving: npt.NDArray[np.int64]
    staying: npt.NDArray[np.int64]


def parted(leave: Tensor) -> Parted | None:
    """Who leaves and who stays, from bool [B] on any device, asked once; None: nobody leaves."""
    # numpy for the few flags: a third of torch's time, which counts beside a small model's layer.
    flags = leave.cpu().numpy()
    found = flags.nonzero()[0]
    return Parted(found, (~flags).nonzero()[0]) if len(found) else None


class LayerView:
    """What a criterion may look at after one layer, for the B rows still inside.

    Each part is computed at its first use and kept, so a criterion pays only for what it reads, and what it reads is
    not computed again when rows leave.

    Attributes:
        layer: The layer just run, 1..L.
        num_layers: L.
        batch_size: B.
        device: Where the answer is wanted.
        progress: Share of each row's generation that is done, [B] within 0..1 (CALM's t / N); None where nothing is
            generated.
    """

    def __init__(
        self,
        layer: int,
        num_layers: int,
        batch_size: int,
        device: torch.device,
        state: Callable[[], Tensor],
        logits: Callable[[], Tensor],
        exit_logit: Callable[[Carry], Tensor],
        answer: Callable[[], Tensor] | None = None,
        progress: Tensor | None = None,
    ) -> None:
        """Set the parts.

        Args:
            layer: 1..L.
            num_layers: L.
            batch_size: B.
            device: Device of the state.
            state: Gives the pooled state [B, H].
            logits: Gives the exit's logits [B, C].
            exit_logit: Gives the policy's log-odds of Exit [B] and keeps in the carry what it must remember; not called
                at layer L.
            answer: Gives what the policy answers [B, C]; None: what the exit says.
            progress: t / N of each row's generation, [B].
        """
        self.layer = layer
        self.num_layers = num_layers
        self.batch_size = batch_size
        self.device = device
        self.progress = progress
        self._state = state
        self._logits = logits
        self._exit_logit = exit_logit
        self._answer = answer

    @cached_property
    def state(self) -> Tensor:
        """Pooled state of the layer, [B, H]."""
        return self._state()

    @cached_property
    def logits(self) -> Tensor:
        """Logits of the layer's exit, [B, C]."""
        return self._logits()

    @cached_property
    def answer(self) -> Tensor:
        """What the policy answers for rows that leave here, logits [B, C]."""
        return self.logits if self._answer is None else self._answer()

    def leaving(self, above: float, carry: Carry) -> Parted | None:
        """Whose log-odds of Exit exceed a value; None: nobody's. In place of :meth:`exit_logit`."""
        return parted(self.exit_logit(carry).float() > above)

    def exit_logit(self, carry: Carry) -> Tensor:
        """The policy's log-odds of Exit, [B]; ``pi = sigmoid``.

        Args:
            carry: Of the criterion that asks; the policy keeps there what it knows of the layers below, so it must be
                asked at every layer from 1 on.
        """
        if self.layer >= self.num_layers:
            raise ValueError(f"layer {self.layer} of {self.num_layers}: exit is forced, the policy has no say")
        return self._exit_logit(carry)

    def everyone(self, answer: bool) -> Tensor:
        """The same answer for all rows, bool [B]; computes nothing."""
        return torch.full((self.batch_size,), answer, device=self.device)


class Criterion(Protocol):
    """When to leave. Instances are stateless: all memory of a batch is in its carry.

    Two methods are asked where a criterion has them: ``answer(layer, view, carry)``, what is answered for rows that
    leave, logits [B, C], in place of the exit's; and ``leaving(layer, view, carry)``, a :class:`Parted` or None, in
    place of ``leave`` by an engine that wants row numbers on the CPU.
    """

    @property
    def name(self) -> str:
        """The registered word."""

    def start(self, batch_size: int, device: torch.device) -> Carry:
        """The carry before layer 1: a dict of tensors whose first dimension is the batch (empty if nothing is kept)."""

    def leave(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """Decide for the rows still inside.

        Args:
            layer: 1..L-1.
            view: What they show after this layer.
            carry: Their memory; entries may be set or replaced in place of the old.

        Returns:
            bool [B], True where the row leaves here.
        """


class Scored:
    """Base of criteria of the form "leave at the first layer whose score passes the threshold".

    A subclass is a frozen dataclass with ``name``, ``score`` and a field named by ``swept``.

    Attributes:
        comparison: ``">"``, ``">="`` or ``"<"``: how the score must stand to the threshold for a row to leave. Compared
            in float32.
        swept: Name of the field that is the threshold.
        whole: Whether the threshold is a whole number.
        bounds: Least and greatest threshold accepted.
    """

    name: ClassVar[str]
    comparison: ClassVar[str] = ">"
    swept: ClassVar[str] = "threshold"
    whole: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def start(self, batch_size: int, device: torch.device) -> Carry:
        """An empty carry."""
        return {}

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """Score of the rows still inside; asked at layers 1, 2, ... in turn, and free of the threshold.

        Args:
            layer: 1..L-1.
            view: What they show after this layer.
            carry: Their memory; entries may be set or replaced in place of the old.

        Returns:
            float32 [B]; the infinite value on the far side of every threshold where a row cannot leave yet.
        """
        raise NotImplementedError

    def leave(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`Criterion.leave`."""
        score, threshold = self.score(layer, view, carry), getattr(self, self.swept)
        if self.comparison == "<":
            return score < threshold
        return score >= threshold if self.comparison == ">=" else score > threshold

    @classmethod
    def threshold_above(cls, value: float) -> float:
        """The threshold at which rows leave wherever their score, turned so that larger is earlier, exceeds a value.

        Args:
            value: On the scale of :func:`rl_exit.criteria.stored.scores_from_store`.

        Returns:
            Within the bounds that are accepted; a whole number where the threshold is one.
        """
        low, high = cls.bounds
        cut = np.float32(-value if cls.comparison == "<" else value)
        if cls.comparison == ">=":
            # Scores are float32 (or counts): above the value means at least the next one.
            cut = np.floor(cut) + 1 if cls.whole else np.nextafter(cut, np.float32(np.inf))
        bounded = min(max(float(cut), low), min(high, float(np.finfo(np.float32).max)))
        return round(bounded) if cls.whole else bounded


def checked_number(word: str, key: str, value: Any, bounds: tuple[float, float], unit: str = "") -> None:
    """Refuse a parameter that is no number within its bounds.

    Raises:
        ConfigError: Another type, not finite, or out of range.
    """
    low, high = bounds
    accepted = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(
            f"criterion '{word}': {key} = {value!r} has the wrong type ({type(value).__name__}); "
            f"accepted: a number, {accepted}{unit}"
        )
    if not (math.isfinite(value) and low <= float(value) <= high):
        raise ConfigError(f"criterion '{word}': {key} = {value!r}; accepted: {accepted}{unit}")


def checked_count(word: str, key: str, value: Any, what: str) -> None:
    """Refuse a parameter that is no whole number from 1; ``what`` says what is accepted.

    Raises:
        ConfigError: Something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ConfigError(f"criterion '{word}': {key} = {value!r}; accepted: {what}")


def compact(carry: Carry, rows: Tensor) -> Carry:
    """The carry of the given rows only."""
    return {key: value.index_select(0, rows) for key, value in carry.items()}
