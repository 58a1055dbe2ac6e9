"""ModernBERT: a pre-norm encoder with rotary positions, whose layers see all tokens or only their neighbours.

Relied on: ``model.embeddings``, ``model.layers`` (each with ``attention_type``), ``model.final_norm``,
``model.rotary_emb(hidden, position_ids, layer_type)``, ``config.layer_types`` and ``config.local_attention``.
The first releases of transformers 5 leave the last of ``output_hidden_states`` without the final norm; ours has it.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from torch import Tensor

from rl_exit.models.backbones.base import Family
from rl_exit.models.backbones.rotary import layer_reaches, layer_type_objection, positions
from rl_exit.models.backbones.state import StepState, Tables


def _embed(model: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
    return model.embeddings(input_ids=input_ids)


def _tables(model: Any, hidden: Tensor) -> Tables:
    table: dict[str, Tensor] = {}
    for kind in sorted(set(model.config.layer_types)):
        table[f"{kind}.cos"], table[f"{kind}.sin"] = model.rotary_emb(hidden, positions(hidden), kind)
    return Tables(by_token=table)


def _run(model: Any, index: int, state: StepState, mask: Tensor | None) -> Any:
    layer = model.layers[index]
    table, kind = state.tables.by_token, layer.attention_type
    rotary = (table[f"{kind}.cos"], table[f"{kind}.sin"])
    if _chooses_its_mask(layer.__class__):
        mask = state.hidden.new_zeros(1, 1, 1, 1) if mask is None else mask  # its eager attention adds what it is given
        return layer(state.hidden, attention_mask=mask, sliding_window_mask=mask, position_embeddings=rotary)
    return layer(state.hidden, attention_mask=mask, position_embeddings=rotary)


@lru_cache
def _chooses_its_mask(layer_class: type) -> bool:
    """Whether layers take the masks of both kinds and pick one, as in the first releases of transformers 5."""
    return "sliding_window_mask" in inspect.signature(layer_class.forward).parameters  # type: ignore[attr-defined]


MODERNBERT = Family(
    name="ModernBERT",
    causal=False,
    embed=_embed,
    run_layer=_run,
    count_layers=lambda model: len(model.layers),
    tables=_tables,
    final_norm=lambda model: model.final_norm,
    # local_attention counts both sides together.
    reaches=lambda config, num_layers: layer_reaches(config, num_layers, config.local_attention // 2),
    objection=layer_type_objection,
)
