"""The steps of a run that depend on what is learnt: labels of texts, or tokens of a decoder.

The alternation (:mod:`rl_exit.trainers.alternation`) does them in order and has the rest: markers, initialisation and
task step, the choice of the round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from rl_exit.config import RunConfig
from rl_exit.data.instances import Instances
from rl_exit.evaluation import SplitResult
from rl_exit.seeding import derive_seed
from rl_exit.trainers.hold_out import hold_out
from rl_exit.trainers.policy_phase import PolicyPhaseSettings
from rl_exit.trainers.run_directory import MetricLog, RunDirectory


class Steps(Protocol):
    """What a kind of task does in a run; every method may be called again after a fault.

    Attributes:
        builds_store: Whether :meth:`store` needs the workers' builders.
    """

    builds_store: bool

    def prepare(self) -> dict[str, Any]:
        """Write the tokenised instances of all splits, data/task.json and the model with fresh exits (init/start).

        Returns:
            ``sizes`` by split and ``num_layers``.
        """

    def store(self, number: int, model: Path) -> None:
        """Write what the policy phase of a round reads, of the exits of a model."""

    def policy(self, number: int, model: Path, log: MetricLog) -> dict[str, Any]:
        """Train the policy of a round and write the round's model.

        Returns:
            ``warnings`` and what else is worth keeping of it.
        """

    def measure_dev(self, number: int, floor: float) -> SplitResult:
        """The round's model on dev, at the threshold of the configuration or the one chosen here.

        Args:
            number: Round.
            floor: Exits are held against their own full depth, or this score if it is higher.
        """

    def finish(self, best: dict[str, Any]) -> dict[str, Any]:
        """Measure the best round's model and write evaluation.json, results.json and model/."""


def save_split(run: RunDirectory, split: str, instances: Instances, sizes: dict[str, int]) -> None:
    """Write the instances of a split; of ``train``, those that are kept for the policy apart.

    Args:
        run: The run.
        split: Name of the split.
        instances: All of its instances.
        sizes: Gets how many were written, by name.
    """
    c = run.config
    if split == "train" and c.policy.holdout:
        fitted, held = hold_out(len(instances), c.policy.holdout, derive_seed(c.seed, "holdout"))
        instances.take(held).save(run.instances("held"))
        if c.policy.instances == "all":
            instances.save(run.instances("all"))
        sizes["held"] = len(held)
        instances = instances.take(fitted)
    instances.save(run.instances(split))
    sizes[split] = len(instances)


def policy_source(run: RunDirectory) -> Path:
    """File of the instances that the policy learns on: those kept from the exits, where some were kept for it."""
    c = run.config
    return run.instances(c.policy.instances if c.policy.holdout else "train")


def policy_settings(config: RunConfig, seed: int) -> PolicyPhaseSettings:
    """The policy phase's plain values out of a configuration."""
    policy = config.policy.model_dump(exclude={"inputs", "answer", "answer_on", "holdout", "instances", "safe"})
    return PolicyPhaseSettings(
        algorithm=config.algorithm,
        # Of tokens whose store says "agrees" where others say "correct", it is the same reward.
        reward="correctness" if config.reward.name == "agreement" else config.reward.name,
        alpha=config.reward.alpha,
        runner=config.sampling.runner,
        num_env_runners=config.sampling.num_env_runners,
        envs_per_runner=config.sampling.envs_per_runner,
        transport=config.sampling.transport,
        overlap=config.sampling.overlap,
        num_learners=config.learners.num_learners,
        learner_gpu=config.learners.use_gpu,
        width=config.model.policy_width,
        seed=seed,
        **policy,
    )
