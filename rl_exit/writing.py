"""Texts that a decoder writes for tokenised prompts, with the layer of every token, for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rl_exit.criteria.base import Criterion
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.models.token_pass import run_text


@dataclass(frozen=True)
class Written:
    """One text.

    Attributes:
        text: Without special tokens.
        pieces: Its tokens as texts.
        exit_layers: Layer at which each token was written, 1..L; the first comes from the prefill.
    """

    text: str
    pieces: list[str]
    exit_layers: list[int]


@torch.inference_mode()
def write_texts(
    model: EarlyExitCausalModel, prompts: Sequence[Sequence[int]], rule: Criterion | None, most: int, batch_size: int
) -> list[Written]:
    """Write greedily until end of text.

    Args:
        model: The decoder.
        prompts: Token ids.
        rule: Who leaves; None: nobody.
        most: New tokens of a text at most.
        batch_size: Texts at a time.
    """
    model.eval()
    found: list[Written] = []
    for start in range(0, len(prompts), batch_size):
        found += _batch(model, [list(one) for one in prompts[start : start + batch_size]], rule, most)
    return found


def _batch(model: EarlyExitCausalModel, rows: list[list[int]], rule: Criterion | None, most: int) -> list[Written]:
    """The slow twin: the whole text anew for every token."""
    starts = torch.tensor([len(row) for row in rows])
    layers: list[list[int]] = [[] for _ in rows]
    open_rows = list(range(len(rows)))
    end = model.tokenizer.eos_token_id
    for _ in range(most):
        if not open_rows:
            break
        lengths = torch.tensor([len(rows[row]) for row in open_rows])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.zeros_like(mask)
        for place, row in enumerate(open_rows):
            ids[place, : len(rows[row])] = torch.tensor(rows[row])
        done = run_text(model, ids, mask, starts[open_rows], rule, most)
        exits = done.exits[torch.arange(len(open_rows)), lengths - 1]
        states = done.states[torch.arange(len(open_rows)), exits - 1, lengths - 1]
        chosen = model.head(states).argmax(-1).tolist()
        for place, row in enumerate(list(open_rows)):
            layers[row].append(model.exit_layers[int(exits[place]) - 1])
            rows[row].append(chosen[place])
            if chosen[place] == end or len(rows[row]) >= model.max_length:
                open_rows.remove(row)
    decode = model.tokenizer.decode
    new = [row[int(start) :] for row, start in zip(rows, starts, strict=True)]
    return [
        Written(decode(ids, skip_special_tokens=True), [decode([token]) for token in ids], where)
        for ids, where in zip(new, layers, strict=True)
    ]
