"""Static layer pruning: a copy of a model with the layers above a depth removed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from rl_exit.errors import ConfigError, ModelError
from rl_exit.models.backbones import step_backbone
from rl_exit.models.early_exit import EarlyExitModel

# Per layer in the configurations of some families.
_PER_LAYER = ("layer_types", "no_rope_layers")


def pruned(model: EarlyExitModel, depth: int) -> EarlyExitModel:
    """A model of the first ``depth`` layers and their exits, which answers as the whole one does at that depth.

    It never leaves early by itself (``threshold`` 1): its policy was made for the whole model. Its layers below can
    still be left by any criterion.

    Args:
        model: The whole model; unchanged.
        depth: Layers to keep, 2..L-1.

    Raises:
        ConfigError: Depth out of range.
        ModelError: The backbone's layers are not separate modules.
    """
    layers = model.num_layers
    if isinstance(depth, bool) or not isinstance(depth, int) or not 2 <= depth < layers:
        raise ConfigError(f"depth = {depth!r}; this model of {layers} layers can be cut to 2..{layers - 1}")
    base = copy.deepcopy(model.backbone.model)
    list_of_layers: Any = step_backbone(base).layer_modules()
    del list_of_layers[depth:]
    base.config.num_hidden_layers = depth
    for key in _PER_LAYER:
        if isinstance(value := getattr(base.config, key, None), (list, tuple)) and len(value) == layers:
            setattr(base.config, key, list(value)[:depth])
    backbone = step_backbone(base)
    if backbone.num_layers != depth:
        raise ModelError(f"this {backbone.family} backbone cannot be cut: {backbone.num_layers} layers are left")
    config = copy.deepcopy(model.config)
    inner = base.config.to_dict()
    config.backbone = {key: inner[key] for key in inner if key in model.config.backbone or key in _PER_LAYER}
    config.backbone |= {key: inner[key] for key in ("num_hidden_layers", "n_layer", "n_layers") if key in inner}
    config.threshold, config.operating_points = 1.0, {}
    small = EarlyExitModel(config, base)
    heads = {"exits.weight": depth, "exits.bias": depth, "policy.bias_in": depth - 1, "policy.bias_out": depth - 1}
    if not model.policy.shared:
        heads |= {"policy.weight_in": depth - 1, "policy.weight_out": depth - 1}
    kept = small.state_dict()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.startswith("backbone."):
                continue
            mine: Tensor = kept[name]
            mine.copy_(value[: heads[name]] if name in heads else _fitting(value, mine))
    small.tokenizer = model.tokenizer
    return small.eval()


def _fitting(value: Tensor, like: Tensor) -> Tensor:
    """A head's tensor whose first dimension may be the layers."""
    return value if value.shape == like.shape else value[: like.shape[0]]
