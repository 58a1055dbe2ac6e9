"""Evaluation of a policy on a finished state store: no backbone pass."""

from __future__ import annotations

import numpy as np
import torch

from rl_exit.envs.state_store import StateStore
from rl_exit.evaluation import SplitResult, evaluate
from rl_exit.models.answer_pool import AnswerPool
from rl_exit.models.answers import Inputs
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.policy_store import stored_answers, stored_policy_input

BLOCK = 4096


def exit_logits_of(
    store: StateStore, policy: PolicyHeads, inputs: Inputs = "state", pool: AnswerPool | None = None
) -> np.ndarray:
    """Log-odds of Exit of every instance: [N, L-1]; ``inputs`` is what the policy reads, ``pool`` what it answers."""
    blocks = []
    with torch.inference_mode():
        for start in range(0, store.num_instances, BLOCK):
            rows = np.arange(start, min(start + BLOCK, store.num_instances))
            blocks.append(policy(stored_policy_input(store, inputs, rows, pool)).float().numpy())
    return np.concatenate(blocks)


def answers_of(store: StateStore, pool: AnswerPool | None) -> np.ndarray:
    """What the policy answers at every layer: logits [N, L, C]."""
    if pool is None:
        return np.asarray(store.logits)
    every = np.arange(store.num_instances)
    blocks = [every[start : start + BLOCK] for start in range(0, store.num_instances, BLOCK)]
    return np.concatenate([stored_answers(store, rows, pool).numpy() for rows in blocks])


def evaluate_store(
    store: StateStore,
    policy: PolicyHeads,
    metric: str,
    threshold: float,
    inputs: Inputs = "state",
    pool: AnswerPool | None = None,
) -> SplitResult:
    """Scores, curve and histograms of a policy on a split; ``inputs`` is what it reads, ``pool`` what it answers."""
    return evaluate(
        labels=store.labels,
        logits=store.logits,
        losses=store.losses,
        exit_logits=exit_logits_of(store, policy, inputs, pool),
        metric=metric,
        threshold=threshold,
        answers=None if pool is None else answers_of(store, pool),
    )
