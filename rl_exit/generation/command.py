"""What ``rl-exit generate`` does: a model by name, prompts, texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_exit.criteria import Criterion
from rl_exit.errors import ModelError
from rl_exit.generation.api import Generation, collect
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.prediction import chosen_criterion, model_folder


class Writer:
    """A saved decoder with the settings of a command.

    Args:
        model: Model folder, run directory or hub id.
        threshold: Leave where pi is above it; None: the model's own.
        word: Exit criterion in place of the policy; learned ones are read from ``criteria/`` in the model's folder.
        params: Its parameters, ``key=value``.
        options: Settings of the generation by name; None leaves one to the model.

    Raises:
        ModelError: The model cannot be loaded, generates no text, or its weights are not finite.
        UserError: The criterion cannot be made.
    """

    def __init__(
        self,
        model: str,
        threshold: float | None,
        word: str | None,
        params: Sequence[str],
        options: Mapping[str, Any],
    ) -> None:
        folder = model_folder(model)
        self.criterion: Criterion | None = chosen_criterion(word, params, Path(folder))
        loaded = EarlyExitModel.from_pretrained(folder)
        if not isinstance(loaded, EarlyExitCausalModel):
            raise ModelError(f"{folder}: a classifier, it generates no text; 'rl-exit predict {folder}' labels texts")
        if not math.isfinite(float(loaded.head_weight.detach().sum())):
            raise ModelError(f"model '{model}': its weights are not finite numbers, it is damaged")
        self.model = loaded
        self.threshold = threshold
        self.options = {key: value for key, value in options.items() if value is not None}

    def write(self, prompts: Sequence[str], batch_size: int) -> list[Generation]:
        """Continue prompts in batches.

        Raises:
            UserError: A setting that is not accepted.
        """
        return self.model.generate(
            list(prompts),
            criterion=self.criterion,
            threshold=self.threshold,
            batch_size=batch_size,
            **self.options,
        )

    def stream(self, prompt: str) -> Iterator[str | Generation]:
        """Pieces of one text as they come, then the whole.

        Raises:
            UserError: A setting that is not accepted.
        """
        found = []
        for events in self.model.stream([prompt], criterion=self.criterion, threshold=self.threshold, **self.options):
            for event in events:
                found.append(event)
                if event.piece:
                    yield event.piece
        yield collect(prompt, found)
