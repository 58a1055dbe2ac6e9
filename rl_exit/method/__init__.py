"""The mathematics of ConsistentEE: rewards, memorized layer, exit distribution, trajectory sampling; torch or numpy.

Notation: ``N`` instances, ``B`` batch, ``L`` layers numbered 1..L, ``H`` hidden size, ``C`` classes, ``K`` trajectories
per instance. Arrays that run over layers hold layer l at index l-1. ``pi`` has L-1 columns: at layer L exit is forced
and no action is credited to the policy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rl_exit.method.rewards import layer_cost, memorized_layer, rewards

if TYPE_CHECKING:
    from rl_exit.method.distribution import (
        action_entropy,
        exit_distribution,
        expected_return,
        log_exit_distribution,
        threshold_exit,
    )
    from rl_exit.method.gradients import folded_weights, importance_weights, policy_gradient_loss
    from rl_exit.method.sampling import Trajectories, advantages, exit_probability, explore, sample_trajectories

__all__ = [
    "Trajectories",
    "action_entropy",
    "advantages",
    "exit_distribution",
    "exit_probability",
    "expected_return",
    "explore",
    "folded_weights",
    "importance_weights",
    "layer_cost",
    "log_exit_distribution",
    "memorized_layer",
    "policy_gradient_loss",
    "rewards",
    "sample_trajectories",
    "threshold_exit",
]

_HOMES = {
    "distribution": (
        "action_entropy",
        "exit_distribution",
        "expected_return",
        "log_exit_distribution",
        "threshold_exit",
    ),
    "gradients": ("folded_weights", "importance_weights", "policy_gradient_loss"),
    "sampling": ("Trajectories", "advantages", "exit_probability", "explore", "sample_trajectories"),
}


def __getattr__(name: str) -> Any:
    """What needs torch is imported when asked for: store and samplers read what is numpy alone."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"rl_exit.method.{home}"), name)
    raise AttributeError(f"module 'rl_exit.method' has no attribute {name!r}")
