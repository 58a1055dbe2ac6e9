"""What the families with rotary positions share: the tables, and layers that see a sliding window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KNOWN_LAYER_TYPES = ("full_attention", "sliding_attention")


def positions(hidden: Tensor) -> Tensor:
    """Return position ids 0..T-1 of a right-padded batch, int64 [1, T]."""
    return torch.arange(hidden.shape[1], device=hidden.device)[None]


def layer_reaches(config: Any, num_layers: int, sliding_reach: int | None) -> tuple[int | None, ...]:
    """Return the reach of each layer: `sliding_reach` where ``config.layer_types`` says so, otherwise unlimited."""
    types = getattr(config, "layer_types", None) or ("full_attention",) * num_layers
    return tuple(sliding_reach if kind == "sliding_attention" else None for kind in types[:num_layers])


def layer_type_objection(config: Any) -> str | None:
    """Object to layers of a type that is neither full nor sliding attention."""
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - set(KNOWN_LAYER_TYPES))
    if unknown:
        return f"its layer_types include {', '.join(unknown)}; supported are {' and '.join(KNOWN_LAYER_TYPES)}"
    return None
