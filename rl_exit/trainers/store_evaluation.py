"""Evaluation of a policy on a finished state store: no backbone pass."""

from __future__ import annotations

import numpy as np
import torch

from rl_exit.envs.state_store import StateStore
from rl_exit.evaluation import SplitResult, evaluate
from rl_exit.models.answer_heads import AnswerHeads
from rl_exit.models.answers import Inputs
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.policy_store import Answers, stored_policy_input

BLOCK = 4096


def exit_logits_of(
    store: StateStore, policy: PolicyHeads, inputs: Inputs = "state", answers: Answers | None = None
) -> np.ndarray:
    """Log-odds of Exit of every instance: [N, L-1]; ``inputs`` is what the policy reads, ``answers`` its own."""
    blocks = []
    with torch.inference_mode():
        for start in range(0, store.num_instances, BLOCK):
            rows = np.arange(start, min(start + BLOCK, store.num_instances))
            blocks.append(policy(stored_policy_input(store, inputs, rows, answers)).float().numpy())
    return np.concatenate(blocks)


def answers_of(store: StateStore, heads: AnswerHeads | None) -> Answers | None:
    """What the policy answers at every layer, logits [N, L, C]; None where it says what the exits say."""
    if heads is None:
        return None
    every = np.arange(store.num_instances)
    parts = [every[start : start + BLOCK] for start in range(0, store.num_instances, BLOCK)]
    with torch.inference_mode():
        found = [heads(*map(torch.from_numpy, (store.states(rows), store.records(rows).logits))) for rows in parts]
    return np.concatenate([part.numpy() for part in found])


def evaluate_store(
    store: StateStore,
    policy: PolicyHeads,
    metric: str,
    threshold: float,
    inputs: Inputs = "state",
    answers: Answers | None = None,
) -> SplitResult:
    """Scores, curve and histograms of a policy on a split; ``inputs`` is what it reads, ``answers`` its own."""
    return evaluate(
        labels=store.labels,
        logits=store.logits,
        losses=store.losses,
        exit_logits=exit_logits_of(store, policy, inputs, answers),
        metric=metric,
        threshold=threshold,
        answers=answers,
    )
