"""Texts that a decoder writes for tokenised prompts, with the layer of every token, for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rl_exit.criteria.base import Criterion
from rl_exit.models.causal import EarlyExitCausalModel


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
        found += _batch(model, prompts[start : start + batch_size], rule, most)
    return found


def _batch(
    model: EarlyExitCausalModel, prompts: Sequence[Sequence[int]], rule: Criterion | None, most: int
) -> list[Written]:
    width = max(map(len, prompts))
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=model.device)
    ids = torch.tensor([[0] * (width - len(one)) + list(one) for one in prompts], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        criterion=rule,
        threshold=1.0 if rule is None else None,
        do_sample=False,
        max_new_tokens=most,
        return_dict_in_generate=True,
    )
    decode = model.tokenizer.decode
    found = []
    for new, layers in zip(out.sequences[:, width:].tolist(), out.exit_layers.tolist(), strict=True):
        count = sum(layer > 0 for layer in layers)
        written = new[:count]
        text = decode(written, skip_special_tokens=True)
        found.append(Written(text, [decode([token]) for token in written], layers[:count]))
    return found
