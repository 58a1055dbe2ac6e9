"""What is measured: sizes, the settings that all variants share, and how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rl_exit.envs.state_store import StateStore
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, build_algorithm
from rl_exit.trainers.rllib.registry import algorithm_class

BATCH, TRAJECTORIES, WIDTH, EPSILON, ENVIRONMENTS, PPO_EPOCHS = 256, 8, 64, 0.1, 64, 4
FOREVER = 1_000_000  # epochs
# So small that policies stay as they begin: then all variants draw from the same distribution, in every round.
LEARNING_RATE = 1e-9


@dataclass(frozen=True)
class Size:
    """A store to measure on.

    Attributes:
        num_instances: N.
        num_layers: L.
        hidden_size: H.
    """

    num_instances: int
    num_layers: int
    hidden_size: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the states."""
        return 4 * self.num_instances * self.num_layers * self.hidden_size

    @property
    def rows(self) -> int:
        """Steps of the trajectories of one batch under the initial policy, whose exit layer is uniform over 1..L."""
        return BATCH * TRAJECTORIES * (self.num_layers + 1) // 2


SIZES = (Size(20_000, 12, 768), Size(18_000, 6, 384))


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        repetitions: Rounds of every comparison that count.
        batches: Batches in a repetition of the fast variants.
        stock_steps: Environment steps in a repetition of RLlib's runner.
        stock_share: Share of the batch that RLlib's PPO gets (its time is proportional; the ratio is one of rates).
        growth: The scaling compares N/10 with N (-1) or N with 10 N (1) instances of the last size.
    """

    repetitions: int = 7
    batches: int = 40
    stock_steps: int = 4096
    stock_share: float = 1.0
    growth: int = 1


QUICK = Effort(repetitions=5, batches=20, stock_steps=1024, stock_share=0.25, growth=-1)


def algorithm(name: str, store: StateStore, **changes: Any) -> Any:
    """One of our algorithms with the default settings but for constant epsilon and policy; the caller stops it."""
    settings = PolicyPhaseSettings(
        algorithm=name,
        epochs=FOREVER,
        lr=LEARNING_RATE,
        batch_size=BATCH,
        trajectories=TRAJECTORIES,
        width=WIDTH,
        epsilon=EPSILON,
        epsilon_final=EPSILON,
        ppo_epochs=PPO_EPOCHS,
        minibatch_size=BATCH,
        **changes,
    )
    return build_algorithm(store.path, settings)


def pg_config(store: StateStore, **changes: Any) -> Any:
    """The RLlib configuration of the same PG, for settings that the policy phase does not have."""
    config = algorithm_class("pg").get_default_config()
    shared = {
        "epochs": FOREVER,
        "lr": LEARNING_RATE,
        "batch_size": BATCH,
        "trajectories": TRAJECTORIES,
        "width": WIDTH,
        "epsilon": EPSILON,
        "epsilon_final": EPSILON,
    }
    config.open_store(str(store.path)).exits(**{**shared, **changes})
    return config
