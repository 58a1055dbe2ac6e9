"""Llama, Qwen2, Qwen3, GPT-2 and GPT-NeoX: causal pre-norm models.

Relied on: Llama and Qwen ``model.embed_tokens``, ``model.layers``, ``model.norm``, ``model.rotary_emb(hidden,
position_ids)`` and ``config.layer_types``; GPT-2 ``model.wte``, ``wpe``, ``drop``, ``h``, ``ln_f``; GPT-NeoX
``model.embed_in``, ``emb_dropout``, ``layers``, ``final_layer_norm``, ``rotary_emb``. Layers take ``attention_mask``
and, with rotary positions, ``position_embeddings``. No cache is kept here; generation runs the layers in parts and
keeps its own (``blocks.py``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rl_exit.models.backbones import blocks
from rl_exit.models.backbones.base import Family
from rl_exit.models.backbones.rotary import layer_reaches, layer_type_objection, positions
from rl_exit.models.backbones.state import StepState, Tables


def _rotary_tables(model: Any, hidden: Tensor) -> Tables:
    cos, sin = model.rotary_emb(hidden, positions(hidden))
    return Tables(by_token={"cos": cos, "sin": sin})


def _rotary_run(model: Any, index: int, state: StepState, mask: Tensor | None) -> Any:
    table = state.tables.by_token
    return model.layers[index](state.hidden, attention_mask=mask, position_embeddings=(table["cos"], table["sin"]))


def _llama_embed(model: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
    return model.embed_tokens(input_ids)


def _causal_reaches(config: Any, num_layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    # A window of w tokens counts the token itself.
    return layer_reaches(config, num_layers, None if window is None else window - 1)


def _llama_like(name: str) -> Family:
    return Family(
        name=name,
        causal=True,
        embed=_llama_embed,
        run_layer=_rotary_run,
        count_layers=lambda model: len(model.layers),
        tables=_rotary_tables,
        final_norm=lambda model: model.norm,
        reaches=_causal_reaches,
        objection=layer_type_objection,
        blocks=blocks.LLAMA,
    )


LLAMA = _llama_like("Llama")
QWEN2 = _llama_like("Qwen2")
QWEN3 = _llama_like("Qwen3")


def _gpt_neox_embed(model: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
    return model.emb_dropout(model.embed_in(input_ids))


GPT_NEOX = Family(
    name="GPT-NeoX",
    causal=True,
    embed=_gpt_neox_embed,
    run_layer=_rotary_run,
    count_layers=lambda model: len(model.layers),
    tables=_rotary_tables,
    final_norm=lambda model: model.final_layer_norm,
    blocks=blocks.GPT_NEOX,
)


def _gpt2_embed(model: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
    embedded = model.wte(input_ids)
    hidden = embedded + model.wpe(positions(embedded))
    if token_type_ids is not None:  # as the library does: segments are looked up in the table of the tokens
        hidden = hidden + model.wte(token_type_ids)
    return model.drop(hidden)


def _gpt2_run(model: Any, index: int, state: StepState, mask: Tensor | None) -> Any:
    return model.h[index](state.hidden, attention_mask=mask)


GPT2 = Family(
    name="GPT-2",
    causal=True,
    embed=_gpt2_embed,
    run_layer=_gpt2_run,
    count_layers=lambda model: len(model.h),
    final_norm=lambda model: model.ln_f,
    blocks=blocks.GPT2,
)
