"""One instance as one episode over the model's layers: the specification of the MDP (docs/method.md: episode).

The state at layer l is the pooled hidden state h[i, l]. Continue gives reward 0 and the state of layer l+1; Exit ends
the episode with the reward of leaving at l. At layer L exit is forced: Continue at L-1 runs layer L and ends the
episode there, so no action is ever taken, or credited, at L.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rl_exit.envs.shards import FloatArray, IntArray
from rl_exit.envs.sources import Outcome, Source, as_source
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import nearest
from rl_exit.method.rewards import REWARDS, rewards

CONTINUE = 0
EXIT = 1

RewardFunction = Callable[[Outcome], float]
Observation = dict[str, Any]


class Epochs:
    """Draws instances in seeded shuffled passes: none is skipped or repeated before all have been drawn.

    Args:
        rows: [n] int64, the instances to draw from, n >= 1.
    """

    def __init__(self, rows: IntArray) -> None:
        if not len(rows):
            raise ValueError("there are no instances to draw from")
        self._rows = rows
        self._order: IntArray = rows[:0]
        self._next = 0

    def restart(self) -> None:
        """Forget the pass under way; the next draw begins a new one."""
        self._order = self._rows[:0]
        self._next = 0

    def draw(self, count: int, generator: np.random.Generator) -> IntArray:
        """The next ``count`` instances, [count]; a new pass is shuffled by ``generator`` whenever one ends."""
        drawn: list[IntArray] = []
        while count > 0:
            if self._next == len(self._order):
                self._order = generator.permutation(self._rows)
                self._next = 0
            part = self._order[self._next : self._next + count]
            self._next += len(part)
            count -= len(part)
            drawn.append(part)
        return np.concatenate(drawn) if len(drawn) != 1 else drawn[0]


class EarlyExitEnv(gymnasium.Env[Observation, int]):
    """The episode.

    Observation: ``{"state": float32 [H], "layer": 1..L}``. Actions: 0 Continue, 1 Exit. ``info`` always has
    ``instance`` (row), ``id`` and ``layer``; at the end also ``exit_layer``, ``loss``, ``correct``, ``forced`` and,
    where known, ``memorized``.

    Each ``reset`` takes the next instance of a shuffled pass over all instances: none is skipped or repeated within a
    pass. ``reset(seed=...)`` seeds the shuffling and begins a new pass; ``reset(options={"instance": row})`` takes that
    instance and leaves the pass where it is.

    Args:
        source: The path of a state store, an open :class:`StateStore`, or a source of its own (:class:`LiveSource`).
        reward: ``"hardness"`` (Eq. 4), ``"vanilla"`` (Eq. 3), ``"correctness"``, ``"fidelity"``, or a function of the
            :class:`Outcome`.
        alpha: Price of a layer in nats, for the named rewards; usual 0.005-0.2.
        cost: [L], cost of leaving at each layer; None: the layer's number.

    Raises:
        RunError: The path is no state store.
        ValueError: Unknown reward, negative alpha, or the hardness-guided reward without memorized layers.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own form

    def __init__(
        self,
        source: Source | StateStore | str | os.PathLike[str],
        reward: str | RewardFunction = "hardness",
        alpha: float = 0.05,
        cost: Sequence[float] | None = None,
    ) -> None:
        self.source = as_source(source)
        check_reward(reward, alpha, self.source.knows_memorized)
        self.reward = reward
        self.alpha = alpha
        self.cost = cost
        self.num_layers = self.source.num_layers
        self.observation_space, self.action_space = episode_spaces(self.num_layers, self.source.hidden_size)
        self._epochs = Epochs(self.source.rows)
        self._layer = 0  # 0: no episode under way
        self._instance = -1
        self._id = -1
        self._state: FloatArray = np.zeros(self.source.hidden_size, dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode at layer 1.

        Args:
            seed: Seeds the order of the instances and begins a new pass.
            options: ``{"instance": row}`` takes that instance.

        Raises:
            ValueError: Another option, or no such row.
        """
        super().reset(seed=seed)
        if seed is not None:
            self._epochs.restart()
        chosen = _instance_option(options, self.source.rows)
        row = int(self._epochs.draw(1, self.np_random)[0]) if chosen is None else chosen
        self._state = self.source.begin(row)
        self._layer, self._instance, self._id = 1, row, self.source.id_of(row)
        return self._observation(1), self._info(1)

    def step(self, action: int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take an action: 0 Continue, 1 Exit.

        Raises:
            ValueError: Another action.
            gymnasium.error.ResetNeeded: No episode is under way.
        """
        if action not in (CONTINUE, EXIT):
            raise ValueError(f"action {action!r}; accepted: {CONTINUE} (Continue), {EXIT} (Exit)")
        if self._layer == 0:
            raise gymnasium.error.ResetNeeded("the episode has ended: call reset() before step()")
        if action == CONTINUE:
            self._state = self.source.step()
            self._layer += 1
        layer = self._layer
        if action == CONTINUE and layer < self.num_layers:
            return self._observation(layer), 0.0, False, False, self._info(layer)
        outcome = self.source.outcome()
        self._layer = 0
        info = self._info(layer) | {
            "exit_layer": outcome.exit_layer,
            "loss": outcome.loss,
            "correct": outcome.correct,
            "forced": outcome.forced,
        }
        if outcome.memorized is not None:
            info["memorized"] = outcome.memorized
        return self._observation(layer), exit_reward(outcome, self.reward, self.alpha, self.cost), True, False, info

    def _observation(self, layer: int) -> Observation:
        return {"state": self._state, "layer": np.int64(layer)}

    def _info(self, layer: int) -> dict[str, Any]:
        return {"instance": self._instance, "id": self._id, "layer": layer}


def episode_spaces(num_layers: int, hidden_size: int) -> tuple[spaces.Dict, spaces.Discrete]:
    """Observation and action space of an episode over L layers of H features."""
    state = spaces.Box(-np.inf, np.inf, (hidden_size,), np.float32)
    return spaces.Dict({"state": state, "layer": spaces.Discrete(num_layers, start=1)}), spaces.Discrete(2)


def exit_reward(
    outcome: Outcome, reward: str | RewardFunction, alpha: float, cost: Sequence[float] | None = None
) -> float:
    """Reward of an episode's end: the named formula (Eq. 3 or 4, float32 as in :func:`rewards`) or a function."""
    if callable(reward):
        return float(reward(outcome))
    losses = np.full((1, outcome.num_layers), outcome.loss, dtype=np.float32)
    memorized = None if outcome.memorized is None else [outcome.memorized]
    correct = np.full((1, outcome.num_layers), outcome.correct)
    return float(rewards(losses, memorized, alpha, reward, cost=cost, correct=correct)[0, outcome.exit_layer - 1])


def check_reward(reward: str | RewardFunction, alpha: float, knows_memorized: bool) -> None:
    """Refuse a reward that cannot be computed.

    Raises:
        ValueError: Unknown name, negative or infinite alpha, or hardness without memorized layers.
    """
    if not callable(reward) and reward not in REWARDS:
        hint = nearest(str(reward), REWARDS)
        raise ValueError(f"reward '{reward}' is unknown.{hint} Accepted: {', '.join(REWARDS)}, or a function")
    if not (np.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha {alpha}; accepted: a finite number of at least 0")
    if reward == "hardness" and not knows_memorized:
        raise ValueError("the hardness-guided reward needs memorized layers: LiveSource(..., memorized=...)")


def _instance_option(options: Mapping[str, Any] | None, rows: IntArray) -> int | None:
    if not options:
        return None
    unknown = sorted(set(options) - {"instance"})
    if unknown:
        raise ValueError(f"reset options {unknown}; accepted: instance")
    row = options["instance"]
    if isinstance(row, (bool, np.bool_)) or not isinstance(row, (int, np.integer)):
        raise ValueError(f"options['instance'] = {row!r}; accepted: an integer row")
    place = int(np.searchsorted(rows, row))
    if place == len(rows) or rows[place] != row:
        raise ValueError(f"options['instance'] = {row}; accepted: {describe_rows(rows)}")
    return int(row)


def describe_rows(rows: IntArray) -> str:
    """The rows in words, for messages."""
    gap = "" if rows[-1] - rows[0] + 1 == len(rows) else f" ({len(rows)} of them mapped)"
    return f"{rows[0]}..{rows[-1]}{gap}"
