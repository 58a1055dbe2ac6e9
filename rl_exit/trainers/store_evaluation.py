"""Evaluation of a policy on a finished state store: no backbone pass."""

from __future__ import annotations

import numpy as np
import torch

from rl_exit.envs.state_store import StateStore
from rl_exit.evaluation import SplitResult, evaluate
from rl_exit.models.answers import Inputs
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.policy_store import stored_policy_input

BLOCK = 4096


def exit_logits_of(store: StateStore, policy: PolicyHeads, inputs: Inputs = "state") -> np.ndarray:
    """Log-odds of Exit of every instance: [N, L-1]; ``inputs`` is what the policy reads."""
    blocks = []
    with torch.inference_mode():
        for start in range(0, store.num_instances, BLOCK):
            rows = np.arange(start, min(start + BLOCK, store.num_instances))
            blocks.append(policy(stored_policy_input(store, inputs, rows)).float().numpy())
    return np.concatenate(blocks)


def evaluate_store(
    store: StateStore, policy: PolicyHeads, metric: str, threshold: float, inputs: Inputs = "state"
) -> SplitResult:
    """Scores, curve and histograms of a policy on a split; ``inputs`` is what the policy reads."""
    return evaluate(
        labels=store.labels,
        logits=store.logits,
        losses=store.losses,
        exit_logits=exit_logits_of(store, policy, inputs),
        metric=metric,
        threshold=threshold,
    )
