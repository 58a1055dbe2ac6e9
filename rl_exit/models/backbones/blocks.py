"""The two halves of a decoder's layer, for generation: keys and values are wanted without the layer, and layers run for
tokens of different rows and positions at once.

:class:`~rl_exit.models.backbones.base.SteppedBackbone` calls a layer as a whole, on whole rows. Generation needs it in
parts: what a token that left shows to a deeper layer is its keys and values there, and no more of that layer may be
paid for. All tensors here are flat: N tokens, of any rows, each with its own position. The layers' own modules do the
work, so adapters (LoRA) act. A test holds these parts equal to the layers.

Shapes: N tokens, S of them whose layer is run (the last S), H hidden size, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rl_exit.errors import ModelError

KNOWN_ROPE = ("default", "linear", "llama3", "yarn")


class Projected(NamedTuple):
    """What attention needs of N tokens.

    Attributes:
        query: [S, heads, D].
        key: [N, key heads, D].
        value: [N, key heads, D].
    """

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Blocks:
    """How the layers of one architecture run in parts.

    Attributes:
        layers: ``(model)`` to its layers.
        embed: ``(model, input_ids [N], positions [N])`` to the input of layer 1, [N, H].
        project: ``(layer, hidden [N, H], S)`` to queries of the last S tokens, keys and values, before rotation.
        finish: ``(layer, hidden [S, H], attended [S, heads * D])`` to the layer's output [S, H].
        scaling: ``(layer)`` to the factor on the scores.
        rotary: Whether queries and keys are rotated by ``model.rotary_emb``.
    """

    layers: Callable[[Any], Any]
    embed: Callable[[Any, Tensor, Tensor], Tensor]
    project: Callable[[Any, Tensor, int], Projected]
    finish: Callable[[Any, Tensor, Tensor], Tensor]
    scaling: Callable[[Any], float]
    rotary: bool = True


def rotary_table(model: Any, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0..length-1, each [length, 1, R], R <= D.

    Raises:
        ModelError: Rotary positions that change with the length of the text, so that no table holds.
    """
    kind = getattr(model.rotary_emb, "rope_type", "default")
    if kind not in KNOWN_ROPE:
        raise ModelError(f"rotary positions of type '{kind}' cannot generate here; accepted: {', '.join(KNOWN_ROPE)}")
    cos, sin = model.rotary_emb(like, torch.arange(length, device=like.device)[None])
    return cos[0, :, None], sin[0, :, None]


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R entries of heads [N, heads, D] by cosines and sines [N, 1, R]."""
    size = cos.shape[-1]
    turned = heads[..., :size]
    half = size // 2
    swapped = torch.cat((-turned[..., half:], turned[..., :half]), -1)
    turned = turned * cos + swapped * sin
    return turned if size == heads.shape[-1] else torch.cat((turned, heads[..., size:]), -1)


def _llama_project(layer: Any, hidden: Tensor, count: int) -> Projected:
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (-1, attention.head_dim)
    query = attention.q_proj(normed[len(normed) - count :]).unflatten(-1, shape)
    key, value = attention.k_proj(normed).unflatten(-1, shape), attention.v_proj(normed).unflatten(-1, shape)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    return Projected(query, key, value)


def _llama_finish(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + layer.self_attn.o_proj(attended)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


LLAMA = Blocks(
    layers=lambda model: model.layers,
    embed=lambda model, ids, positions: model.embed_tokens(ids),
    project=_llama_project,
    finish=_llama_finish,
    scaling=lambda layer: layer.self_attn.scaling,
)


def _gpt_neox_project(layer: Any, hidden: Tensor, count: int) -> Projected:
    attention = layer.attention
    heads = attention.query_key_value(layer.input_layernorm(hidden)).unflatten(-1, (-1, 3 * attention.head_size))
    query, key, value = heads.chunk(3, -1)
    return Projected(query[len(query) - count :], key, value)


def _gpt_neox_finish(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    attended = layer.attention.dense(attended)
    if layer.use_parallel_residual:
        return layer.mlp(layer.post_attention_layernorm(hidden)) + attended + hidden
    hidden = attended + hidden
    return layer.mlp(layer.post_attention_layernorm(hidden)) + hidden


GPT_NEOX = Blocks(
    layers=lambda model: model.layers,
    embed=lambda model, ids, positions: model.embed_in(ids),
    project=_gpt_neox_project,
    finish=_gpt_neox_finish,
    scaling=lambda layer: layer.attention.scaling,
)


def _gpt2_project(layer: Any, hidden: Tensor, count: int) -> Projected:
    attention = layer.attn
    heads = attention.c_attn(layer.ln_1(hidden)).unflatten(-1, (-1, attention.head_dim))
    query, key, value = heads.chunk(3, 1)
    return Projected(query[len(query) - count :], key, value)


def _gpt2_finish(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + layer.attn.c_proj(attended)
    return hidden + layer.mlp(layer.ln_2(hidden))


GPT2 = Blocks(
    layers=lambda model: model.h,
    embed=lambda model, ids, positions: model.wte(ids) + model.wpe(positions),
    project=_gpt2_project,
    finish=_gpt2_finish,
    scaling=lambda layer: layer.attn.scaling,
    rotary=False,
)


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention of queries [B, T, heads, D] on keys and values [B, key heads, K, D]: [B, T, heads * D].

    Args:
        query: As said.
        key: As said.
        value: As said.
        scaling: On the scores.
        mask: bool, broadcasting to [B, heads, T, K], True where a key is seen; None: all.
        causal: In place of a mask: query t sees keys 0..t.
    """
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[2] != key.shape[1],
    )
    return out.transpose(1, 2).flatten(2)
