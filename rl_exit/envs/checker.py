"""A checker of the domain: what Gymnasium's own env checker cannot know of an early-exit episode.

Expected rewards and memorized layers are worked out here in plain Python from the definition (docs/method.md: reward,
memorized layer), not with the code the environment uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rl_exit.envs.episode import CONTINUE, EXIT
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import UserError

_BAD_OPTIONS: tuple[Any, ...] = (-1, 2**40, "0", 1.5, True, None)


class EnvironmentCheckError(AssertionError):
    """The environment is no early-exit episode; the message says which rule it breaks."""


def check_early_exit_env(
    env: gymnasium.Env[Any, Any], store: StateStore | None = None, *, max_instances: int = 16, tolerance: float = 1e-5
) -> None:
    """Check an early-exit environment by playing it: every exit layer of some instances, seeding, options, misuse.

    Args:
        env: :class:`EarlyExitEnv`, wrapped or not, or one of the same form: the unwrapped environment has
            ``num_layers``, ``reward``, ``alpha`` and ``source.rows``.
        store: What states, losses and flags must equal; default the environment's own store, where it has one.
        max_instances: How many instances are played.
        tolerance: For states, losses and rewards, relative to their size where that exceeds 1.

    Raises:
        EnvironmentCheckError: A rule is broken.
    """
    base: Any = env.unwrapped
    expected = store if store is not None else getattr(base.source, "store", None)
    _check_spaces(env, base.num_layers)
    rows = [int(row) for row in base.source.rows]
    for row in rows[:: max(1, len(rows) // max_instances)][:max_instances]:
        for exit_layer in range(1, base.num_layers + 1):
            _check_episode(env, base, row, exit_layer, expected, tolerance)
    _check_seeding(env, len(rows))
    _check_pass(env, rows)
    _check_misuse(env)


def _check_spaces(env: gymnasium.Env[Any, Any], num_layers: int) -> None:
    observation, action = env.observation_space, env.action_space
    _require(
        isinstance(observation, spaces.Dict) and set(observation.spaces) == {"state", "layer"},
        f"observation space must be a Dict of state and layer, not {observation}",
    )
    state, layer = observation["state"], observation["layer"]  # type: ignore[index]
    _require(
        isinstance(state, spaces.Box) and len(state.shape) == 1 and state.dtype == np.float32,
        f"'state' must be a float32 Box of [H], not {state}",
    )
    _require(layer == spaces.Discrete(num_layers, start=1), f"'layer' must be 1..{num_layers}, not {layer}")
    _require(action == spaces.Discrete(2), f"actions must be Discrete(2), not {action}")


def _check_episode(
    env: gymnasium.Env[Any, Any],
    base: Any,
    row: int,
    exit_layer: int,
    store: StateStore | None,
    tolerance: float,
) -> None:
    """Play one instance to one exit layer and hold every observation, reward, flag and info against the definition."""
    where = f"instance {row}, exit {exit_layer}"
    last = base.num_layers
    actions = [CONTINUE] * (exit_layer - 1) + ([EXIT] if exit_layer < last else [])
    observation, info = env.reset(options={"instance": row})
    states = [_checked_observation(env, observation, info, row, 1, where)]
    reward: Any = None
    for place, action in enumerate(actions):
        observation, reward, terminated, truncated, info = env.step(action)
        layer = min(place + 2, exit_layer)
        states.append(_checked_observation(env, observation, info, row, layer, where))
        ended = place == len(actions) - 1
        _require(terminated is ended, f"{where}: terminated is {terminated} after action {place + 1} of {len(actions)}")
        _require(truncated is False, f"{where}: an episode is never truncated")
        _require(isinstance(reward, float) and math.isfinite(reward), f"{where}: reward {reward!r} is no finite float")
        _require(ended or reward == 0.0, f"{where}: reward {reward} before the exit; the one reward comes at the end")
    if exit_layer < last:
        _require(np.array_equal(states.pop(), states[-1]), f"{where}: Exit must not move to another state")
    _require(
        info.get("exit_layer") == exit_layer and info.get("forced") is (exit_layer == last),
        f"{where}: info says exit_layer {info.get('exit_layer')}, forced {info.get('forced')}",
    )
    if store is not None:
        _check_against_store(store, row, states, info, where, tolerance)
    if not callable(base.reward):
        wanted = _formula(base.reward, info, base.alpha, last)
        _require(_close(reward, wanted, tolerance), f"{where}: reward {reward}, the formula gives {wanted}")
    try:
        env.step(CONTINUE)
    except gymnasium.error.ResetNeeded:
        return
    raise EnvironmentCheckError(f"{where}: a step after the end must raise ResetNeeded")


def _checked_observation(
    env: gymnasium.Env[Any, Any], observation: Any, info: dict[str, Any], row: int, layer: int, where: str
) -> Any:
    _require(observation in env.observation_space, f"{where}: observation at layer {layer} is outside its space")
    _require(int(observation["layer"]) == layer, f"{where}: layer {observation['layer']} where {layer} was due")
    _require(
        info.get("instance") == row and info.get("layer") == layer and "id" in info,
        f"{where}: info {info} at layer {layer}; instance, id and layer are due in every step",
    )
    return observation["state"].copy()


def _check_against_store(
    store: StateStore, row: int, states: Sequence[Any], info: dict[str, Any], where: str, tolerance: float
) -> None:
    block = store.block([row])
    for layer, state in enumerate(states, start=1):
        wanted = block.states[0, layer - 1]
        scale = max(1.0, float(np.abs(wanted).max()))
        _require(
            bool(np.abs(state - wanted).max() <= tolerance * scale),
            f"{where}: the state at layer {layer} is not the instance's state of that layer",
        )
    exit_layer = int(info["exit_layer"])
    loss = float(block.losses[0, exit_layer - 1])
    _require(info["id"] == int(block.ids[0]), f"{where}: id {info['id']}, stored {int(block.ids[0])}")
    _require(_close(info["loss"], loss, tolerance), f"{where}: loss {info['loss']}, stored {loss}")
    _require(
        info["correct"] is bool(block.correct[0, exit_layer - 1]), f"{where}: 'correct' is not what the store holds"
    )
    if "memorized" in info:
        wanted_layer = _memorized([bool(flag) for flag in block.correct[0]])
        _require(info["memorized"] == wanted_layer, f"{where}: memorized {info['memorized']}, Eq. 7: {wanted_layer}")


def _memorized(correct: Sequence[bool]) -> int:
    """Eq. 7 word for word: the first layer from which all up to L are right; L if layer L is wrong."""
    for layer in range(1, len(correct) + 1):
        if all(correct[layer - 1 :]):
            return layer
    return len(correct)


def _formula(reward: str, info: dict[str, Any], alpha: float, num_layers: int) -> float:
    layer = info["exit_layer"]
    if reward == "correctness":
        return float(info["correct"]) - alpha * layer
    if reward == "fidelity":
        return float(info["correct"]) - info["loss"] - alpha * layer
    if reward == "vanilla":
        return -info["loss"] - alpha * layer
    return -info["loss"] - alpha * (1 - info["memorized"] / num_layers) * layer


def _check_seeding(env: gymnasium.Env[Any, Any], count: int) -> None:
    length = min(count, 24)
    first, again, other = (_sequence(env, seed, length) for seed in (7, 7, 8))
    _require(first == again, "the same seed must give the same instances in the same order")
    if count >= 8:  # two orders of 8 instances are equal by chance once in 40320
        _require(first != other, "another seed must give another order of the instances")


def _sequence(env: gymnasium.Env[Any, Any], seed: int, length: int) -> list[int]:
    drawn = [env.reset(seed=seed)[1]["instance"]]
    while len(drawn) < length:
        drawn.append(env.reset()[1]["instance"])
    return drawn


def _check_pass(env: gymnasium.Env[Any, Any], rows: Sequence[int], most: int = 2000) -> None:
    drawn = _sequence(env, 3, min(len(rows), most))
    _require(len(set(drawn)) == len(drawn), "an instance was drawn twice within one pass over the instances")
    _require(set(drawn) <= set(rows), "an instance was drawn that the source does not have")


def _check_misuse(env: gymnasium.Env[Any, Any]) -> None:
    def begin(options: dict[str, Any]) -> Callable[[], Any]:
        return lambda: env.reset(options=options)

    def act(action: int) -> Callable[[], Any]:
        return lambda: env.step(action)

    for value in _BAD_OPTIONS:
        _refused(begin({"instance": value}), f"options instance={value!r}")
    _refused(begin({"row": 0}), "an unknown option")
    env.reset(seed=0)
    for action in (2, -1):
        _refused(act(action), f"action {action}")
    _, _, terminated, _, _ = env.step(EXIT)
    _require(terminated, "an action that was refused must leave the episode where it was")


def _refused(call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except (ValueError, UserError):
        return
    raise EnvironmentCheckError(f"{what} must be refused with a ValueError")


def _close(value: float, wanted: float, tolerance: float) -> bool:
    return abs(value - wanted) <= tolerance * max(1.0, abs(wanted))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise EnvironmentCheckError(message)
