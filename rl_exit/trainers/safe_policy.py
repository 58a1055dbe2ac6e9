"""Safe policy improvement: a learned policy decides only where it is shown to beat the confidence it would replace.

A few hundred instances can teach a policy what is true of them alone; the exits' own confidence, the probability of
what would be answered, has nothing to learn. So the policy is tried as a user meets it, on instances that neither the
exits nor it learnt on: those kept from the exits are parted into folds, and policies trained without a fold decide
about it. Where the area under their trade-off (:func:`rl_exit.comparison.figures.area_under`) is not larger than
confidence's, the model leaves by confidence, ``policy_rule = "confidence"``. The idea is that of high-confidence policy
improvement (Thomas, Theocharous and Ghavamzadeh, 2015), with cross-validation in place of importance weights: every
action's return is known here.

Folds are trained from fresh heads by the exact gradient whatever the run's algorithm: all ascend the same expected
return, and this one takes seconds. So what is judged is what can be learnt from these instances, not how far a sampled
training has come with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rl_exit.comparison.bootstrap import interval, resamples
from rl_exit.comparison.evidence import Split
from rl_exit.comparison.figures import full_depth, measure_at
from rl_exit.comparison.tally import cuts_of
from rl_exit.config import RunConfig
from rl_exit.envs.state_store import StateStore
from rl_exit.models.answers import confidence_log_odds
from rl_exit.models.policy import PolicyHeads
from rl_exit.seeding import derive_seed
from rl_exit.trainers.exact_policy import exact_policy
from rl_exit.trainers.policy_store import Answers, derive
from rl_exit.trainers.store_evaluation import exit_logits_of

FOLDS = 5
FEWEST = 4 * FOLDS  # instances; of fewer a trial says nothing
REPLICATES = 200
_SLACK = 1e-9  # points; no real difference is this small


@dataclass(frozen=True)
class PolicyTrial:
    """How a learned policy did against confidence on instances that were new to it.

    Attributes:
        better: Whether the area under its trade-off is larger.
        gain: Its area less that of confidence, in points of score (averaged over all shares of saved layers).
        interval: 95 % of the bootstrap replicates of ``gain``.
        instances: How many it was tried on.
        folds: In how many parts.
    """

    better: bool
    gain: float
    interval: list[float]
    instances: int
    folds: int

    def in_words(self) -> str:
        """One line for people."""
        low, high = self.interval
        rule = "the policy decides" if self.better else "the model leaves by confidence instead (policy.safe)"
        return (
            f"policy against confidence on {self.instances} instances new to it: {self.gain:+.2f} points of score "
            f"[{low:+.2f}, {high:+.2f}]; {rule}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def try_policy(
    config: RunConfig,
    kept: Path,
    like: PolicyHeads,
    metric: str,
    ids: npt.NDArray[np.int64] | None = None,
    answers: Answers | None = None,
    changes: dict[str, Any] | None = None,
    told: Callable[[int], None] = lambda _: None,
) -> PolicyTrial | None:
    """Cross-validate a run's policy against confidence.

    Args:
        config: Of the run.
        kept: State store of what the policy learns on, N instances.
        like: Heads of the run's form.
        metric: Of the task.
        ids: Instances that the exits were not fitted to: the policy is tried on these; None: on all.
        answers: [N, L, C], what the policy answers, each from heads that were not fitted to the instance; None: what
            the exits say.
        changes: Settings of the policy phase that the configuration does not have (a measured cost).
        told: Called with the folds done.

    Returns:
        The outcome; None where fewer than FEWEST instances are new to the exits.

    Raises:
        UserError: No space on the device.
    """
    store = StateStore.open(kept)
    every = np.arange(store.num_instances)
    new = every if ids is None else every[np.isin(store.ids, ids)]
    if len(new) < FEWEST:
        return None
    labels = np.array(store.labels)[new]
    said = (np.array(store.logits) if answers is None else answers)[new]
    odds = np.empty((len(new), store.num_layers - 1), dtype=np.float32)
    order = np.random.default_rng(derive_seed(config.seed, "safe", "folds")).permutation(len(new))
    inputs = config.policy.inputs
    for number, part in enumerate(np.array_split(order, FOLDS)):
        seed = derive_seed(config.seed, "safe", number)
        path = kept.with_name(f"{kept.name}-fold")
        try:
            derive(store, inputs, path, answers, np.setdiff1d(every, new[part]))
            heads = exact_policy(config, path, like, seed, **(changes or {}))
        finally:
            shutil.rmtree(path, ignore_errors=True)
        part.sort()
        odds[part] = exit_logits_of(store, heads, inputs, answers, new[part])
        told(number + 1)
    confidence = confidence_log_odds(torch.from_numpy(said[:, :-1])).numpy()
    cost = (changes or {}).get("cost")
    costs = None if cost is None else np.asarray(cost, dtype=np.float64)
    split = Split(np.array(store.ids)[new], labels, said.argmax(-1).astype(np.int64), store.num_classes, costs)
    areas = _areas(split, metric, config.seed, odds, confidence)
    gain = 100.0 * (areas[0] - areas[1])
    between = interval(gain)
    assert between is not None  # there are replicates
    return PolicyTrial(bool(gain[0] > _SLACK), float(gain[0]), between, len(new), FOLDS)


def _areas(split: Split, metric: str, seed: int, *scores: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float64]]:
    """Areas under the trade-offs of several scores on the same replicates, [1+R] each."""
    weights = resamples(split.num_instances, REPLICATES, seed)
    reference = full_depth(split, weights, metric)
    return [measure_at(one, cuts_of(one), split, weights, reference, metric).area for one in scores]
