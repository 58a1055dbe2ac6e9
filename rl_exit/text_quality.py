"""How alike two texts are: Rouge-L by longest common subsequence, BERTScore-F by an encoder's token states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl_exit.errors import ModelError
from rl_exit.models.pretrained import load_backbone

_NO_WORD = re.compile(r"[^a-z0-9]+")
BATCH = 32
MOST_TOKENS = 256


def rouge_l(candidate: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin, 2004), 0..1.

    Words are runs of ASCII letters and digits in lower case, without stemming, as the package ``rouge-score`` has them.
    Two texts without words are alike.
    """
    a, b = (_NO_WORD.sub(" ", text.lower()).split() for text in (candidate, reference))
    if not a or not b:
        return float(a == b)
    common = _common(a, b)
    return 2.0 * common / (len(a) + len(b))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for index, other in enumerate(b, 1):
            above = row[index]
            row[index] = diagonal + 1 if word == other else max(above, row[index - 1])
            diagonal = above
    return row[-1]


class BertScore:
    """BERTScore (Zhang et al., 2020): every token matched with its most similar one in the other text.

    States are those of the encoder's last layer, without weighting by rarity and without rescaling; special tokens do
    not count.

    Args:
        encoder: ``"minilm"``, a hub id, or a folder.

    Raises:
        ModelError: It cannot be loaded.
    """

    def __init__(self, encoder: str = "minilm") -> None:
        loaded = load_backbone(encoder)
        self.name = loaded.origin
        self._model, self._tokenizer = loaded.model.eval(), loaded.tokenizer
        if getattr(self._model.config, "is_decoder", False):
            raise ModelError(f"generation.encoder = '{encoder}': an encoder is accepted, this is a decoder")

    @torch.inference_mode()
    def f1(self, candidates: Sequence[str], references: Sequence[str]) -> list[float]:
        """F of each pair, -1..1 (usually 0.3..1 without rescaling); 0 where a text has no token and the other has."""
        texts = list(dict.fromkeys([*candidates, *references]))
        states: dict[str, Tensor] = {}
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            states |= dict(zip(some, self._states(some), strict=True))
        return [_match(states[a], states[b]) for a, b in zip(candidates, references, strict=True)]

    def _states(self, texts: Sequence[str]) -> list[Tensor]:
        batch: Any = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=MOST_TOKENS,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        counts = (batch.pop("special_tokens_mask") == 0) & (batch["attention_mask"] == 1)
        hidden = self._model(**batch).last_hidden_state
        unit = torch.nn.functional.normalize(hidden.float(), dim=-1)
        return [unit[row][counts[row]] for row in range(len(texts))]


def _match(candidate: Tensor, reference: Tensor) -> float:
    if not len(candidate) or not len(reference):
        return float(len(candidate) == len(reference))
    alike = candidate @ reference.t()
    precision, recall = float(alike.max(1).values.mean()), float(alike.max(0).values.mean())
    return 2.0 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
