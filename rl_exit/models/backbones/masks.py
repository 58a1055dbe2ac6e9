"""Attention masks for right-padded batches, built once per batch and shared by all layers.

They are built here and not by ``transformers.masking_utils`` for two reasons. Its function signatures changed between
releases of transformers 5, and it does not know that a batch is padded on the right only. That knowledge is worth time:
in a causal model no token sees anything to its right, so right padding needs no mask at all.

Only real tokens are promised to be right. What a padded position holds is finite, but otherwise undefined.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rl_exit.errors import ModelError

MaskForm = Literal["interface", "additive", "boolean"]
"""What a family's layers accept as mask.

``interface``: the attention interface of transformers; a boolean mask or none with sdpa, an additive one with eager.
``additive``: own attention code that adds the mask, or none, to the scores. ``boolean``: own code that needs a mask.
"""

ATTENTIONS = ("sdpa", "eager")


def attention_of(config: Any) -> str:
    """Return the attention implementation that the model will use, ``"sdpa"`` or ``"eager"``.

    Relies on ``config._attn_implementation``, which ``set_attn_implementation`` of transformers keeps current.

    Raises:
        ModelError: Another implementation is chosen (flash and flex attention take masks of other kinds).
    """
    name = getattr(config, "_attn_implementation", None) or "eager"
    if name not in ATTENTIONS:
        raise ModelError(
            f"Attention implementation '{name}' cannot be run layer by layer. Accepted: {', '.join(ATTENTIONS)}. "
            'Load the backbone with attn_implementation="sdpa" (or call model.set_attn_implementation("sdpa")).'
        )
    return name


def attention_mask_for(
    length: int,
    real: Tensor | None,
    *,
    device: torch.device,
    causal: bool,
    reach: int | None,
    form: MaskForm,
    eager: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """Build the mask of the layers with one reach.

    Args:
        length: T.
        real: Which positions hold tokens and no padding, bool [B, T]; None: all do.
        device: Of the mask.
        causal: Whether a token sees only itself and what is to its left.
        reach: Largest distance to a visible token (sliding window); None for no limit.
        form: What the layers accept.
        eager: With form ``interface``: whether attention is the eager one.
        dtype: Of an additive mask.

    Returns:
        A mask that broadcasts to [B, heads, T, T], or None where none is needed.
    """
    limited = reach is not None and reach < length - 1
    # Without a mask, sdpa attention in a causal model is causal by itself; eager attention never is.
    explicit = causal and (limited or eager or form != "interface")
    visible = _near(length, device, causal=causal, reach=reach) if explicit or limited else None
    if real is not None and not causal:
        real = real[:, None, None, :]
        # A query that saw no key at all would give NaN and spoil later layers: padding may see itself, or, where there
        # is no window, the first token (which is padding in an empty row).
        if visible is None:
            visible = real | (torch.arange(length, device=device) == 0)
        else:
            visible = (visible & real) | torch.eye(length, dtype=torch.bool, device=device)
    if form == "boolean":
        return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device) if visible is None else visible
    if visible is None or (form == "interface" and not eager):
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def _near(length: int, device: torch.device, *, causal: bool, reach: int | None) -> Tensor:
    """Return which keys a query sees by position alone, bool [1, 1, T, T]."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    near = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if reach is not None:
        near = near & (distance.abs() <= reach)
    return near[None, None]
