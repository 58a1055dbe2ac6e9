"""MPNet, DeBERTa and DeBERTa-v2/v3: post-norm encoders with relative positions and attention code of their own.

Relied on: ``model.embeddings``, ``model.encoder.layer``; MPNet's ``encoder.compute_position_bias(hidden)``; DeBERTa's
``encoder.get_rel_pos(hidden)``, ``encoder.get_rel_embedding()`` and, in v2, ``encoder.conv`` after the first layer.
These models have one attention implementation; `attn_implementation` changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rl_exit.models.backbones.base import Family
from rl_exit.models.backbones.state import StepState, Tables


def _count(model: Any) -> int:
    return len(model.encoder.layer)


def _mpnet_embed(model: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
    return model.embeddings(input_ids=input_ids)


def _mpnet_tables(model: Any, hidden: Tensor) -> Tables:
    # The bias of one row serves all: it depends on positions only, and broadcasting spares B copies of it.
    return Tables(by_pair={"bias": model.encoder.compute_position_bias(hidden[:1])})


def _mpnet_run(model: Any, index: int, state: StepState, mask: Tensor | None) -> Any:
    return model.encoder.layer[index](state.hidden, mask, position_bias=state.tables.by_pair["bias"])


MPNET = Family(
    name="MPNet",
    causal=False,
    embed=_mpnet_embed,
    run_layer=_mpnet_run,
    count_layers=_count,
    tables=_mpnet_tables,
    mask_form="additive",
)


def _deberta_embed(model: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
    return model.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, mask=attention_mask)


def _deberta_tables(model: Any, hidden: Tensor) -> Tables:
    positions = model.encoder.get_rel_pos(hidden)
    return Tables(
        by_pair={} if positions is None else {"positions": positions},
        fixed={"embeddings": model.encoder.get_rel_embedding()},
    )


def _deberta_run(model: Any, index: int, state: StepState, mask: Tensor | None) -> Any:
    tables = state.tables
    output = model.encoder.layer[index](
        state.hidden,
        mask,
        relative_pos=tables.by_pair.get("positions"),
        rel_embeddings=tables.fixed["embeddings"],
    )
    hidden = output[0] if isinstance(output, tuple) else output
    convolution = getattr(model.encoder, "conv", None)
    if index == 0 and convolution is not None:  # v2: a convolution over the embeddings joins the output of layer 1
        hidden = convolution(state.hidden, hidden, state.attention_mask)
    return hidden


def _deberta_run_in_full_precision(model: Any, index: int, state: StepState, mask: Tensor | None) -> Any:
    # Under bf16 autocast the first DeBERTa's own attention fails: it fills bf16 scores with the least float32 number.
    with torch.autocast(state.hidden.device.type, enabled=False):
        return _deberta_run(model, index, replace(state, hidden=state.hidden.to(model.dtype)), mask)


def _deberta(name: str, run_layer: Callable[[Any, int, StepState, Tensor | None], Any]) -> Family:
    return Family(
        name=name,
        causal=False,
        embed=_deberta_embed,
        run_layer=run_layer,
        count_layers=_count,
        tables=_deberta_tables,
        mask_form="boolean",
    )


DEBERTA = _deberta("DeBERTa", _deberta_run_in_full_precision)
DEBERTA_V2 = _deberta("DeBERTa-v2/v3", _deberta_run)
