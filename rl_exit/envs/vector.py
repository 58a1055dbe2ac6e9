"""Many episodes at once over a state store: the vector form of :class:`EarlyExitEnv`, with the same semantics.

All sub-environments advance in a handful of array operations; states are gathered for all of them together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rl_exit.envs.episode import (
    CONTINUE,
    EXIT,
    Epochs,
    Observation,
    RewardFunction,
    check_reward,
    describe_rows,
    episode_spaces,
)
from rl_exit.envs.shards import BoolArray, FloatArray, IntArray
from rl_exit.envs.sources import Outcome
from rl_exit.envs.state_store import StateStore
from rl_exit.method.rewards import rewards


class EarlyExitVectorEnv(VectorEnv[Observation, npt.NDArray[np.integer], npt.NDArray[Any]]):
    """E episodes side by side, NEXT_STEP autoreset: the step after an end ignores the action and begins an episode.

    All sub-environments draw from one shuffled pass over the instances, so a pass is complete when together they have
    taken each instance once. ``reset(options={"instances": rows})`` gives each sub-environment its instance for the
    episode that begins; later ones are drawn. Observations, infos and rewards are those of E scalar environments on the
    same instances in a ``gymnasium.vector.SyncVectorEnv`` (a test holds them together).

    Args:
        num_envs: E.
        source: The path of a state store, or an open one.
        reward: ``"hardness"`` (Eq. 4), ``"vanilla"`` (Eq. 3), ``"correctness"``, ``"fidelity"``, or a function of the
            :class:`Outcome`.
        alpha: Price of a layer in nats.
        cost: [L], cost of leaving at each layer; None: the layer's number.
        shards: With a path: the shards to map, and so to draw from; None for all.

    Raises:
        RunError: The path is no state store.
        ValueError: Unknown reward, negative alpha, E < 1, or ``shards`` beside an open store.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's own form
        "render_modes": [],
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int,
        source: StateStore | str | os.PathLike[str],
        reward: str | RewardFunction = "hardness",
        alpha: float = 0.05,
        shards: Sequence[int] | None = None,
        cost: Sequence[float] | None = None,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs {num_envs}; accepted: at least 1")
        if isinstance(source, StateStore):
            if shards is not None:
                raise ValueError("shards are chosen when a store is opened: give its path, or open it with them")
            self.store = source
        else:
            self.store = StateStore.open(source, shards)
        check_reward(reward, alpha, knows_memorized=True)
        self.reward = reward
        self.alpha = alpha
        self.cost = cost
        self.num_envs = num_envs
        self.num_layers = self.store.num_layers
        self.single_observation_space, self.single_action_space = episode_spaces(
            self.num_layers, self.store.hidden_size
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._epochs = Epochs(self.store.rows)
        layers = self.num_layers
        self._state: FloatArray = np.zeros((num_envs, self.store.hidden_size), dtype=np.float32)
        self._layer: IntArray = np.zeros(num_envs, dtype=np.int64)
        self._row: IntArray = np.zeros(num_envs, dtype=np.int64)
        self._id: IntArray = np.zeros(num_envs, dtype=np.int64)
        self._label: IntArray = np.zeros(num_envs, dtype=np.int64)
        self._memorized: IntArray = np.zeros(num_envs, dtype=np.int64)
        self._losses: FloatArray = np.zeros((num_envs, layers), dtype=np.float32)
        self._correct: BoolArray = np.zeros((num_envs, layers), dtype=np.bool_)
        self._logits: FloatArray = np.zeros((num_envs, layers, self.store.layout.logit_width), dtype=np.float32)
        self._rewards: FloatArray = np.zeros((num_envs, layers), dtype=np.float32)
        self._ended: BoolArray | None = None  # None: reset() has not been called

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode in every sub-environment.

        Args:
            seed: Seeds the order of the instances and begins a new pass; a list is taken as one compound seed.
            options: ``{"instances": rows [E]}`` fixes the instances of these episodes.

        Raises:
            ValueError: Another option, a row that is not there, or the wrong number of rows.
        """
        if isinstance(seed, list):
            seed = _one_seed(seed)
        super().reset(seed=seed)
        if seed is not None:
            self._epochs.restart()
        rows = _instances_option(options, self.store.rows, self.num_envs)
        every = np.arange(self.num_envs)
        self._begin(every, self._epochs.draw(self.num_envs, self.np_random) if rows is None else rows)
        self._state = self.store.states_at(self._row, self._layer)
        self._ended = np.zeros(self.num_envs, dtype=np.bool_)
        return self._observation(), self._info(np.zeros(self.num_envs, dtype=np.bool_))

    def step(
        self, actions: npt.NDArray[np.integer]
    ) -> tuple[Observation, npt.NDArray[np.float64], BoolArray, BoolArray, dict[str, Any]]:
        """Take an action in every sub-environment, [E]; ignored in those whose episode has just ended.

        Raises:
            ValueError: The wrong number of actions, or one that is neither 0 nor 1.
            gymnasium.error.ResetNeeded: ``reset()`` has not been called.
        """
        if self._ended is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        chosen = np.asarray(actions)
        if chosen.shape != (self.num_envs,) or not ((chosen == CONTINUE) | (chosen == EXIT)).all():
            raise ValueError(f"actions {chosen.tolist()}; accepted: [{self.num_envs}] of 0 (Continue) and 1 (Exit)")
        begins = self._ended
        climbs = ~begins & (chosen == CONTINUE)
        self._layer[climbs] += 1
        ends = ~begins & ((chosen == EXIT) | (self._layer == self.num_layers))
        fresh = np.flatnonzero(begins)
        if len(fresh):
            self._begin(fresh, self._epochs.draw(len(fresh), self.np_random))
        moved = np.flatnonzero(begins | climbs)
        self._state[moved] = self.store.states_at(self._row[moved], self._layer[moved])
        reward = self._reward(np.flatnonzero(ends))
        self._ended = ends
        return self._observation(), reward, ends.copy(), np.zeros(self.num_envs, dtype=np.bool_), self._info(ends)

    def _begin(self, envs: IntArray, rows: IntArray) -> None:
        """Put sub-environments at layer 1 of instances; their states are gathered by the caller."""
        records = self.store.records(rows)
        memorized = records.memorized()
        self._row[envs] = rows
        self._layer[envs] = 1
        self._id[envs] = records.ids
        self._label[envs] = records.labels
        self._memorized[envs] = memorized
        self._losses[envs] = records.losses
        self._correct[envs] = records.correct
        self._logits[envs] = records.logits
        if not callable(self.reward):
            self._rewards[envs] = rewards(
                records.losses, memorized, self.alpha, self.reward, cost=self.cost, correct=records.correct
            )

    def _reward(self, envs: IntArray) -> npt.NDArray[np.float64]:
        """Rewards of all sub-environments, [E]: 0 but for those that end."""
        reward = np.zeros(self.num_envs, dtype=np.float64)
        if callable(self.reward):
            for env in envs.tolist():
                reward[env] = float(self.reward(self._outcome(env)))
        else:
            reward[envs] = self._rewards[envs, self._layer[envs] - 1]
        return reward

    def _outcome(self, env: int) -> Outcome:
        layer = int(self._layer[env])
        return Outcome(
            instance=int(self._row[env]),
            id=int(self._id[env]),
            label=int(self._label[env]),
            exit_layer=layer,
            num_layers=self.num_layers,
            loss=float(self._losses[env, layer - 1]),
            correct=bool(self._correct[env, layer - 1]),
            memorized=int(self._memorized[env]),
            logits=self._logits[env, layer - 1].copy(),
            seconds=0.0,
        )

    def _observation(self) -> Observation:
        return {"state": self._state.copy(), "layer": self._layer.copy()}

    def _info(self, ends: BoolArray) -> dict[str, Any]:
        """Infos in Gymnasium's vector form: an array for each key, and under ``_key`` who has it."""
        everywhere = np.ones(self.num_envs, dtype=np.bool_)
        columns: dict[str, tuple[npt.NDArray[Any], BoolArray]] = {
            "instance": (self._row, everywhere),
            "id": (self._id, everywhere),
            "layer": (self._layer, everywhere),
        }
        if ends.any():
            at = (np.arange(self.num_envs), self._layer - 1)
            columns |= {
                "exit_layer": (self._layer, ends),
                "loss": (self._losses[at].astype(np.float64), ends),
                "correct": (self._correct[at], ends),
                "forced": (self._layer == self.num_layers, ends),
                "memorized": (self._memorized, ends),
            }
        infos: dict[str, Any] = {}
        for name, (values, mask) in columns.items():
            infos[name] = np.where(mask, values, values.dtype.type(0))
            infos[f"_{name}"] = mask.copy()
        return infos


def _one_seed(seeds: list[int | None]) -> int | None:
    given = [seed for seed in seeds if seed is not None]
    return int(np.random.SeedSequence(given).generate_state(1)[0]) if len(given) == len(seeds) else None


def _instances_option(options: Mapping[str, Any] | None, rows: IntArray, num_envs: int) -> IntArray | None:
    if not options:
        return None
    unknown = sorted(set(options) - {"instances"})
    if unknown:
        raise ValueError(f"reset options {unknown}; accepted: instances")
    wanted = np.asarray(options["instances"])
    if wanted.shape != (num_envs,) or not np.issubdtype(wanted.dtype, np.integer):
        raise ValueError(f"options['instances'] is {wanted.dtype} {wanted.shape}; accepted: [{num_envs}] integer rows")
    absent = ~np.isin(wanted, rows)
    if absent.any():
        raise ValueError(f"options['instances'] has {wanted[absent].tolist()}; accepted: {describe_rows(rows)}")
    return wanted.astype(np.int64)
