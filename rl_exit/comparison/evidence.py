"""What is compared: predictions of every exit and, for each criterion, the score by which it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

CONSISTENTEE = "consistentee"
FINAL, INITIAL = "final", "initial"


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled instances and what every exit answers.

    Attributes:
        ids: [N], equal for the same instances in other runs: they are resampled together.
        labels: [N] in 0..C-1.
        predictions: [N, L], class that each exit predicts.
        num_classes: C.
        costs: [L] rising, what leaving at each layer costs, in layers: L at the last; None: the layer's number.
    """

    ids: IntArray
    labels: IntArray
    predictions: IntArray
    num_classes: int
    costs: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        count = len(self.labels)
        if self.ids.shape != (count,) or self.predictions.ndim != 2 or self.predictions.shape[0] != count or not count:
            raise ValueError(
                f"ids {self.ids.shape}, labels {self.labels.shape}, predictions {self.predictions.shape}; "
                "accepted: [N], [N], [N, L] with N > 0"
            )

    @property
    def num_instances(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.predictions.shape[1])

    @property
    def depths(self) -> npt.NDArray[np.float64]:
        """What leaving at each layer costs, in layers, [L]."""
        return np.arange(1.0, self.num_layers + 1.0) if self.costs is None else self.costs


@dataclass(frozen=True, eq=False)
class Scores:
    """The score of one criterion at layers 1..L-1, larger leaving earlier; an instance leaves where it exceeds a cut.

    Attributes:
        measured: [N, L-1] on the split that is measured.
        dev: [N', L-1] on dev, for the threshold chosen there; None where dev is what is measured.
        threshold: From a cut to the criterion's own threshold; None where they are the same.
        answers: [N, L], class that the criterion answers on leaving, where that is not what the exit says.
        dev_answers: [N', L], the same on dev.
    """

    measured: FloatArray
    dev: FloatArray | None = None
    threshold: Callable[[float], float] | None = None
    answers: IntArray | None = None
    dev_answers: IntArray | None = None


@dataclass(frozen=True, eq=False)
class ExitSet:
    """Trained exits and the criteria on them.

    Attributes:
        name: ``final`` (of the finished model) or ``initial`` (after initialisation, before the rounds).
        split: What is measured.
        dev: The same exits on dev; None where dev is what is measured.
        scores: Criterion -> its scores.
    """

    name: str
    split: Split
    dev: Split | None
    scores: Mapping[str, Scores]


@dataclass(frozen=True, eq=False)
class SeedRun:
    """One run.

    Attributes:
        seed: Its seed.
        run: Where it is.
        sets: Exit sets by name; the initial one gives full depth. Where a run has one set for both, it stands once,
            as ``final``.
        policy_rule: What ConsistentEE's pi is in it: ``learned``, or ``confidence`` (``policy.safe``).
    """

    seed: int
    run: str
    sets: Mapping[str, ExitSet]
    policy_rule: str = "learned"

    @property
    def reference(self) -> ExitSet:
        """The exits whose full depth is the reference: those after initialisation."""
        return self.sets.get(INITIAL, self.sets[FINAL])


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ by seed alone: one recipe.

    Attributes:
        name: Its name, unique in a comparison.
        runs: By seed, ascending.
        settings: Settings in which it differs from the other groups.
    """

    name: str
    runs: Sequence[SeedRun]
    settings: Mapping[str, Any] = field(default_factory=dict)
