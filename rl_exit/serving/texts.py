"""Texts as a model reads them, and its answers in plain values: the part of a service that needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_exit.data.instances import Instances
from rl_exit.data.tasks import TextSplit, tokenise
from rl_exit.errors import ModelError


@dataclass(frozen=True)
class Left:
    """How a text left the model.

    Attributes:
        logits: float32 [C], of the exit where it left.
        exit_layer: 1..L.
        seconds: From its arrival.
    """

    logits: npt.NDArray[np.float32]
    exit_layer: int
    seconds: float


@dataclass(frozen=True)
class TextSide:
    """What goes into a model and what comes out, without the model.

    Attributes:
        tokenizer: Of the model.
        max_length: Tokens of a text, or of a pair; more are cut off.
        names: Label by class number, 0..C-1.
    """

    tokenizer: Any
    max_length: int
    names: Mapping[int, str]

    @classmethod
    def of(cls, model: Any) -> TextSide:
        """That of an :class:`rl_exit.EarlyExitModel` with its tokenizer."""
        return cls(model.tokenizer, model.max_length, dict(model.config.id2label))

    def tokenised(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Instances:
        """Texts as the model reads them."""
        count = len(texts)
        split = TextSplit(
            np.arange(count), list(texts), None if pairs is None else list(pairs), np.zeros(count, np.int64)
        )
        return tokenise(split, self.tokenizer, self.max_length)

    def told(self, left: Sequence[Left]) -> list[dict[str, Any]]:
        """Answers in plain values.

        Raises:
            ModelError: Not finite.
        """
        if not left:
            return []
        logits = np.stack([one.logits for one in left]).astype(np.float64)
        if not np.isfinite(logits).all():
            raise ModelError("the model's answers are not finite numbers, so its weights are damaged")
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        return [
            {
                "label": self.names[number],
                "label_id": number,
                "probabilities": row,
                "exit_layer": one.exit_layer,
                "milliseconds": 1000 * one.seconds,
            }
            for one, number, row in zip(left, logits.argmax(axis=1).tolist(), probabilities.tolist(), strict=True)
        ]
