"""What all algorithms of the policy phase share, columnar or stock: settings, and access to the policy."""

from __future__ import annotations

from typing import Any

from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor

from rl_exit.envs.episode import episode_spaces
from rl_exit.envs.sampler import BLOCK_ROWS, BlockPlan, BlockSampler, RewardTable, StateReader
from rl_exit.envs.state_store import StateStore
from rl_exit.trainers.rllib.module import ExitModule
from rl_exit.trainers.rllib.pool import SamplerPool

ENVIRONMENT = "rl_exit.envs:rl_exit/EarlyExit-v0"
"""Gymnasium's id, with the module that registers it (in every process)."""


class StoreSettings:
    """Settings that concern the state store and its trajectories; mixed in before RLlib's ``AlgorithmConfig``."""

    observation_space: Any
    environment: Any
    env_runners: Any

    def add_store_settings(self) -> None:
        """Set the defaults; the constructor's last call."""
        self.store_path = ""
        self.reward = "hardness"
        self.alpha = 0.05
        self.cost: tuple[float, ...] | None = None
        self.trajectories = 8
        self.batch_size = 256
        self.block_rows = BLOCK_ROWS
        self.transport = "auto"
        self.overlap = False
        self.epochs = 5
        self.epsilon = 0.0
        self.epsilon_final = 0.0
        self.lr_final: float | None = None
        self.entropy = 0.0
        self.width = 64
        self.shared = False
        self.critic = False
        self.sampling_seed = 0
        # RLlib would seed the process's global generators; every draw here has a generator of its own.
        self.seed = None
        self.create_local_env_runner = False
        self.restart_failed_env_runners = True
        self.log_level = "ERROR"

    def exits(self, **settings: Any) -> Any:
        """Set attributes by name.

        Raises:
            ValueError: A name that is no setting.
        """
        for name, value in settings.items():
            if not hasattr(self, name):
                raise ValueError(f"{type(self).__name__} has no setting '{name}'")
            setattr(self, name, value)
        return self

    def open_store(self, path: str) -> Any:
        """Read states and sizes from a store."""
        store = StateStore.open(path)
        self.store_path = str(store.path)
        self.num_instances = store.num_instances
        observations, actions = episode_spaces(store.num_layers, store.hidden_size)
        self.environment(observation_space=observations, action_space=actions)
        return self

    def use_environment(self, envs_per_runner: int) -> None:
        """Sample from the Gymnasium environment, so many side by side in a runner."""
        told = {"source": self.store_path, "reward": self.reward, "alpha": self.alpha}
        self.environment(ENVIRONMENT, env_config=told if self.cost is None else {**told, "cost": self.cost})
        self.env_runners(num_envs_per_env_runner=envs_per_runner, gym_env_vectorize_mode="vector_entry_point")

    def open_sampler(self, reader: StateReader | None = None) -> BlockSampler:
        """The sampler that these settings describe; over the store given, or opened."""
        reader = reader or StateReader(StateStore.open(self.store_path))
        table = RewardTable(reader.store, self.reward, self.alpha, self.cost)
        return BlockSampler(reader, table, self.sampling_seed, self.trajectories)

    def block_plan(self, store: StateStore | None = None) -> BlockPlan:
        """The order of the instances that these settings describe."""
        return BlockPlan.over(
            store or StateStore.open(self.store_path), self.batch_size, self.sampling_seed, self.block_rows
        )

    def start_samplers(self, count: int, store: StateStore, plan: BlockPlan) -> SamplerPool:
        """Sampling actors that draw as :meth:`open_sampler`'s sampler does."""
        return SamplerPool(
            count,
            store,
            plan.groups,
            transport=self.transport,
            seed=self.sampling_seed,
            trajectories=self.trajectories,
            reward=self.reward,
            alpha=self.alpha,
            cost=self.cost,
        )

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """Policy heads, with value heads for algorithms that have a critic."""
        return RLModuleSpec(
            module_class=ExitModule,
            observation_space=self.observation_space,
            action_space=self.action_space,  # type: ignore[attr-defined]
            model_config=self.model_settings(),
        )

    def model_settings(self) -> dict[str, Any]:
        """``model_config`` of :class:`~rl_exit.trainers.rllib.module.ExitModule`."""
        return {
            "num_layers": int(self.observation_space["layer"].n),
            "hidden_size": int(self.observation_space["state"].shape[0]),
            "width": self.width,
            "shared": self.shared,
            "critic": self.critic,
            "seed": self.sampling_seed,
        }


class PolicyAccess:
    """What every algorithm of the policy phase offers besides RLlib's interface; mixed in before ``Algorithm``."""

    config: Any
    iteration_metrics: dict[str, float]
    learner_group: Any
    _storage: Any

    def _setup_logdir(self) -> None:
        # Tune gives a directory; without it nothing is written (RLlib's default is a new folder in the user's home).
        self._logdir = None
        if self._storage:
            super()._setup_logdir()  # type: ignore[misc]

    def load_policy(self, weights: dict[str, Tensor]) -> None:
        """Start from the weights of :class:`~rl_exit.models.policy.PolicyHeads`."""

        def load(learner: Any) -> None:
            learner.module[DEFAULT_MODULE_ID].unwrapped().load_policy(weights)

        checked(self.learner_group.foreach_learner(load))
        self.policy_loaded()

    def policy_loaded(self) -> None:
        """Called when the learners have new weights from outside."""

    def set_learning_rate(self) -> None:
        """Take the rate of the moment, on the straight line from ``lr`` to ``lr_final`` where there is one."""
        config = self.config
        if config.lr_final is None:
            return
        rate = config.lr + (config.lr_final - config.lr) * min(1.0, self.epochs_done / config.epochs)

        def take(learner: Any) -> None:
            for _, optimizer in learner.get_optimizers_for_module(DEFAULT_MODULE_ID):
                for group in optimizer.param_groups:
                    group["lr"] = rate

        checked(self.learner_group.foreach_learner(take))

    def policy_weights(self) -> dict[str, Tensor]:
        """Copies of the policy's weights, plain tensors."""

        def read(learner: Any) -> dict[str, Tensor]:
            return learner.module[DEFAULT_MODULE_ID].unwrapped().policy_weights()

        return checked(self.learner_group.foreach_learner(read))[0]

    @property
    def epochs_done(self) -> float:
        """Passes over the store so far, a fraction inside a pass."""
        raise NotImplementedError

    @property
    def updates_done(self) -> int:
        """Updates since the start."""
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        """Whether all passes are done."""
        raise NotImplementedError


def checked(results: Any) -> list[Any]:
    """Results of ``foreach_learner``, which hands errors back as values."""
    found = [result.get() for result in results.result_or_errors]
    for value in found:
        if isinstance(value, Exception):
            raise value
    return found
