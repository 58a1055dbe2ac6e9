"""A policy trained in this process by the exact gradient, whatever a run's algorithm: for the studies beside a run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rl_exit.config import RunConfig
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.policy_phase import train_policy
from rl_exit.trainers.steps import policy_settings


def exact_policy(config: RunConfig, store: Path, like: PolicyHeads, seed: int, **changes: Any) -> PolicyHeads:
    """Train fresh heads on a store.

    Args:
        config: Of the run.
        store: What the policy reads (:func:`rl_exit.trainers.policy_store.policy_store`).
        like: Heads of the wanted form; left as they are.
        seed: Of first weights and batches; torch's generator is left as it was.
        **changes: Settings in place of the run's (:class:`rl_exit.trainers.policy_phase.PolicyPhaseSettings`).
    """
    settings = replace(
        policy_settings(config, seed),
        algorithm="exact",
        runner="columnar",
        num_env_runners=0,
        num_learners=0,
        learner_gpu=False,
        overlap=False,
        # As the model has them: an earlier version's configuration may not say.
        width=like.width,
        shared=like.shared,
        **changes,
    )
    heads = copy.deepcopy(like)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads.reset_parameters()
    start = {name: value.detach().clone() for name, value in heads.state_dict().items()}
    heads.load_state_dict(train_policy(store, start, settings).weights)
    return heads
