"""Continuous batching of decoders: prompts join between two steps, texts that end leave, rows of different requests
share each step.

A step writes one token for every text inside. All rows begin it at layer 1 and each leaves at its own layer; the next
layer runs on those that are left (:meth:`rl_exit.generation.engine.Engine.step`). Rows do not run ahead of each other
in depth: a row that has left waits for the next step. docs/generation.md shows why (every other order needs more layer
calls for the same tokens).

The slow twin is :meth:`rl_exit.models.causal.EarlyExitCausalModel.generate` on each prompt alone; a test holds the two
together for any arrivals. No threads here: :mod:`.writer` puts this into one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl_exit.criteria.base import Criterion
from rl_exit.generation.engine import Engine
from rl_exit.generation.loop import CONTEXT, Event, Growing
from rl_exit.generation.mixed import mixed
from rl_exit.generation.sampling import Chooser, Settings
from rl_exit.generation.text import TextPieces

if TYPE_CHECKING:
    from rl_exit.models.causal import EarlyExitCausalModel

Told = Event | Exception
"""A token, or what went wrong with its text."""

PROMPT_TOKENS = 256
"""Tokens of prompts that run between two steps, so that a long prompt does not hold up those who write."""


@dataclass(frozen=True)
class Order:
    """A text that is wanted.

    Attributes:
        number: Of the prompt in its request; events carry it.
        prompt: Token ids, at least one.
        settings: How tokens are chosen and when the text ends; not lossless.
        rule: When tokens leave; None: at full depth. Rows under the same object are asked together.
        given: Tokens that another replica has written and the client has. They are taken as they are, whatever would
            be chosen here, so that a text goes on as it began; draws are made all the same, so that what follows is
            what would have followed there.
    """

    number: int
    prompt: Sequence[int]
    settings: Settings
    rule: Criterion | None
    given: Sequence[int] = ()


@dataclass(eq=False)
class Writing:
    """A text that is being written.

    Attributes:
        order: What is wanted.
        text: What is there.
        choose: How its tokens are chosen; None: the likeliest.
        row: Its row of the cache; None while it waits for one.
        read: Tokens of the prompt that have run.
        finished: Whether it has ended or was dropped.
    """

    order: Order
    text: Growing
    choose: Chooser | None
    row: int | None = None
    read: int = 0
    finished: bool = False


@dataclass
class WritingCounts:
    """What was done since the beginning; ``row_layers / layers`` is the mean number of rows that a layer ran on."""

    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    layers: int = 0
    row_layers: int = 0


class ContinuousBatch:
    """Texts of any requests, written together, a turn at a time.

    Args:
        model: The model with its tokenizer, in evaluation mode.
        rows: Texts that are written at a time; others wait, first come, first served.
        capacity: Positions of a row: its prompt and all that is written.
        prompt_tokens: See :data:`PROMPT_TOKENS`.

    Attributes:
        counts: What was done so far.
    """

    def __init__(
        self, model: EarlyExitCausalModel, rows: int, capacity: int, prompt_tokens: int = PROMPT_TOKENS
    ) -> None:
        self.counts = WritingCounts()
        self.capacity = capacity
        self._model = model
        self._engine = Engine(model, rows, capacity)
        self._prompt_tokens = prompt_tokens
        self._free = list(reversed(range(rows)))
        self._waiting: deque[Writing] = deque()
        self._inside: list[Writing] = []

    def __len__(self) -> int:
        """Texts that wait or are being written."""
        return len(self._waiting) + len(self._inside)

    @property
    def waiting(self) -> int:
        """Texts that wait for a row."""
        return len(self._waiting)

    @property
    def inside(self) -> int:
        """Texts that have a row."""
        return len(self._inside)

    def add(self, order: Order) -> Writing:
        """Let a text wait for a row.

        Raises:
            ValueError: It does not fit into a row, or is to be lossless.
        """
        settings = order.settings
        if len(order.prompt) + settings.max_new_tokens > self.capacity or not order.prompt:
            raise ValueError(f"a prompt of {len(order.prompt)} tokens and {settings.max_new_tokens} do not fit")
        if settings.lossless:
            raise ValueError("lossless texts are not written in a continuous batch")
        text = TextPieces(self._model.tokenizer, settings.stop_strings, order.prompt[-CONTEXT:])
        plain = not settings.do_sample and settings.repetition_penalty == 1.0
        choose = None if plain else Chooser(settings, self._model.device)
        made = Writing(order, Growing(order.number, settings.max_new_tokens, text), choose)
        self._waiting.append(made)
        return made

    def drop(self, writing: Writing) -> None:
        """Forget a text that nobody waits for any more; its row is free from now on."""
        if writing.finished:
            return
        writing.finished = True
        if writing.row is None:
            self._waiting.remove(writing)
            return
        self._inside.remove(writing)
        self._engine.cut(writing.row, 0)
        self._free.append(writing.row)

    @torch.inference_mode()
    def turn(self) -> list[tuple[Writing, Told]]:
        """Let texts in, run some of their prompts, and write one token of each text whose prompt has run.

        Returns:
            The new tokens, at most one for each text; those of ``given`` included. In place of a token what went wrong
            with that text alone; it is dropped, the others go on.
        """
        while self._free and self._waiting:
            writing = self._waiting.popleft()
            writing.row = self._free.pop()
            self._inside.append(writing)
        going = [one for one in self._inside if one.read == len(one.order.prompt)]
        found = self._read_prompts() + self._step(going)
        for writing, told in found:
            if isinstance(told, Exception) or told.finish is not None:
                self.drop(writing)
        self.counts.tokens += sum(isinstance(told, Event) for _, told in found)
        return found

    def _read_prompts(self) -> list[tuple[Writing, Told]]:
        left = self._prompt_tokens
        reading: list[Writing] = []
        pieces: list[list[int]] = []
        for one in self._inside:
            rest = one.order.prompt[one.read : one.read + left]
            if rest:
                reading.append(one)
                pieces.append(list(rest))
                left -= len(rest)
        if not reading:
            return []
        logits = self._engine.full([_row(one) for one in reading], pieces)
        for one, piece in zip(reading, pieces, strict=True):
            one.read += len(piece)
        self.counts.prompt_tokens += self._prompt_tokens - left
        there = [place for place, one in enumerate(reading) if one.read == len(one.order.prompt)]
        if not there:
            return []
        return self._take([reading[place] for place in there], logits[there], [self._model.num_layers] * len(there))

    def _step(self, going: Sequence[Writing]) -> list[tuple[Writing, Told]]:
        if not going:
            return []
        model = self._model
        done = [len(one.text.tokens) / one.order.settings.max_new_tokens for one in going]
        step = self._engine.step(
            [_row(one) for one in going],
            [one.text.tokens[-1] for one in going],
            mixed(model, [one.order.rule for one in going]),
            torch.tensor(done, device=model.device),
        )
        layers = [model.exit_layers[number - 1] for number in step.exits]
        self.counts.steps += 1
        self.counts.layers += max(layers)
        self.counts.row_layers += sum(layers)
        return self._take(going, step.logits, layers)

    def _take(self, going: Sequence[Writing], logits: Tensor, layers: Sequence[int]) -> list[tuple[Writing, Told]]:
        likeliest = logits.argmax(-1).tolist()
        found: list[tuple[Writing, Told]] = []
        for place, (one, layer) in enumerate(zip(going, layers, strict=True)):
            try:
                token = likeliest[place] if one.choose is None else _drawn(one, one.choose, logits[place : place + 1])
                given = one.order.given
                if len(one.text.tokens) < len(given):
                    token = given[len(one.text.tokens)]
                found.append((one, one.text.take(token, layer, one.order.settings.eos_token_ids)))
            except Exception as error:  # noqa: BLE001 - of this text alone: its neighbours go on
                found.append((one, error))
        return found


def _row(writing: Writing) -> int:
    assert writing.row is not None
    return writing.row


def _drawn(writing: Writing, choose: Chooser, logits: Tensor) -> int:
    read = [*writing.order.prompt, *writing.text.tokens] if choose.settings.repetition_penalty != 1.0 else []
    sequence = torch.tensor([read], dtype=torch.int64, device=logits.device)
    return int(choose(sequence, logits)[0])
