"""Tiny random decoders of every family, with early exits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from rl_exit.models.causal import EarlyExitCausalModel

VOCABULARY = 61
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = {
    **_SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_LLAMA),
    "llama-tied": LlamaConfig(**{**_LLAMA, "head_dim": 16}, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_LLAMA),
    "qwen2-window": Qwen2Config(**_LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "qwen3": Qwen3Config(**_LLAMA, head_dim=16),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "gpt2-scaled": GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        scale_attn_by_inverse_layer_idx=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": GPTNeoXConfig(
        **_SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    ),
    "gpt_neox-serial": GPTNeoXConfig(
        **_SIZES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        use_parallel_residual=False,
    ),
}


def library_model(name: str, seed: int = 0) -> Any:
    """A causal language model with weights large enough that its layers matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = model.config.pad_token_id = 0
    return model.eval()


def early_exit(name: str, seed: int = 0, **options: Any) -> EarlyExitCausalModel:
    """The same with exits whose norms, adapters and policy are no longer those of the start."""
    made = EarlyExitCausalModel.from_model(library_model(name, seed), None, seed=seed, **options)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in made.exits.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        made.policy.weight_out *= 30
    return made


def ragged(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of these lengths, padded on the right: token ids and mask [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask
