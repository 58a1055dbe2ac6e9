"""RLlib's own algorithms, learners and losses on the exit policy: only module, environment and settings are ours.

They need a Ray cluster even without actors of their own (RLlib's runner group does).
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
from ray.rllib.algorithms.appo import APPO, APPOConfig
from ray.rllib.algorithms.impala import IMPALA, IMPALAConfig
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, LEARNER_RESULTS

from rl_exit.envs.sampler import linear_schedule
from rl_exit.trainers.rllib.episode_blocks import BlockEnvRunner, BlockModule, TrajectoryRows, block_connectors
from rl_exit.trainers.rllib.episodes import EXITS
from rl_exit.trainers.rllib.settings import PolicyAccess, StoreSettings, checked

# Names in RLlib's results and ours.
LEARNER_METRICS = {
    "gradients_default_optimizer_global_norm": "grad_norm",
    "vf_explained_var": "explained_variance",
    "policy_loss": "policy_loss",
    "vf_loss": "value_loss",
    "entropy": "action_entropy",
}


class CountExits(RLlibCallback):
    """Logs at which layer episodes end."""

    def on_episode_end(self, *, episode: Any, metrics_logger: Any = None, **kwargs: Any) -> None:
        """Count one exit."""
        info = episode.get_infos(-1)
        metrics_logger.log_value((EXITS, str(info["exit_layer"])), 1, reduce="sum")


class StockAlgorithm(PolicyAccess):
    """What a stock algorithm needs to serve the policy phase; mixed in before RLlib's class.

    The phase ends after as many trajectories as a columnar one would draw: epochs * N * K.
    """

    config: Any
    env_runner_group: Any
    iteration: int
    _drawn = 0

    def setup(self, config: Any) -> None:
        """Build RLlib's parts and give the module its first epsilon."""
        super().setup(config)  # type: ignore[misc]
        self.policy_loaded()

    def policy_loaded(self) -> None:
        """Send weights, and the epsilon of the moment, to the runners."""
        epsilon = linear_schedule(
            self.config.epsilon, self.config.epsilon_final, int(1000 * self.epochs_done / self.config.epochs), 1001
        )

        def explore_by(learner: Any) -> None:
            learner.module[DEFAULT_MODULE_ID].unwrapped().epsilon.fill_(epsilon)

        checked(self.learner_group.foreach_learner(explore_by))
        self.set_learning_rate()
        self._epsilon = epsilon
        self.env_runner_group.sync_weights(
            from_worker_or_learner_group=self.learner_group, inference_only=True, timeout_seconds=None
        )

    @property
    def epochs_done(self) -> float:
        """Trajectories so far in units of an epoch."""
        return min(self.config.epochs, self._drawn / (self.config.num_instances * self.config.trajectories))

    @property
    def updates_done(self) -> int:
        """Iterations so far."""
        return int(self.iteration)

    @property
    def finished(self) -> bool:
        """Whether enough trajectories have been drawn."""
        return bool(self.epochs_done >= self.config.epochs)

    def step(self) -> Any:
        """One iteration, with the policy phase's metrics beside RLlib's own."""
        started = time.perf_counter()
        layers = int(self.config.observation_space["layer"].n)
        while True:
            result: dict[str, Any] = super().step()  # type: ignore[misc]
            runners = result.get(ENV_RUNNER_RESULTS, {})
            counts = [runners.get(EXITS, {}).get(str(layer), 0) for layer in range(1, layers + 1)]
            exits = np.nan_to_num(np.array(counts, dtype=np.float64))  # nan: nothing logged in this iteration
            if exits.any():
                break
            time.sleep(0.005)  # asynchronous algorithms return at once when no runner is ready
        learner = result.get(LEARNER_RESULTS, {}).get(DEFAULT_MODULE_ID, {})
        number = exits.sum()
        self._drawn += int(number)
        share = exits / max(1.0, number)
        metrics = {
            "return": float(runners.get("episode_return_mean", np.nan)),
            "mean_exit_layer": float((share * np.arange(1, layers + 1)).sum()),
            **{f"exits_{layer}": float(value) for layer, value in enumerate(share, 1)},
            # No pass over the store: the entropy of the exits as drawn, over all instances together.
            "entropy": float(-(share[share > 0] * np.log(share[share > 0])).sum()),
            "trajectories": float(number),
            "trajectories_per_second": float(number) / (time.perf_counter() - started),
            "epsilon": self._epsilon,
        }
        values = {ours: float(learner.get(name, np.nan)) for name, ours in LEARNER_METRICS.items()}
        metrics |= {name: value for name, value in values.items() if np.isfinite(value)}
        self.iteration_metrics = metrics
        self.policy_loaded()
        return result


class StockPPOConfig(StoreSettings, PPOConfig):
    """RLlib's PPO with the policy phase's settings."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or StockPPO)
        self.add_store_settings()
        self.critic = True
        self.ppo_clip = 0.2
        self.ppo_epochs = 4
        self.value_coefficient = 0.5
        self.callbacks(CountExits)

    def plain(self, envs_per_runner: int) -> StockPPOConfig:
        """Sample with RLlib's stock runner, and hand the settings on under RLlib's names."""
        self.use_environment(envs_per_runner)
        # Rows of a batch of instances: K trajectories each, of about half the layers.
        rows = max(1, self.trajectories * int(self.observation_space["layer"].n) // 2)
        self.training(
            train_batch_size_per_learner=self.batch_size * rows,
            minibatch_size=min(self.minibatch_size, self.batch_size) * rows,
            num_epochs=self.ppo_epochs,
            clip_param=self.ppo_clip,
            vf_loss_coeff=self.value_coefficient,
            vf_clip_param=float("inf"),
            entropy_coeff=self.entropy,
            use_kl_loss=False,
            gamma=1.0,
            lambda_=1.0,
            grad_clip_by="global_norm",
        )
        self.reporting(log_gradients=True)
        self.debugging(seed=self.sampling_seed % 2**31)
        return self


class StockPPO(StockAlgorithm, PPO):
    """RLlib's PPO, learner and runner included: the reference for the columnar one."""

    @classmethod
    def get_default_config(cls) -> Any:
        """The settings' defaults."""
        return StockPPOConfig()


class VTraceSettings(StoreSettings):
    """What IMPALA's and APPO's settings share; mixed in before RLlib's."""

    critic: bool
    training: Any
    reporting: Any
    learners: Any

    def add_store_settings(self) -> None:
        """Set the defaults."""
        super().add_store_settings()
        self.critic = True
        self.value_coefficient = 0.5
        self.callbacks(CountExits)  # type: ignore[attr-defined]

    def columnar(self) -> Any:
        """Blocks of episodes from the block sampler, and the settings under RLlib's names."""
        layers = int(self.observation_space["layer"].n)
        self.env_runners(env_runner_cls=BlockEnvRunner)
        self.learners(
            learner_connector=partial(block_connectors, rows=TrajectoryRows, store_path=self.store_path),
            add_default_connectors_to_learner_pipeline=False,
        )
        # A batch has L rows for every episode (TrajectoryRows), which is also the piece that V-trace works on. RLlib
        # waits for as many calls of sample() as make up a batch, by the product of these numbers.
        self.env_runners(
            rollout_fragment_length=layers,
            num_envs_per_env_runner=min(self.batch_size, self.block_rows) * self.trajectories,
        )
        return self._named(self.batch_size * self.trajectories * layers)

    def plain(self, envs_per_runner: int) -> Any:
        """Episodes from RLlib's stock runner."""
        self.use_environment(envs_per_runner)
        # V-trace cuts the rows of a batch into pieces of this length; terminal steps stop it from crossing episodes.
        self.env_runners(rollout_fragment_length=64)
        # Rows of a batch of instances: K trajectories each, of about half the layers.
        rows = max(1, self.trajectories * int(self.observation_space["layer"].n) // 2)
        return self._named(self.batch_size * rows)

    def _named(self, rows: int) -> Any:
        self.training(
            train_batch_size_per_learner=rows,
            minibatch_size=None,  # one update from each batch
            vf_loss_coeff=self.value_coefficient,
            entropy_coeff=self.entropy,
            gamma=1.0,
            grad_clip_by="global_norm",
        )
        self.reporting(log_gradients=True, min_time_s_per_iteration=0)
        return self

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """The module that reads blocks of episodes."""
        spec = super().get_default_rl_module_spec()
        spec.module_class = BlockModule
        return spec

    def model_settings(self) -> dict[str, Any]:
        """The module's settings, with K."""
        return {**super().model_settings(), "trajectories": self.trajectories}


class StockIMPALAConfig(VTraceSettings, IMPALAConfig):
    """RLlib's IMPALA with the policy phase's settings."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or StockIMPALA)
        self.add_store_settings()


class StockIMPALA(StockAlgorithm, IMPALA):
    """RLlib's IMPALA: sampling and learning overlap, V-trace corrects for the lag."""

    @classmethod
    def get_default_config(cls) -> Any:
        """The settings' defaults."""
        return StockIMPALAConfig()


class StockAPPOConfig(VTraceSettings, APPOConfig):
    """RLlib's APPO with the policy phase's settings."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or StockAPPO)
        self.add_store_settings()
        self.ppo_clip = 0.2

    def _named(self, rows: int) -> Any:
        super()._named(rows)
        self.training(
            clip_param=self.ppo_clip,
            use_kl_loss=False,
            # Every batch once, in order, and the target policy no older than a batch or two: trajectories are cheap
            # here and a stale target is what held it back (docs/algorithms.md).
            use_circular_buffer=False,
            circular_buffer_num_batches=1,
            circular_buffer_iterations_per_batch=1,
            target_network_update_freq=1,
        )
        return self


class StockAPPO(StockAlgorithm, APPO):
    """RLlib's APPO: IMPALA with PPO's clipped objective against a target policy."""

    @classmethod
    def get_default_config(cls) -> Any:
        """The settings' defaults."""
        return StockAPPOConfig()
