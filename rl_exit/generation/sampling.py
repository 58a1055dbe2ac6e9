"""How a generation chooses its tokens and when it ends: the words of transformers, each of them honoured or refused.

Logits are changed by transformers' own processors, in its order, and tokens are drawn as it draws them, so the same
seed gives the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rl_exit.errors import ConfigError, nearest
from rl_exit.generation import LEAST_TEMPERATURE

DEFAULT_NEW_TOKENS = 20
DEFAULT_TOP_K = 50
DEFAULT_DRAFT = 4


@dataclass(frozen=True)
class Settings:
    """One generation's settings.

    Attributes:
        max_new_tokens: Tokens to generate at most, 1 or more.
        do_sample: Draw tokens; False: take the likeliest.
        temperature: From 0.001; below 1 sharpens. Usual 0.2 to 1.
        top_k: Draw from the k likeliest; 0: from all.
        top_p: Draw from the fewest tokens with at least this probability together; 1: from all.
        min_p: Draw from tokens with at least this share of the likeliest one's probability; 0: from all.
        repetition_penalty: Divides the scores of tokens that are there already; 1: none.
        seed: Of the draws; None: torch's own generator.
        eos_token_ids: Tokens that end a text.
        pad_token_id: What follows a text's end in a batch.
        stop_strings: Strings that end a text.
        lossless: Draft with exits, verify at full depth; the text is that of full depth. Greedy only.
        draft_tokens: Tokens drafted before each verification.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = DEFAULT_TOP_K
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    stop_strings: tuple[str, ...] = ()
    lossless: bool = False
    draft_tokens: int = DEFAULT_DRAFT

    def __post_init__(self) -> None:
        _count("max_new_tokens", self.max_new_tokens, 1)
        _count("top_k", self.top_k, 0)
        _count("draft_tokens", self.draft_tokens, 1)
        _number("temperature", self.temperature, LEAST_TEMPERATURE, float("inf"))
        _number("top_p", self.top_p, 0.0, 1.0, over=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, float("inf"), over=True)
        if self.seed is not None:
            _count("seed", self.seed, 0)
        if any(not isinstance(stop, str) or not stop for stop in self.stop_strings):
            raise ConfigError(f"stop_strings = {list(self.stop_strings)!r}; accepted: strings that are not empty")
        if self.lossless and (self.do_sample or self.repetition_penalty != 1.0):
            raise ConfigError("lossless=True is for greedy text: leave out do_sample and repetition_penalty")


# Words of transformers that change nothing here, whatever their value.
_WITHOUT_EFFECT = frozenset(
    {
        "bos_token_id",
        "cache_implementation",
        "compile_config",
        "decoder_start_token_id",
        "disable_compile",
        "is_assistant",
        "output_attentions",
        "output_hidden_states",
        "prefill_chunk_size",
        "transformers_version",
        "use_cache",
    }
)
# Words that are not offered, with the value at which they change nothing.
_NEUTRAL: dict[str, Any] = {
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
}
_OWN = frozenset({"lossless", "draft_tokens", "seed"})
_TAKEN = frozenset(
    {
        "max_new_tokens",
        "max_length",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "eos_token_id",
        "pad_token_id",
        "stop_strings",
        "return_dict_in_generate",
    }
)


def settings_of(
    defaults: GenerationConfig, given: GenerationConfig | None, options: Mapping[str, Any], prompt_tokens: int
) -> tuple[Settings, bool]:
    """Settle what holds: options before a given configuration before the model's own.

    Args:
        defaults: The model's ``generation_config``.
        given: The caller's, or None.
        options: The caller's keyword arguments.
        prompt_tokens: Tokens of the padded prompts, which ``max_length`` counts.

    Returns:
        The settings, and whether ``return_dict_in_generate`` is asked for.

    Raises:
        ConfigError: A word that is unknown or not offered here, or a value out of range.
    """
    known_words = GenerationConfig().to_dict()
    values: dict[str, Any] = {}
    whole: int | None = None  # of the source that decides, where that is max_length
    for source, strict in ((_set(defaults), False), ({} if given is None else _set(given), True), (options, True)):
        for key, value in source.items():
            if key in _TAKEN or key in _OWN:
                if value is not None:
                    values[key] = value
            elif strict and key not in _WITHOUT_EFFECT and value not in (None, False, _NEUTRAL.get(key)):
                known = key in known_words
                what = "is not offered here" if known else "is unknown"
                hint = "" if known else nearest(key, _TAKEN | _OWN)
                accepted = ", ".join(sorted(_TAKEN | _OWN))
                raise ConfigError(f"generate: {key} = {value!r} {what}.{hint} Accepted: {accepted}")
        if "max_length" in source and source["max_length"] is not None and "max_new_tokens" not in source:
            whole = _whole("max_length", source["max_length"])
            values["max_new_tokens"] = whole - prompt_tokens
        elif source.get("max_new_tokens") is not None:
            whole = None
    if whole is not None and values["max_new_tokens"] < 1:
        raise ConfigError(f"max_length = {whole}: the prompt has {prompt_tokens} tokens already")
    values.pop("max_length", None)
    wanted = bool(values.pop("return_dict_in_generate", False))
    eos = values.pop("eos_token_id", None)
    ends = () if eos is None else tuple(int(one) for one in (eos if isinstance(eos, Sequence) else (eos,)))
    pad = values.pop("pad_token_id", None)
    stop = values.pop("stop_strings", ())
    return Settings(
        **values,
        eos_token_ids=ends,
        pad_token_id=int(pad) if pad is not None else (ends[0] if ends else 0),
        stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
    ), wanted


class Chooser:
    """Chooses the next token of every row.

    Args:
        settings: How.
        device: Where the logits are; draws with a seed are made there.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.generator: torch.Generator | None = None
        if settings.do_sample and settings.seed is not None:
            self.generator = torch.Generator(device).manual_seed(settings.seed)
        chain = LogitsProcessorList()
        if settings.repetition_penalty != 1.0:
            chain.append(RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)))
        if settings.do_sample:
            if settings.temperature != 1.0:
                chain.append(TemperatureLogitsWarper(float(settings.temperature)))
            if settings.top_k:
                chain.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1.0:
                chain.append(TopPLogitsWarper(float(settings.top_p)))
            if settings.min_p:
                chain.append(MinPLogitsWarper(float(settings.min_p)))
        self.chain = chain

    def __call__(self, sequences: Tensor, logits: Tensor) -> Tensor:
        """Next tokens, int64 [B].

        Args:
            sequences: Prompts and what was generated, int64 [B, T]; read by the repetition penalty alone.
            logits: [B, V]; of rows that have ended anything finite, so that the draws of others do not depend on them.
        """
        scores = logits.float()
        if self.chain:
            scores = self.chain(sequences, scores)
        if not self.settings.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[:, 0]


def _set(config: GenerationConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_diff_dict().items() if not key.startswith("_")}


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} = {value!r}; accepted: a whole number")
    return value


def _count(name: str, value: Any, least: int) -> None:
    if _whole(name, value) < least:
        raise ConfigError(f"{name} = {value!r}; accepted: a whole number from {least}")


def _number(name: str, value: Any, low: float, high: float, over: bool = False) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not fits or (over and value == low) or value == float("inf"):
        bound = "" if high == float("inf") else f" up to {high:g}"
        raise ConfigError(f"{name} = {value!r}; accepted: a number {'over' if over else 'from'} {low:g}{bound}")
