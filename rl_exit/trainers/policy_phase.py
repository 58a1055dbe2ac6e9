"""Policy phase: train the exit policy on a state store with an RLlib algorithm.

``ray`` is imported when a phase starts, not with this module. Without actors (no remote runners, no remote learners,
the columnar runner) no Ray cluster is needed or started.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rl_exit.errors import RunError
from rl_exit.trainers.rllib.registry import check_algorithm

CHECKPOINT_SECONDS = 30.0
ATTEMPTS = 3  # with new learners, without progress between them
COLLAPSED = 0.99  # share of trajectories at one end that counts as collapse


logger = logging.getLogger(__name__)


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
    checkpoint: Path | None = None,
) -> PolicyResult:
    """Train the policy; everything started here is stopped before returning.

    The same settings and weights give the same result, bit for bit, however many remote runners draw the trajectories
    (on processors that compute alike).

    Args:
        store_path: State store of the training set.
        policy_weights: Where to start: state dict of :class:`~rl_exit.models.policy.PolicyHeads`.
        settings: See there.
        on_progress: Called after each iteration, once for each even if some are done again after a fault.
        checkpoint: Folder for the state of an interrupted phase, from which this one goes on if it is there; the caller
            removes it. None: none is kept.

    Raises:
        ConfigError: Unknown algorithm.
        RunError: No such store, weights or gradients that are not finite, all runners lost.
    """
    check_algorithm(settings.algorithm)
    phase = _Phase(store_path, policy_weights, settings, on_progress, checkpoint)
    weights = phase.go()
    _check_finite(weights)
    return PolicyResult(weights, phase.rows, tuple(collapse_warnings(phase.rows, settings)))


class _Phase:
    """One policy phase, over as many sets of learners as it takes; see :func:`train_policy`."""

    def __init__(
        self,
        store_path: str | Path,
        policy_weights: dict[str, Tensor],
        settings: PolicyPhaseSettings,
        on_progress: Callable[[PolicyProgress], None],
        checkpoint: Path | None,
    ) -> None:
        self.store_path, self.start, self.settings = store_path, policy_weights, settings
        self.on_progress, self.checkpoint = on_progress, checkpoint
        self.rows: list[dict[str, float]] = []
        self.snapshot: Any = None

    def go(self) -> dict[str, Tensor]:
        self._resume()
        losses, step = 0, -1.0
        while True:
            try:
                return self._train()
            except Exception as error:
                losses = losses + 1 if step == self._step() else 1
                step = self._step()
                if not _lost_learners(error) or losses >= ATTEMPTS:
                    raise
                logger.warning("learners were lost and are started anew: %s", str(error).splitlines()[0])

    def _step(self) -> float:
        return self.rows[-1]["step"] if self.rows else -1.0

    def _train(self) -> dict[str, Tensor]:
        algorithm = build_algorithm(self.store_path, self.settings)
        saved = time.monotonic()
        keeps = hasattr(algorithm, "snapshot")
        try:
            algorithm.load_policy(self.start)
            if self.snapshot is not None:
                algorithm.restore_snapshot(self.snapshot)
            while not algorithm.finished:
                algorithm.train()
                self._note(
                    PolicyProgress(algorithm.epochs_done, algorithm.updates_done, dict(algorithm.iteration_metrics))
                )
                due = self.checkpoint is not None and time.monotonic() - saved > CHECKPOINT_SECONDS
                if keeps and (due or self.settings.num_learners):
                    self.snapshot = algorithm.snapshot(self.rows)
                if keeps and due and self.checkpoint is not None:
                    self.snapshot.save(self.checkpoint)
                    saved = time.monotonic()
            return algorithm.policy_weights()
        finally:
            algorithm.stop()

    def _note(self, at: PolicyProgress) -> None:
        if at.step > self._step():  # what is done again after a loss is not told again
            self.rows.append({"epoch": at.epoch, "step": float(at.step), **at.metrics})
            self.on_progress(at)

    def _resume(self) -> None:
        """Go on from the snapshot on disk, if there is one."""
        if self.checkpoint is None or not self.checkpoint.is_dir():
            return
        from rl_exit.trainers.rllib.snapshot import PolicySnapshot

        self.snapshot = PolicySnapshot.load(self.checkpoint)
        for row in self.snapshot.rows if self.snapshot is not None else []:
            metrics = {name: value for name, value in row.items() if name not in ("epoch", "step")}
            self._note(PolicyProgress(row["epoch"], int(row["step"]), metrics))


def _lost_learners(error: Exception) -> bool:
    """Whether new learners may do better."""
    from ray.exceptions import RayError

    from rl_exit.trainers.rllib.algorithm import LearnersLost

    return isinstance(error, LearnersLost | RayError)


def build_algorithm(store_path: str | Path, settings: PolicyPhaseSettings) -> Any:
    """The RLlib algorithm that the settings describe, ready for ``train()``; the caller stops it."""
    from rl_exit.trainers.rllib.logs import quiet_rllib
    from rl_exit.trainers.rllib.registry import algorithm_class

    quiet_rllib()
    config = algorithm_class(settings.algorithm, settings.runner).get_default_config()
    config.open_store(str(store_path))
    config.debugging(log_sys_usage=False)  # nobody reads it, and its thread makes every end of a phase wait up to 0.7 s
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
