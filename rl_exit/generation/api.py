"""``model.generate``: as transformers calls it, on token ids; or on texts, with the exit layer of every token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_outputs import ModelOutput

from rl_exit.criteria import ConsistentEE, Criterion, Fixed
from rl_exit.errors import ConfigError, DataError, ModelError
from rl_exit.generation.loop import Event, events
from rl_exit.generation.sampling import Settings, settings_of
from rl_exit.inference import check_batch_size, checked_texts, choose_criterion
from rl_exit.models.pretrained import position_limit

if TYPE_CHECKING:
    from rl_exit.models.causal import EarlyExitCausalModel


@dataclass
class GenerationOutput(ModelOutput):
    """What ``generate`` returns for token ids if ``return_dict_in_generate=True``.

    Attributes:
        sequences: Prompts as given and what follows them, int64 [B, T + N]; padding behind a text's end.
        exit_layers: Layer at which the pass that gave each new token left, int64 [B, N]; 0 at padding.
    """

    sequences: Tensor | None = None
    exit_layers: Tensor | None = None


@dataclass(frozen=True)
class Generation:
    """The text generated for one prompt.

    Attributes:
        prompt: The prompt.
        text: What follows it, without special tokens and without the stop string.
        tokens: Ids of the new tokens, with the end token or the stop string's if that is how it ended.
        exit_layers: Layer 1..L at which the pass that gave each token left; the first is L.
        finish: ``"eos"``, ``"stop"`` or ``"length"``.
    """

    prompt: str
    text: str
    tokens: list[int]
    exit_layers: list[int]
    finish: str

    @property
    def mean_exit_layer(self) -> float:
        """Mean of ``exit_layers``."""
        return sum(self.exit_layers) / len(self.exit_layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "mean_exit_layer": self.mean_exit_layer}


def generate_ids(
    model: EarlyExitCausalModel,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    rule: Criterion | None,
    generation_config: GenerationConfig | None,
    streamer: Any,
    options: Mapping[str, Any],
) -> Tensor | GenerationOutput:
    """Continue token ids; see :meth:`rl_exit.models.causal.EarlyExitCausalModel.generate`."""
    if input_ids is None:
        input_ids, attention_mask = _start_token(model), None
    if input_ids.ndim != 2 or not len(input_ids):
        raise DataError(f"input_ids: [B, T] with B of at least 1 is expected, got {list(input_ids.shape)}")
    width = input_ids.shape[1]
    settings, as_dict = settings_of(model.generation_config, generation_config, options, width)
    mask = _mask_of(input_ids, attention_mask, settings)
    prompts = [row[kept].tolist() for row, kept in zip(input_ids.cpu(), mask.cpu(), strict=True)]
    limits = _limits(model, prompts, settings)
    if streamer is not None:
        if settings.lossless and len(prompts) > 1:
            raise ConfigError("a streamer of transformers takes one token a row at a time; with lossless=True, one row")
        streamer.put(input_ids.cpu())
    new = torch.full((len(prompts), max(limits)), settings.pad_token_id, dtype=input_ids.dtype)
    layers = torch.zeros((len(prompts), max(limits)), dtype=torch.int64)
    counts = [0] * len(prompts)
    for found in events(model, prompts, settings, limits, rule, input_ids.to(model.device), with_text=False):
        for event in found:
            new[event.row, counts[event.row]] = event.token
            layers[event.row, counts[event.row]] = event.exit_layer
            counts[event.row] += 1
            if streamer is not None and settings.lossless:
                streamer.put(torch.tensor([event.token]))
        if streamer is not None and not settings.lossless:
            streamer.put(new[:, max(counts) - 1].clone())
    if streamer is not None:
        streamer.end()
    longest = max(counts)
    sequences = torch.cat([input_ids, new[:, :longest].to(input_ids.device)], 1)
    if not as_dict:
        return sequences
    return GenerationOutput(sequences=sequences, exit_layers=layers[:, :longest].to(input_ids.device))


def stream_texts(
    model: EarlyExitCausalModel,
    prompts: Sequence[str],
    rule: Criterion | None,
    generation_config: GenerationConfig | None,
    options: Mapping[str, Any],
) -> Iterator[list[Event]]:
    """Continue texts; yields the events of each step, which carry pieces of text.

    Raises:
        UserError: Something other than texts, or a setting that is not accepted.
    """
    texts, encoded = encode_prompts(model, prompts)
    if not texts:
        return
    longest = max(map(len, encoded))
    settings, _ = settings_of(model.generation_config, generation_config, options, longest)
    limits = _limits(model, encoded, settings)
    padded = torch.tensor(
        [[settings.pad_token_id] * (longest - len(one)) + one for one in encoded], device=model.device
    )
    yield from events(model, encoded, settings, limits, rule, padded, with_text=True)


def generate_texts(
    model: EarlyExitCausalModel,
    prompts: Sequence[str],
    rule: Criterion | None,
    generation_config: GenerationConfig | None,
    batch_size: int,
    options: Mapping[str, Any],
) -> list[Generation]:
    """Continue texts in batches; see :meth:`rl_exit.models.causal.EarlyExitCausalModel.generate`."""
    check_batch_size(batch_size)
    texts = checked_texts(prompts, "prompts")
    made: list[Generation] = []
    for at in range(0, len(texts), batch_size):
        some = texts[at : at + batch_size]
        parts: list[list[Event]] = [[] for _ in some]
        for found in stream_texts(model, some, rule, generation_config, options):
            for event in found:
                parts[event.row].append(event)
        made += [collect(prompt, part) for prompt, part in zip(some, parts, strict=True)]
    return made


def collect(prompt: str, part: Sequence[Event]) -> Generation:
    """The generation that the events of one row add up to."""
    return Generation(
        prompt=prompt,
        text="".join(event.piece for event in part),
        tokens=[event.token for event in part],
        exit_layers=[event.exit_layer for event in part],
        finish=part[-1].finish or "length",
    )


def encode_prompts(model: EarlyExitCausalModel, prompts: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Prompts and their token ids; an empty prompt becomes the token that begins a text.

    Raises:
        DataError: Something other than texts.
        ModelError: The model has no tokenizer.
    """
    texts = checked_texts(prompts, "prompts")
    if model.tokenizer is None:
        raise ModelError("this model has no tokenizer; set model.tokenizer, or call generate with input_ids")
    encoded = [list(model.tokenizer(text).input_ids) for text in texts]
    return texts, [one or _start_token(model)[0].tolist() for one in encoded]


def the_rule(model: EarlyExitCausalModel, criterion: Criterion | None, threshold: float | None) -> Criterion | None:
    """The criterion that holds; None where nobody can leave early, so that nobody is asked.

    Raises:
        ConfigError: As :func:`rl_exit.inference.choose_criterion`.
    """
    rule = choose_criterion(criterion, threshold, model.config.threshold)
    never = isinstance(rule, Fixed) and rule.depth >= model.num_exits
    return None if never or (isinstance(rule, ConsistentEE) and rule.threshold >= 1.0) else rule


def _mask_of(input_ids: Tensor, attention_mask: Tensor | None, settings: Settings) -> Tensor:
    """Which tokens are real, bool [B, T]; without a mask as transformers infers it from padding."""
    if attention_mask is None:
        pad = settings.pad_token_id
        padded = pad not in settings.eos_token_ids and bool((input_ids == pad).any())
        mask = input_ids != pad if padded else torch.ones_like(input_ids, dtype=torch.bool)
    elif attention_mask.shape != input_ids.shape:
        given = f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
        raise DataError(f"input_ids and attention_mask must both have shape [B, T], not {given}")
    else:
        mask = attention_mask.bool()
    if not bool(mask.any(1).all()):
        name = "input_ids" if attention_mask is None else "attention_mask"
        raise DataError(f"{name}: a row without a single token; a prompt needs one")
    return mask


def _limits(model: EarlyExitCausalModel, prompts: Sequence[Sequence[int]], settings: Settings) -> list[int]:
    """Tokens that each prompt's text may have: those wanted, or fewer where there are no positions for them.

    Raises:
        DataError: A prompt fills all positions.
    """
    limit = position_limit(model.backbone.model.config)
    if limit is None:
        return [settings.max_new_tokens] * len(prompts)
    longest = max(map(len, prompts))
    if longest >= limit:
        raise DataError(f"a prompt of {longest} tokens; this model has positions for {limit}, and one must be left")
    return [min(settings.max_new_tokens, limit - len(prompt)) for prompt in prompts]


def _start_token(model: EarlyExitCausalModel) -> Tensor:
    begin = model.generation_config.bos_token_id
    if begin is None:
        begin = model.config.bos_token_id
    if begin is None:
        raise DataError("an empty prompt, and this model has no token that begins a text; give one token at least")
    return torch.tensor([[int(begin)]], device=model.device)
