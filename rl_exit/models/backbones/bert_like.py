"""BERT, RoBERTa (also XLM-RoBERTa, CamemBERT), ELECTRA, DistilBERT, ALBERT: post-norm encoders, absolute positions.

Relied on: ``model.embeddings``; ``model.encoder.layer`` (``model.transformer.layer`` in DistilBERT) whose modules are
called as ``layer(hidden, mask)``; ELECTRA's optional ``embeddings_project``; ALBERT's ``embedding_hidden_mapping_in``
and ``albert_layer_groups``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rl_exit.models.backbones.base import Family
from rl_exit.models.backbones.embeddings import Ragged, embed_rows, plain
from rl_exit.models.backbones.quick_layer import quick_layer, runs_quick
from rl_exit.models.backbones.state import StepState

Embed = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
EmbedRows = Callable[[Any, Ragged, int], Tensor | None]


def _causal_objection(config: Any) -> str | None:
    if getattr(config, "is_decoder", False):
        return "its configuration says is_decoder=true, but only the encoder form is supported; set is_decoder=false"
    return None


def _embed(model: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
    hidden: Tensor = model.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
    if hasattr(model, "embeddings_project"):  # ELECTRA, where the embeddings are narrower than the layers
        hidden = model.embeddings_project(hidden)
    return hidden


def _embed_bert(model: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
    """As :func:`_embed`; without gradients in four operations in place of twenty, to the rounding of a sum."""
    parts = model.embeddings
    if torch.is_grad_enabled() or not plain(parts):
        return _embed(model, input_ids, attention_mask, token_type_ids)
    tables = parts.word_embeddings, parts.token_type_embeddings, parts.position_embeddings
    words, types, positions = (table.weight for table in tables)
    if not words.dtype == types.dtype == positions.dtype:
        return _embed(model, input_ids, attention_mask, token_type_ids)
    hidden = F.embedding(input_ids, words)
    places = positions[: input_ids.shape[1]]
    if token_type_ids is None or (token_type_ids.is_cpu and not token_type_ids.numpy().any()):
        hidden += places + types[0]
    else:
        hidden += F.embedding(token_type_ids, types)
        hidden += places
    return F.layer_norm(hidden, hidden.shape[-1:], parts.LayerNorm.weight, parts.LayerNorm.bias, parts.LayerNorm.eps)


def _embed_rows(model: Any, ragged: Ragged, tokens: int) -> Tensor | None:
    return embed_rows(model.embeddings, ragged, tokens)


def _electra_embed_rows(model: Any, ragged: Ragged, tokens: int) -> Tensor | None:
    hidden = embed_rows(model.embeddings, ragged, tokens)
    return model.embeddings_project(hidden) if hidden is not None and hasattr(model, "embeddings_project") else hidden


def _run(model: Any, index: int, state: StepState, mask: Tensor | None) -> Any:
    layer = model.encoder.layer[index]
    # Of all attentions that are accepted only the eager one has no mask of truth values.
    quick = quick_layer(layer, state.hidden, mask) if state.backbone.boolean_mask else None
    return layer(state.hidden, mask) if quick is None else quick


def _count(model: Any) -> int:
    return len(model.encoder.layer)


def _bert_like(name: str, embed: Embed = _embed, rows: EmbedRows = _embed_rows) -> Family:
    return Family(
        name=name,
        causal=False,
        embed=embed,
        embed_rows=rows,
        run_layer=_run,
        count_layers=_count,
        objection=_causal_objection,
        packs=True,
        drops_padding=lambda model, index: runs_quick(model.encoder.layer[index]),
    )


BERT = _bert_like("BERT", _embed_bert)
ROBERTA = _bert_like("RoBERTa")
ELECTRA = _bert_like("ELECTRA", rows=_electra_embed_rows)


def _distilbert_embed(model: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
    return model.embeddings(input_ids)


def _distilbert_run(model: Any, index: int, state: StepState, mask: Tensor | None) -> Any:
    return model.transformer.layer[index](state.hidden, mask)


DISTILBERT = Family(
    name="DistilBERT",
    causal=False,
    embed=_distilbert_embed,
    run_layer=_distilbert_run,
    count_layers=lambda model: len(model.transformer.layer),
    packs=True,
)


def _albert_embed(model: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
    embedded = model.embeddings(input_ids, token_type_ids=token_type_ids)
    return model.encoder.embedding_hidden_mapping_in(embedded)


def _albert_run(model: Any, index: int, state: StepState, mask: Tensor | None) -> Any:
    config = model.config
    # The same few groups of weights serve all layers.
    group = index * config.num_hidden_groups // config.num_hidden_layers
    return model.encoder.albert_layer_groups[group](state.hidden, mask)


def _albert_objection(config: Any) -> str | None:
    if config.inner_group_num != 1:
        return (
            f"it has inner_group_num={config.inner_group_num}, where one layer of the configuration is several real "
            "ones; only inner_group_num=1 is supported"
        )
    return None


ALBERT = Family(
    name="ALBERT",
    causal=False,
    embed=_albert_embed,
    run_layer=_albert_run,
    count_layers=lambda model: int(model.config.num_hidden_layers),
    objection=_albert_objection,
    packs=True,
)
