"""The columnar algorithms' common part: settings, set-up and the loop of sampling and learning.

One ``train()`` runs several updates (a tenth of an epoch by default), because RLlib's bookkeeping around an iteration
costs as much as an update.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE
from torch import Tensor

from rl_exit.envs.sampler import Block, BlockPlan, join, linear_schedule, take
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import ConfigError, RunError
from rl_exit.method import Trajectories
from rl_exit.trainers.rllib.batch import TrajectoryBatch
from rl_exit.trainers.rllib.learner import STATE_AFTER, STATS
from rl_exit.trainers.rllib.plain import PlainEnvRunner
from rl_exit.trainers.rllib.pool import ATTEMPTS, RESTORE_SECONDS, Draw
from rl_exit.trainers.rllib.runner import ColumnarEnvRunner
from rl_exit.trainers.rllib.settings import PolicyAccess, StoreSettings, checked
from rl_exit.trainers.rllib.snapshot import PolicySnapshot, copied, learner_state, restore_learner

EXIT_RESULTS = "exit_policy"


class LearnersLost(RunError):
    """A learner was lost; the phase can go on from its last snapshot with new ones."""


logger = logging.getLogger(__name__)


class ExitConfig(StoreSettings, AlgorithmConfig):
    """Settings of the columnar algorithms; plain values only, set with :meth:`exits`."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or ExitAlgorithm)
        self.add_store_settings()
        self.samplers = 0
        self.updates_per_iteration: int | None = None
        self.minibatch_size = 256
        self.lr = 1e-3
        self.grad_clip = 1.0
        self.env_runner_cls = ColumnarEnvRunner
        self._dont_auto_sync_env_runner_states = True

    @property
    def is_online(self) -> bool:
        """Whether RLlib builds its group of runners.

        Its constructor needs an object store, hence a Ray cluster. Sampling in this process needs neither: the
        algorithm builds the one runner itself, and a run without actors starts in milliseconds.
        """
        return self.num_env_runners > 0

    def columnar(self) -> ExitConfig:
        """Sample whole trajectories by blocks; runners elsewhere are sampling actors, which need no RLlib."""
        self.samplers = self.num_env_runners
        self.env_runners(num_env_runners=0)
        return self

    def plain(self, envs_per_runner: int) -> ExitConfig:
        """Sample with RLlib's stock runner on the environment, slowly; at least K sub-environments are needed.

        Raises:
            ConfigError: Fewer sub-environments than trajectories.
        """
        if envs_per_runner < self.trajectories:
            raise ConfigError(
                f"sampling.envs_per_runner is {envs_per_runner}; sampling.runner=rllib takes the {self.trajectories} "
                "trajectories of an instance side by side, so at least that many are needed"
            )
        self.use_environment(envs_per_runner)
        self.env_runners(env_runner_cls=PlainEnvRunner)
        return self


class ExitAlgorithm(PolicyAccess, Algorithm):
    """Base of the columnar algorithms.

    Sampling and learning alternate strictly, unless ``overlap`` is set and sampling actors draw: then the trajectories
    of the next update are drawn, with the weights before the present one, while this one is learnt. The lag of 1 is
    the same whatever the timing, and learners weight for it.
    """

    _runner: Any = None
    _ahead: tuple[Draw, int, float] | None = None
    _ahead_weights: dict[str, Any] | None = None

    @classmethod
    def get_default_config(cls) -> Any:
        """The settings' defaults."""
        return ExitConfig()

    def setup(self, config: Any) -> None:
        """Build learners and runners."""
        self._epoch = 0
        self._update = 0
        self._state: Any = None
        super().setup(config)
        store = StateStore.open(self.config.store_path)
        self.plan: BlockPlan = self.config.block_plan(store)
        self._num_layers = store.num_layers
        if not self.config.num_env_runners:
            # In one process the sampler uses the learner's own module and states: nothing is synced or read twice.
            shared: dict[str, Any] = {"samplers": self.config.samplers} if self.config.samplers else {}
            if self.learner_group.is_local:
                learner = checked(self.learner_group.foreach_learner(lambda learner: learner))[0]
                shared |= {"module": learner.exit_module, "reader": learner.reader}
            self._runner = self.config.env_runner_cls(config=self.config, worker_index=0, num_workers=0, **shared)
        self._shares_module = self._runner is not None and self.learner_group.is_local

    @property
    def env_runner(self) -> Any:
        """The runner in this process."""
        return self._runner

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self._epoch >= self.config.epochs

    @property
    def updates_done(self) -> int:
        """Updates since the start."""
        return self._epoch * self.plan.updates + self._update

    @property
    def epochs_done(self) -> float:
        """Passes over the store so far."""
        return self.updates_done / self.plan.updates

    def policy_loaded(self) -> None:
        """Runners must take the new weights over; what was drawn with the old ones is dropped."""
        self._state = self._ahead = self._ahead_weights = None

    def snapshot(self, rows: list[dict[str, float]]) -> PolicySnapshot:
        """Where this phase stands; between two calls of ``train()``."""
        number, tensors = checked(self.learner_group.foreach_learner(learner_state))[0]
        return PolicySnapshot(self._epoch, self._update, number, tensors, self._ahead_weights, rows)

    def restore_snapshot(self, snapshot: PolicySnapshot) -> None:
        """Go on from there, in a fresh algorithm with the same settings."""
        tensors = dict(snapshot.tensors)
        checked(self.learner_group.foreach_learner(partial(restore_learner, number=snapshot.number, tensors=tensors)))
        self._epoch, self._update = snapshot.epoch, snapshot.update
        self.policy_loaded()
        if snapshot.ahead is not None and not self.finished:
            self._ahead = self._submit(self.updates_done, dict(snapshot.ahead), self.updates_done - 1)

    def training_step(self) -> None:
        """The updates of one iteration; never past the end of an epoch."""
        started = time.perf_counter()
        plan, config = self.plan, self.config
        self.set_learning_rate()
        count = config.updates_per_iteration or -(-plan.updates // 10)
        count = min(count, plan.updates - self._update)
        totals: dict[str, float] = defaultdict(float)
        exits = np.zeros(self._num_layers, dtype=np.int64)
        stats: dict[str, float] = {}
        batch: TrajectoryBatch | None = None
        for number in range(count):
            before = time.perf_counter()
            batch = self._sample()
            between = time.perf_counter()
            stats = self._learn(batch, diagnose=number == count - 1)
            totals["sample_seconds"] += between - before
            totals["learn_seconds"] += time.perf_counter() - between
            drawn = batch.trajectories
            totals["trajectories"] += len(drawn)
            totals["env_steps"] += drawn.num_steps
            totals["return"] += float(drawn.reward.sum(dtype=np.float64))
            totals["lag"] += batch.lag / count
            exits += np.bincount(drawn.exit_layer.ravel(), minlength=self._num_layers + 1)[1:]
            self._update += 1
        if self._update >= plan.updates:
            self._epoch, self._update = self._epoch + 1, 0
        self.iteration_metrics = _summary(totals, exits, stats, time.perf_counter() - started)
        self.iteration_metrics["epsilon"] = batch.epsilon if batch else 0.0
        for name, value in self.iteration_metrics.items():
            self.metrics.log_value((EXIT_RESULTS, name), value, window=1)

    def _epsilon(self, number: int) -> float:
        """Exploration in the update of this number."""
        config = self.config
        return linear_schedule(config.epsilon, config.epsilon_final, number, config.epochs * self.plan.updates)

    def _sample(self) -> TrajectoryBatch:
        """The trajectories of the present update."""
        number = self.updates_done
        if self._runner is not None and self._runner.pool is not None:
            return self._sample_by_actors(number)
        epsilon, blocks = self._epsilon(number), self.plan.blocks(self._epoch, self._update)
        if self._runner is None:
            drawn = self._sample_remote(blocks, epsilon)
            return TrajectoryBatch(drawn, epsilon, len(drawn))
        keep: list[Tensor] | None = [] if self._shares_module and len(blocks) == 1 and not self.config.critic else None
        state = None if self._shares_module else self._weights()
        parts = self._runner.sample(blocks=blocks, epsilon=epsilon, state=state, keep=keep)
        drawn = join([part for _, part in parts])
        return TrajectoryBatch(drawn, epsilon, len(drawn), exit_logits=keep[0] if keep else None)

    def _sample_by_actors(self, number: int) -> TrajectoryBatch:
        """What the actors have drawn for this update; where sampling and learning overlap, the next is started."""
        pool = self._runner.pool
        draw, drawn_by, epsilon = self._ahead or self._submit(number)
        drawn = join(pool.collect(draw))
        last = self.config.epochs * self.plan.updates - 1
        self._ahead, self._ahead_weights = None, None
        if self.config.overlap and number < last:
            self._ahead = self._submit(number + 1)
        return TrajectoryBatch(drawn, epsilon, len(drawn), lag=number - drawn_by)

    def _submit(
        self, number: int, weights: dict[str, Any] | None = None, drawn_by: int | None = None
    ) -> tuple[Draw, int, float]:
        """Start drawing for an update, with the weights after ``drawn_by`` updates: default those of the moment."""
        if weights is None:
            if not self._shares_module:
                self._runner.set_state(self._weights())
            weights, drawn_by = dict(self._runner.weights()), self.updates_done
        assert drawn_by is not None  # given with the weights
        if drawn_by < number:
            self._ahead_weights = copied(weights)
        epsilon = self._epsilon(number)
        blocks = self.plan.blocks(*divmod(number, self.plan.updates))
        # One copy into the object store for all actors of a node.
        return self._runner.pool.submit(blocks, ray.put(weights), epsilon), drawn_by, epsilon

    def _sample_remote(self, blocks: list[Block], epsilon: float) -> Trajectories:
        """Spread blocks over the runners; those of one that died are drawn again by another, to the same result."""
        group = self.env_runner_group
        if not isinstance(self._state, ray.ObjectRef):
            self._state = ray.put(self._weights())
        done: dict[int, Trajectories] = {}
        deadline = time.monotonic() + RESTORE_SECONDS
        for attempt in range(ATTEMPTS):
            open_blocks = [block for block in blocks if block.number not in done]
            if not open_blocks:
                return join([done[block.number] for block in blocks])
            if attempt:
                logger.warning("drawing %d blocks again: a runner was lost", len(open_blocks))
                self.restore_env_runners(group)
            while not (ids := group.healthy_env_runner_ids()):
                if time.monotonic() > deadline:
                    raise RunError(f"all {self.config.num_env_runners} runners are lost and none came back")
                time.sleep(0.5)
                self.restore_env_runners(group)
            ids = ids[: len(open_blocks)]
            orders = [
                {"blocks": open_blocks[k :: len(ids)], "epsilon": epsilon, "state": self._state}
                for k in range(len(ids))
            ]
            results = group.foreach_env_runner(
                ["sample"] * len(ids), kwargs=orders, remote_worker_ids=ids, local_env_runner=False
            )
            done.update(pair for drawn in results for pair in drawn)
        numbers = [block.number for block in open_blocks]
        raise RunError(f"blocks {numbers} of epoch {self._epoch} could not be drawn in {ATTEMPTS} attempts")

    def _learn(self, batch: TrajectoryBatch, diagnose: bool) -> dict[str, float]:
        """One update of all learners; returns the first one's diagnostics."""
        group = self.learner_group
        wants_state = not self._shares_module
        if group.is_local:
            results = group.update(episodes=[batch], return_state=wants_state, diagnose=diagnose)
        else:
            results = group.update(
                episodes_refs=[ray.put([part]) for part in _parts(batch, len(group))],
                return_state=wants_state,
                diagnose=diagnose,
            )
        if len(results) < (1 if group.is_local else len(group)):
            raise LearnersLost(f"{len(results)} of {len(group)} learners answered; see the log of the cluster")
        first = results[0]
        if wants_state:
            self._state = next(result[STATE_AFTER] for result in results if STATE_AFTER in result)
        stats = dict(first[STATS])
        if not np.isfinite(stats["grad_norm"]):
            raise RunError(
                f"the gradient of the policy is not finite in epoch {self._epoch + 1}, update {self._update + 1}: "
                "lower policy.lr, or look for values that are not finite in the state store"
            )
        return stats

    def _weights(self) -> Any:
        """State that runners take over."""
        if self._state is None:
            self._state = self.learner_group.get_state(
                components=f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}", inference_only=True
            )[COMPONENT_LEARNER]
        return self._state

    def cleanup(self) -> None:
        """Stop what was started."""
        super().cleanup()
        if self._runner is not None:
            self._runner.stop()


def _parts(batch: TrajectoryBatch, learners: int) -> list[TrajectoryBatch]:
    """Equal parts by instance, one for each learner."""
    indices = np.array_split(np.arange(len(batch.trajectories.instance)), learners)
    return [replace(batch, trajectories=take(batch.trajectories, index), exit_logits=None) for index in indices]


def _summary(
    totals: dict[str, float], exits: np.ndarray[Any, Any], stats: dict[str, float], seconds: float
) -> dict[str, float]:
    """The iteration in figures; ``exits_l`` are shares of the trajectories."""
    number = totals["trajectories"]
    share = exits / max(1, number)
    return {
        "return": totals["return"] / number,
        "mean_exit_layer": float((share * np.arange(1, len(exits) + 1)).sum()),
        **{f"exits_{layer + 1}": float(value) for layer, value in enumerate(share)},
        **stats,
        "trajectories": float(number),
        "env_steps": float(totals["env_steps"]),
        "trajectories_per_second": number / seconds,
        "env_steps_per_second": totals["env_steps"] / seconds,
        "policy_lag": totals["lag"],
        "sample_share": totals["sample_seconds"] / max(1e-9, totals["sample_seconds"] + totals["learn_seconds"]),
    }
