"""A layer of BERT, RoBERTa and its kin or ELECTRA, without its twenty modules' calls, where no gradient is wanted.

The same operations on the same weights in the same order, so the same numbers; what is left out is Python: at batch
size 1 on a CPU a seventh of MiniLM's layer, since a layer sweeps the caches and each module finds its own code cold.
A layer of which a part has an adapter, a hook or a forward of its own or is in training, and one that is compiled, runs
as a module.

Of rows padded in a batch on a CPU, where every token costs, everything but the attention runs on the real tokens alone;
the numbers are then the same to rounding.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation

CAPTURING = "transformers.utils.output_capturing"
HOME = "transformers.models."
FAMILIES = ("bert", "roberta", "xlm_roberta", "camembert", "electra")
FULL = 0.96
"""Share of real tokens above which padding is computed along: to do without it copies the states six times. Measured on
MiniLM with one thread: with 5 to 7 % of padding (SST-2, batch size 128) a pass takes 2 % less time, with 2 to 3 % as
long."""
PARTS = ("Layer", "Attention", "SelfAttention", "SelfOutput", "Intermediate", "Output")


def quick_layer(layer: Any, hidden: Tensor, mask: Tensor | None) -> Tensor | None:
    """Run a post-norm layer with scaled dot-product attention.

    Args:
        layer: A module of ``encoder.layer``.
        hidden: [B, T, H].
        mask: bool, broadcasting to [B, heads, T, T], True where a key is seen; None: all are.

    Returns:
        [B, T, H], anything finite at padding; None: this layer must be called as the module that it is.
    """
    parts = None if torch.is_grad_enabled() else _parts(layer)
    if parts is None:
        return None
    own, activation, linears, norms = parts
    query, key, value, joined, wide, narrow = linears
    rows, tokens, size = hidden.shape
    shape = (rows, tokens, own.num_attention_heads, own.attention_head_size)
    ragged = _ragged(mask, rows, tokens) if hidden.is_cpu else None
    states = hidden if ragged is None else hidden.reshape(-1, size).index_select(0, ragged.real)
    queries, keys, values = (
        (part if ragged is None else part.index_select(0, ragged.back)).view(shape).transpose(1, 2)
        for part in (_linear(query, states), _linear(key, states), _linear(value, states))
    )
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=own.scaling)
    attended = attended.transpose(1, 2).reshape(rows, tokens, -1)
    if ragged is not None:
        attended = attended.view(rows * tokens, -1).index_select(0, ragged.real)
    states = _norm(norms[0], _linear(joined, attended) + states)
    states = _norm(norms[1], _linear(narrow, activation.act(_linear(wide, states))) + states)
    return states if ragged is None else states.index_select(0, ragged.back).view(rows, tokens, -1)


def runs_quick(layer: Any) -> bool:
    """Whether :func:`quick_layer` runs a layer, where no gradient is wanted."""
    return _parts(layer) is not None


class _Parts(NamedTuple):
    """What a layer is made of: its self-attention, activation, six linear parts and two norms, in order of use."""

    attention: Any
    activation: Any
    linears: tuple[nn.Module, ...]
    norms: tuple[nn.Module, ...]


def _parts(layer: Any) -> _Parts | None:
    """None: something in it is not as transformers makes it, so it must be called as the module that it is."""
    if layer.training or layer._compiled_call_impl is not None:
        return None
    kind: Any = type(layer)
    kinds = _kinds(kind)
    if kinds is None or layer.chunk_size_feed_forward:
        return None
    inside = layer._modules
    attention, intermediate, output = inside["attention"], inside["intermediate"], inside["output"]
    own, after = attention._modules["self"], attention._modules["output"]
    containers = (layer, attention, own, after, intermediate, output)
    linears = (
        *(own._modules["query"], own._modules["key"], own._modules["value"]),
        *(after._modules["dense"], intermediate._modules["dense"], output._modules["dense"]),
    )
    norms = after._modules["LayerNorm"], output._modules["LayerNorm"]
    dropouts = own._modules["dropout"], after._modules["dropout"], output._modules["dropout"]
    activation = intermediate._modules.get("intermediate_act_fn")
    if not (
        all(type(part) is kind and untouched(part) for part, kind in zip(containers, kinds, strict=True))
        and all(type(part) is nn.Linear and untouched(part) and _whole(part) for part in linears)
        and all(type(part) is nn.LayerNorm and untouched(part) and _whole(part) for part in norms)
        and all(type(part) is nn.Dropout and untouched(part) for part in dropouts)
        and type(activation) is GELUActivation
        and untouched(activation)
    ):
        return None
    return _Parts(own, activation, linears, norms)


class _Ragged(NamedTuple):
    """Where the real tokens of padded rows are.

    Attributes:
        real: Their places among all B T, int64 [N].
        back: For each of the B T places, which of the N stands there: itself, or at padding the one before it.
    """

    real: Tensor
    back: Tensor


def _ragged(mask: Tensor | None, rows: int, tokens: int) -> _Ragged | None:
    """None: there is too little padding to do without it, or the mask hides something else."""
    if mask is None or mask.shape != (rows, 1, 1, tokens) or mask.dtype != torch.bool:
        return None
    seen = mask.numpy().reshape(-1)
    places = seen.nonzero()[0]
    if not 0 < len(places) <= FULL * len(seen):
        return None
    return _Ragged(torch.from_numpy(places), torch.from_numpy(np.maximum(np.cumsum(seen) - 1, 0)))


def untouched(part: Any) -> bool:
    """Whether calling a module's function passes nothing by that somebody has hung on it."""
    if part.training or part._forward_pre_hooks or "forward" in part.__dict__:
        return False
    # transformers leaves its own for good after a pass with output_hidden_states; outside of one they do nothing.
    hooks = part._forward_hooks
    return not hooks or all(getattr(hook, "__module__", "") == CAPTURING for hook in hooks.values())


def _whole(part: Any) -> bool:
    """Whether weight and bias are where modules keep them (not so in replicas, or under a parametrisation)."""
    return part._parameters.keys() >= {"weight", "bias"}


def _linear(part: nn.Module, states: Tensor) -> Tensor:
    weights: Any = part._parameters
    return F.linear(states, weights["weight"], weights["bias"])


def _norm(part: nn.Module, states: Tensor) -> Tensor:
    norm: Any = part
    weights = norm._parameters
    return F.layer_norm(states, norm.normalized_shape, weights["weight"], weights["bias"], norm.eps)


@cache
def _kinds(layer: type) -> tuple[type, ...] | None:
    """Classes of layer, attention, self-attention, its output, intermediate and output; None: another kind of layer."""
    home, name = layer.__module__, layer.__name__
    if home.removeprefix(HOME).partition(".")[0] not in FAMILIES or not home.startswith(HOME):
        return None
    prefix = name.removesuffix("Layer")
    found = [getattr(sys.modules[home], f"{prefix}{part}", None) for part in PARTS]
    return tuple(kind for kind in found if kind is not None) if found[0] is layer and None not in found else None
