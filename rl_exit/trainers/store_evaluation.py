"""Evaluation of a policy on a finished state store: no backbone pass."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from rl_exit.envs.state_store import StateStore
from rl_exit.evaluation import SplitResult, evaluate
from rl_exit.models.answer_heads import AnswerHeads
from rl_exit.models.answers import Inputs, confidence_log_odds
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.policy_store import Answers, stored_policy_input

BLOCK = 4096


def exit_logits_of(
    store: StateStore,
    policy: PolicyHeads,
    inputs: Inputs = "state",
    answers: Answers | None = None,
    only: npt.NDArray[np.int64] | None = None,
) -> np.ndarray:
    """Log-odds of Exit: [N, L-1], or of some rows; ``inputs`` is what the policy reads, ``answers`` its own."""
    wanted = np.arange(store.num_instances) if only is None else only
    blocks = []
    with torch.inference_mode():
        for start in range(0, len(wanted), BLOCK):
            rows = wanted[start : start + BLOCK]
            blocks.append(policy(stored_policy_input(store, inputs, rows, answers)).float().numpy())
    return np.concatenate(blocks)


def deciding_logits(store: StateStore, model: EarlyExitModel, answers: Answers | None) -> np.ndarray:
    """Log-odds by which a model decides, [N, L-1]: its policy heads', or the confidence in what it would answer.

    Args:
        store: States and logits of the model's exits.
        model: The model.
        answers: [N, L, C] from :func:`answers_of`.
    """
    if model.config.policy_rule == "confidence":
        said = np.array(store.logits) if answers is None else answers
        return confidence_log_odds(torch.from_numpy(said[:, :-1])).numpy()
    return exit_logits_of(store, model.policy, model.config.policy_inputs, answers)


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
    store: StateStore, exit_logits: np.ndarray, metric: str, threshold: float, answers: Answers | None = None
) -> SplitResult:
    """Scores, curve and histograms on a split, from log-odds of Exit [N, L-1]; ``answers`` are those of the policy."""
    return evaluate(
        labels=store.labels,
        logits=store.logits,
        losses=store.losses,
        exit_logits=exit_logits,
        metric=metric,
        threshold=threshold,
        answers=answers,
    )
