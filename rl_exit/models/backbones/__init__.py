"""Layer-by-layer execution of Hugging Face backbones, one small adapter per family (docs/backbones.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from rl_exit.errors import ModelError, nearest
from rl_exit.models.backbones import bert_like, decoders, modernbert, relative
from rl_exit.models.backbones.base import Family, SteppedBackbone, deviation
from rl_exit.models.backbones.state import StepState, Tables, join_states

__all__ = [
    "SUPPORTED",
    "Family",
    "StepState",
    "SteppedBackbone",
    "Tables",
    "deviation",
    "join_states",
    "register_family",
    "step_backbone",
]

Factory = Callable[[Any], SteppedBackbone]

_BUILT_IN: tuple[tuple[Family, tuple[str, ...]], ...] = (
    (bert_like.BERT, ("bert",)),
    (bert_like.ROBERTA, ("roberta", "xlm-roberta", "camembert")),
    (bert_like.DISTILBERT, ("distilbert",)),
    (bert_like.ALBERT, ("albert",)),
    (bert_like.ELECTRA, ("electra",)),
    (relative.DEBERTA, ("deberta",)),
    (relative.DEBERTA_V2, ("deberta-v2",)),
    (relative.MPNET, ("mpnet",)),
    (modernbert.MODERNBERT, ("modernbert",)),
    (decoders.LLAMA, ("llama",)),
    (decoders.QWEN2, ("qwen2",)),
    (decoders.QWEN3, ("qwen3",)),
    (decoders.GPT2, ("gpt2",)),
    (decoders.GPT_NEOX, ("gpt_neox",)),
)

SUPPORTED: Mapping[str, tuple[str, ...]] = MappingProxyType({family.name: types for family, types in _BUILT_IN})
"""The built-in families by name, each with the model types (``config.model_type``) that it serves."""

_factories: dict[str, Factory] = {kind: family.build for family, types in _BUILT_IN for kind in types}


def step_backbone(model: Any) -> SteppedBackbone:
    """Return the stepped form of a base model, as `AutoModel` returns it, by its ``config.model_type``.

    Of a model with a head (say a causal language model) the base model is taken.

    Raises:
        ModelError: The family is unknown, or the configuration is one that its family cannot run exactly.
    """
    kind = getattr(model.config, "model_type", None)
    factory = _factories.get(kind) if kind else None
    if factory is None:
        raise ModelError(
            f"Backbones of type '{kind}' cannot be run layer by layer.{nearest(str(kind), _factories)} "
            f"Supported types: {', '.join(sorted(_factories))}. "
            "Another one can be added with rl_exit.models.backbones.register_family; docs/backbones.md shows how."
        )
    return factory(getattr(model, "base_model", model))


def register_family(model_type: str, factory: Factory) -> None:
    """Make :func:`step_backbone` accept models of one more type, or serve a known type by another adapter.

    Args:
        model_type: The ``model_type`` in the model's configuration.
        factory: Makes the stepped form of a base model of that type; usually ``Family(...).build``.
    """
    _factories[model_type] = factory
