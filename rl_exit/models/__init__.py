"""Multi-exit models on Hugging Face backbones: exits, policy heads, saving and loading.

Lazy: ``rl_exit.models.policy`` and ``rl_exit.models.exits`` are pure torch and read by sampling workers, so importing
them must not import transformers. Importing ``rl_exit.models.early_exit`` registers the model with transformers'
``AutoConfig``, ``AutoModel`` and ``AutoModelForSequenceClassification``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_exit.models.causal import EarlyExitCausalModel, TokenScores
    from rl_exit.models.causal_config import EarlyExitCausalConfig
    from rl_exit.models.early_exit import AllExits, EarlyExitConfig, EarlyExitModel, EarlyExitOutput, Prediction
    from rl_exit.models.exits import ExitHeads
    from rl_exit.models.lora import add_lora, merge_lora
    from rl_exit.models.policy import PolicyHeads

__all__ = [
    "AllExits",
    "EarlyExitCausalConfig",
    "EarlyExitCausalModel",
    "EarlyExitConfig",
    "EarlyExitModel",
    "EarlyExitOutput",
    "ExitHeads",
    "PolicyHeads",
    "Prediction",
    "TokenScores",
    "add_lora",
    "merge_lora",
]

_HOME = {
    "AllExits": "early_exit",
    "EarlyExitCausalConfig": "causal_config",
    "EarlyExitCausalModel": "causal",
    "TokenScores": "causal",
    "EarlyExitConfig": "early_exit",
    "EarlyExitModel": "early_exit",
    "EarlyExitOutput": "early_exit",
    "Prediction": "early_exit",
    "ExitHeads": "exits",
    "PolicyHeads": "policy",
    "add_lora": "lora",
    "merge_lora": "lora",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"rl_exit.models.{_HOME[name]}"), name)
    raise AttributeError(f"module 'rl_exit.models' has no attribute {name!r}")
