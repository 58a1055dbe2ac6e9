"""From prompts to tokens: the loop around the engine, plain and lossless, one event per token.

The prompt runs at full depth and its last position gives the first token, so that token's exit layer is L. Every later
token comes from the pass of the one before it, which leaves where the criterion says; that layer is the token's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rl_exit.criteria.base import Criterion
from rl_exit.generation.engine import Engine
from rl_exit.generation.sampling import Chooser, Settings
from rl_exit.generation.text import TextPieces

if TYPE_CHECKING:
    from rl_exit.models.causal import EarlyExitCausalModel

# Tokens of the prompt that are decoded with the first new ones; a character of Unicode takes four bytes at most.
CONTEXT = 4

Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Event:
    """One token.

    Attributes:
        row: Number of the prompt.
        token: Its id.
        exit_layer: Layer 1..L at which the pass that gave it left; L for a first token, and in lossless mode for what
            the verification put in place of a draft.
        piece: Text that can be shown now; empty while characters or stop strings are unsettled.
        finish: Why the text ends with this token: an end token, a stop string, its length; None: it goes on.
    """

    row: int
    token: int
    exit_layer: int
    piece: str
    finish: Finish | None


@dataclass
class Growing:
    """A text that grows, token by token.

    Attributes:
        number: Of the prompt; events carry it.
        limit: Tokens at most.
        text: Its pieces; None where nobody wants text.
        tokens: So far.
    """

    number: int
    limit: int
    text: TextPieces | None
    tokens: list[int] = field(default_factory=list)

    def take(self, token: int, exit_layer: int, ends: Sequence[int]) -> Event:
        """Take one more token; `ends` are those that end a text."""
        self.tokens.append(token)
        finish: Finish | None = None
        piece = ""
        if token in ends:
            finish = "eos"
        elif self.text is not None:
            piece = self.text.add(token)
            finish = "stop" if self.text.stopped else None
        if finish is None and len(self.tokens) == self.limit:
            finish = "length"
        if finish is not None and self.text is not None:
            piece += self.text.end()
        return Event(self.number, token, exit_layer, piece, finish)


@torch.inference_mode()
def events(
    model: EarlyExitCausalModel,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    limits: Sequence[int],
    criterion: Criterion | None,
    padded: Tensor,
    with_text: bool,
) -> Iterator[list[Event]]:
    """Generate for all prompts together; yields the events of each step.

    Args:
        model: The model, in evaluation mode, with a tokenizer if text is wanted.
        prompts: Token ids of each prompt, at least one each.
        settings: How to choose tokens and when to end.
        limits: New tokens of each prompt at most, ``max_new_tokens`` or less.
        criterion: Who leaves; None: nobody below layer L.
        padded: The prompts as one tensor [B, T], for processors that read them.
        with_text: Whether events carry pieces of text (always so where stop strings must be found).
    """
    room = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    engine = Engine(model, len(prompts), room)
    stops = settings.stop_strings
    rows = [
        Growing(
            number,
            limits[number],
            TextPieces(model.tokenizer, stops, prompt[-CONTEXT:]) if with_text or stops else None,
        )
        for number, prompt in enumerate(prompts)
    ]
    first = engine.full(range(len(prompts)), prompts)
    loop = _lossless if settings.lossless else _plain
    yield from loop(model, engine, rows, settings, criterion, first, padded)


def _plain(
    model: EarlyExitCausalModel,
    engine: Engine,
    rows: list[Growing],
    settings: Settings,
    criterion: Criterion | None,
    logits: Tensor,
    padded: Tensor,
) -> Iterator[list[Event]]:
    choose = Chooser(settings, logits.device)
    count, width = padded.shape
    most = max(row.limit for row in rows)
    sequences = padded.new_full((count, width + most), settings.pad_token_id)
    sequences[:, :width] = padded
    layers = [model.num_layers] * count
    active = list(range(count))
    for number in range(most):
        if number:
            done = torch.tensor([number / rows[row].limit for row in active], device=logits.device)
            step = engine.step(active, [rows[row].tokens[-1] for row in active], criterion, done)
            if len(active) == count:
                logits = step.logits
            else:
                logits = logits.clone()
                logits[active] = step.logits.to(logits.dtype)
            for row, exit_number in zip(active, step.exits, strict=True):
                layers[row] = model.exit_layers[exit_number - 1]
        # All rows draw, also those that have ended: what a row draws does not depend on when others end.
        tokens = choose(sequences[:, : width + number], logits)
        sequences[active, width + number] = tokens[active]
        chosen = tokens.tolist()
        found = [rows[row].take(chosen[row], layers[row], settings.eos_token_ids) for row in active]
        yield found
        active = [event.row for event in found if event.finish is None]
        if not active:
            return


def _lossless(
    model: EarlyExitCausalModel,
    engine: Engine,
    rows: list[Growing],
    settings: Settings,
    criterion: Criterion | None,
    logits: Tensor,
    padded: Tensor,
) -> Iterator[list[Event]]:
    """Draft some tokens with exits, run them at full depth in one pass, keep what that pass would have said."""
    ends = settings.eos_token_ids
    found = [
        row.take(token, model.num_layers, ends) for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True)
    ]
    yield found
    active = [event.row for event in found if event.finish is None]
    while active:
        lengths = {row: engine.lengths[row] for row in active}
        drafts = _draft(model, engine, rows, settings, criterion, active)
        for row in active:
            engine.cut(row, lengths[row])
        runs = [[rows[row].tokens[-1], *(token for token, _ in drafts[row])] for row in active]
        truth = engine.full(active, runs, every=True).argmax(-1).tolist()
        found, at = [], 0
        for row, run in zip(active, runs, strict=True):
            said = truth[at : at + len(run)]
            at += len(run)
            right = 0
            while right < len(drafts[row]) and drafts[row][right][0] == said[right]:
                right += 1
            layers = [layer for _, layer in drafts[row][:right]] + [model.num_layers]
            for token, layer in zip(said[: right + 1], layers, strict=True):
                found.append(rows[row].take(token, layer, ends))
                if found[-1].finish is not None:
                    break
            engine.cut(row, lengths[row] + right + 1)
        yield found
        ended = {event.row for event in found if event.finish is not None}
        active = [row for row in active if row not in ended]


def _draft(
    model: EarlyExitCausalModel,
    engine: Engine,
    rows: list[Growing],
    settings: Settings,
    criterion: Criterion | None,
    active: list[int],
) -> dict[int, list[tuple[int, int]]]:
    """For each row the next tokens as its exits see them, with their layers; none where one more token is the last."""
    drafts: dict[int, list[tuple[int, int]]] = {row: [] for row in active}
    room = {row: min(settings.draft_tokens, rows[row].limit - len(rows[row].tokens) - 1) for row in active}
    going = [row for row in active if room[row] > 0]
    last = {row: rows[row].tokens[-1] for row in going}
    while going:
        share = [(len(rows[row].tokens) + len(drafts[row])) / rows[row].limit for row in going]
        step = engine.step(going, [last[row] for row in going], criterion, torch.tensor(share, device=engine.device))
        for row, token, number in zip(going, step.logits.argmax(-1).tolist(), step.exits, strict=True):
            drafts[row].append((token, model.exit_layers[number - 1]))
            last[row] = token
        going = [row for row in going if len(drafts[row]) < room[row] and last[row] not in settings.eos_token_ids]
    return drafts
