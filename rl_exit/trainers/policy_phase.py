"""Policy phase: train the exit policy on a state store with an RLlib algorithm.

``ray`` is imported when a phase starts, not with this module. Without actors (no remote runners, no remote learners,
the columnar runner) no Ray cluster is needed or started.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rl_exit.errors import RunError
from rl_exit.trainers.rllib.registry import check_algorithm

COLLAPSED = 0.99  # share of trajectories at one end that counts as collapse


@dataclass(frozen=True)
class PolicyPhaseSettings:
    """Plain values of a policy phase; the meaning of each is in :mod:`rl_exit.config`.

    ``width`` and ``shared`` are those of the heads and must fit the weights given. ``learner_gpu`` gives each learner
    one GPU.
    """

    algorithm: str = "pg"
    epochs: int = 5
    batch_size: int = 256
    lr: float = 1e-3
    lr_final: float | None = None
    trajectories: int = 8
    baseline: str = "leave_one_out"
    epsilon: float = 0.1
    epsilon_final: float = 0.0
    entropy: float = 0.0
    clip: float = 1.0
    ppo_clip: float = 0.2
    ppo_epochs: int = 4
    minibatch_size: int = 256
    value_coefficient: float = 0.5
    width: int = 64
    shared: bool = False
    reward: str = "hardness"
    alpha: float = 0.05
    cost: tuple[float, ...] | None = None
    runner: Literal["columnar", "rllib"] = "columnar"
    num_env_runners: int = 0
    envs_per_runner: int = 64
    transport: Literal["auto", "path", "objects"] = "auto"
    overlap: bool = False
    num_learners: int = 0
    learner_gpu: bool = False
    seed: int = 0


@dataclass(frozen=True)
class PolicyProgress:
    """Where the phase stands after an iteration (about ten an epoch).

    Attributes:
        epoch: Epochs done, a fraction inside an epoch.
        step: Updates done.
        metrics: ``return`` (mean), ``mean_exit_layer``, ``exits_1``..``exits_L`` (shares), ``entropy`` (of the exit
            distribution, nats), ``grad_norm`` (before clipping), ``epsilon``, ``trajectories_per_second`` and others;
            ``explained_variance`` where there is a critic.
    """

    epoch: float
    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class PolicyResult:
    """Outcome of a phase.

    Attributes:
        weights: State dict of :class:`~rl_exit.models.policy.PolicyHeads`.
        rows: One per iteration: ``epoch``, ``step`` and the metrics.
        warnings: What looks wrong, with advice, in words.
    """

    weights: dict[str, Tensor]
    rows: list[dict[str, float]] = field(default_factory=list)
    warnings: tuple[str, ...] = ()


def train_policy(
    store_path: str | Path,
    policy_weights: dict[str, Tensor],
    settings: PolicyPhaseSettings,
    on_progress: Callable[[PolicyProgress], None] = lambda _: None,
) -> PolicyResult:
    """Train the policy; everything started here is stopped before returning.

    The same settings and weights give the same result, bit for bit, however many remote runners draw the trajectories
    (on processors that compute alike).

    Args:
        store_path: State store of the training set.
        policy_weights: Where to start: state dict of :class:`~rl_exit.models.policy.PolicyHeads`.
        settings: See there.
        on_progress: Called after each iteration.

    Raises:
        ConfigError: Unknown algorithm.
        RunError: No such store, weights or gradients that are not finite, all runners lost.
    """
    check_algorithm(settings.algorithm)
    rows: list[dict[str, float]] = []
    algorithm = build_algorithm(store_path, settings)
    try:
        algorithm.load_policy(policy_weights)
        while not algorithm.finished:
            algorithm.train()
            metrics = dict(algorithm.iteration_metrics)
            progress = PolicyProgress(algorithm.epochs_done, algorithm.updates_done, metrics)
            rows.append({"epoch": progress.epoch, "step": float(progress.step), **metrics})
            on_progress(progress)
        weights = algorithm.policy_weights()
    finally:
        algorithm.stop()
    _check_finite(weights)
    return PolicyResult(weights, rows, tuple(collapse_warnings(rows, settings)))


def build_algorithm(store_path: str | Path, settings: PolicyPhaseSettings) -> Any:
    """The RLlib algorithm that the settings describe, ready for ``train()``; the caller stops it."""
    from rl_exit.trainers.rllib.logs import quiet_rllib
    from rl_exit.trainers.rllib.registry import algorithm_class

    quiet_rllib()
    config = algorithm_class(settings.algorithm, settings.runner).get_default_config()
    config.open_store(str(store_path))
    config.env_runners(num_env_runners=settings.num_env_runners)
    config.learners(num_learners=settings.num_learners, num_gpus_per_learner=int(settings.learner_gpu))
    config.exits(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        lr_final=settings.lr_final,
        trajectories=settings.trajectories,
        epsilon=settings.epsilon,
        epsilon_final=settings.epsilon_final,
        entropy=settings.entropy,
        grad_clip=settings.clip,
        minibatch_size=settings.minibatch_size,
        width=settings.width,
        shared=settings.shared,
        reward=settings.reward,
        alpha=settings.alpha,
        cost=settings.cost,
        sampling_seed=settings.seed,
        transport=settings.transport,
        overlap=settings.overlap,
    )
    own = ("baseline", "ppo_clip", "ppo_epochs", "value_coefficient")
    config.exits(**{name: getattr(settings, name) for name in own if hasattr(config, name)})
    if settings.runner == "rllib":
        config.plain(settings.envs_per_runner)
    else:
        config.columnar()
    return config.build_algo()


def collapse_warnings(rows: list[dict[str, float]], settings: PolicyPhaseSettings) -> Iterator[str]:
    """What the last iteration says about the policy, in words."""
    if not rows:
        return
    last = rows[-1]
    layers = sum(name.startswith("exits_") for name in last)
    if last["exits_1"] > COLLAPSED:
        yield (
            f"the policy has collapsed: {last['exits_1']:.1%} of the trajectories leave at layer 1. Layers are too "
            f"dear: lower reward.alpha (now {settings.alpha:g}); if the first exit is that good, train a smaller model."
        )
    elif last[f"exits_{layers}"] > COLLAPSED:
        yield (
            f"the policy never leaves: {last[f'exits_{layers}']:.1%} of the trajectories go to layer {layers}. Raise "
            f"reward.alpha (now {settings.alpha:g}), or train the exits longer: leaving early costs more than it saves."
        )
    elif last.get("entropy", 1.0) < 1e-3 * math.log(max(2, layers)) and settings.epsilon_final == 0.0:
        yield (
            "the exit distribution is nearly deterministic, so further trajectories teach nothing: raise "
            f"policy.entropy (now {settings.entropy:g}) or policy.epsilon_final if the result is not good enough."
        )


def _check_finite(weights: dict[str, Tensor]) -> None:
    bad = [name for name, value in weights.items() if not bool(value.isfinite().all())]
    if bad:
        raise RunError(f"the policy's weights are not finite ({', '.join(bad)}): lower policy.lr")
