"""LoRA adapters on the backbone for the task step (peft), in place; merged back, the saved model is plain again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_exit.errors import ModelError, nearest


def add_lora(
    model: Any,
    rank: int,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> None:
    """Put adapters on the backbone and leave only them and the exits trainable.

    ``W x`` becomes ``W x + (alpha / rank) B A dropout(x)`` with B = 0, so nothing changes until the first update. A is
    drawn from torch's default generator.

    Args:
        model: The model, changed in place.
        rank: Of A and B, >= 1.
        alpha: Scale of the adapter.
        dropout: On the adapter's input, in training.
        targets: Last parts of module names, e.g. ``("query", "value")``; None: all linear layers of the backbone.

    Raises:
        ModelError: A target that the backbone does not have, adapters that are there already, or a value out of range.
    """
    from peft import LoraConfig, inject_adapter_in_model

    base = model.backbone.model
    if has_lora(model):
        raise ModelError("the model carries LoRA adapters already; merge_lora(model) first")
    if rank < 1 or alpha <= 0 or not 0.0 <= dropout < 1.0:
        raise ModelError(f"LoRA: rank {rank}, alpha {alpha}, dropout {dropout}; accepted: from 1, over 0, 0 to below 1")
    linear = _linear_layers(base)
    last_parts = {name.rpartition(".")[2] for name in linear}
    for target in targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ModelError(
                f"LoRA target '{target}': the backbone has no linear layer of that name.{nearest(target, last_parts)} "
                f"Accepted: {', '.join(sorted(last_parts))}"
            )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # Full names, so that nothing outside these layers matches by its ending.
        target_modules=[n for n in linear if not targets or any(n == t or n.endswith(f".{t}") for t in targets)],
        fan_in_fan_out=_all_transposed(base, linear),
    )
    model.requires_grad_(False)
    inject_adapter_in_model(config, base)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.exits.requires_grad_(True)


def merge_lora(model: Any) -> None:
    """Add the adapters to the weights and remove them; every parameter is trainable again.

    Args:
        model: The model, changed in place.

    Raises:
        ModelError: There are none, or a merged weight is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.backbone.model
    layers = [(name, module) for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ModelError("the model carries no LoRA adapters")
    for name, module in layers:
        try:
            module.merge(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"the adapters of '{name}' cannot be merged: {error}") from error
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, module.get_base_layer())
    for attribute in ("peft_config", "active_adapters_", "_hf_peft_config_loaded"):
        base.__dict__.pop(attribute, None)
    model.requires_grad_(True)


def has_lora(model: Any) -> bool:
    """Whether the model carries adapters."""
    return any("lora_" in name for name, _ in model.named_parameters())


def _linear_layers(base: Any) -> list[str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def _all_transposed(base: Any, linear: Sequence[str]) -> bool:
    """GPT-2's Conv1D stores its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return bool(linear) and all(isinstance(base.get_submodule(name), Conv1D) for name in linear)
