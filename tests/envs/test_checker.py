"""The checker finds each fault; that it passes the sound environment is in test_episode.py."""

from __future__ import annotations

import contextlib
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from rl_exit.envs import CONTINUE, EXIT, EarlyExitEnv, EnvironmentCheckError, StateStore, check_early_exit_env


class Wrong(EarlyExitEnv):
    """Changes what a step returns."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        observation, info = super().reset(seed=seed, options=options)
        return self.alter_reset(dict(observation), dict(info))

    def step(self, action: int) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return self.alter(dict(observation), reward, terminated, truncated, dict(info))

    def alter_reset(self, observation: Any, info: Any) -> Any:
        return observation, info

    def alter(self, *step: Any) -> Any:
        return step


class RewardOff(Wrong):
    def alter(self, observation, reward, terminated, truncated, info):
        return observation, reward + 1e-3 * terminated, terminated, truncated, info


class RewardForEachLayer(Wrong):
    def alter(self, observation, reward, terminated, truncated, info):
        return observation, reward if terminated else -0.05, terminated, truncated, info


class RewardNotFinite(Wrong):
    def alter(self, observation, reward, terminated, truncated, info):
        return observation, float("nan") if terminated else 0.0, terminated, truncated, info


class StateOfTheLayerBelow(Wrong):
    def alter(self, observation, reward, terminated, truncated, info):
        row, layer = info["instance"], int(observation["layer"])
        state = self.source.store.states([row])[0, max(layer - 2, 0)]
        return observation | {"state": state}, reward, terminated, truncated, info


class LayerFromZero(Wrong):
    def alter_reset(self, observation, info):
        return observation | {"layer": np.int64(0)}, info


class LayerStuck(Wrong):
    def alter(self, observation, reward, terminated, truncated, info):
        return observation | {"layer": np.int64(1)}, reward, terminated, truncated, info


class ExitMovesOn(Wrong):
    def alter(self, observation, reward, terminated, truncated, info):
        moved = observation | ({"state": observation["state"] + 1} if terminated and not info["forced"] else {})
        return moved, reward, terminated, truncated, info


class Truncates(Wrong):
    def alter(self, observation, reward, terminated, truncated, info):
        return observation, reward, terminated, terminated, info


class ForcedUnsaid(Wrong):
    def alter(self, observation, reward, terminated, truncated, info):
        return observation, reward, terminated, truncated, info | ({"forced": False} if terminated else {})


class IdOff(Wrong):
    def alter(self, observation, reward, terminated, truncated, info):
        return observation, reward, terminated, truncated, info | {"id": 0}


class NoInstance(Wrong):
    def alter_reset(self, observation, info):
        del info["instance"]
        return observation, info


class CorrectOff(Wrong):
    def alter(self, observation, reward, terminated, truncated, info):
        return observation, reward, terminated, truncated, info | ({"correct": True} if terminated else {})


class MemorizedIsFirstCorrect(Wrong):
    """The first right layer instead of the first from which all are right; the reward goes along."""

    def alter(self, observation, reward, terminated, truncated, info):
        if terminated:
            correct = self.source.store.block([info["instance"]]).correct[0]
            info["memorized"] = int(correct.argmax()) + 1 if correct.any() else self.num_layers
            ease = 1 - info["memorized"] / self.num_layers
            reward = -info["loss"] - self.alpha * ease * info["exit_layer"]
        return observation, reward, terminated, truncated, info


class NoForcedExit(EarlyExitEnv):
    """One action too many: at layer L the agent still has to choose Exit."""

    held: Any = None

    def step(self, action: int) -> Any:
        if self.held is not None:
            result, self.held = self.held, None
            return result
        result = super().step(action)
        if result[2] and result[4]["forced"]:
            self.held = result
            return result[0], 0.0, False, False, {"instance": result[4]["instance"], "id": 0, "layer": self.num_layers}
        return result


class StepsAfterTheEnd(EarlyExitEnv):
    last: Any = None

    def step(self, action: int) -> Any:
        with contextlib.suppress(gymnasium.error.ResetNeeded):
            self.last = super().step(action)
        return self.last


class Unseeded(EarlyExitEnv):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(options=options)


class OneSeed(EarlyExitEnv):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=None if seed is None else 0, options=options)


class WithReplacement(EarlyExitEnv):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if options is None:
            gymnasium.Env.reset(self, seed=seed)
            options = {"instance": int(self.np_random.integers(len(self.source.rows)))}
            seed = None
        return super().reset(seed=seed, options=options)


class TakesAnyInstance(EarlyExitEnv):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        row = (options or {}).get("instance")
        options = options if isinstance(row, int) or options != {"instance": row} else None
        return super().reset(seed=seed, options=options)


class TakesAnyOption(EarlyExitEnv):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        known = {key: value for key, value in (options or {}).items() if key == "instance"}
        return super().reset(seed=seed, options=known)


class TakesAnyAction(EarlyExitEnv):
    def step(self, action: int) -> Any:
        return super().step(EXIT if action == EXIT else CONTINUE)


class ThreeActions(EarlyExitEnv):
    def __init__(self, store: StateStore, **settings: Any) -> None:
        super().__init__(store, **settings)
        self.action_space = spaces.Discrete(3)


class LayersFromZero(EarlyExitEnv):
    def __init__(self, store: StateStore, **settings: Any) -> None:
        super().__init__(store, **settings)
        self.observation_space = spaces.Dict(
            {"state": self.observation_space["state"], "layer": spaces.Discrete(self.num_layers)}
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RewardOff, "the formula gives"),
        (RewardForEachLayer, "the one reward comes at the end"),
        (RewardNotFinite, "no finite float"),
        (StateOfTheLayerBelow, "is not the instance's state of that layer"),
        (LayerFromZero, "outside its space"),
        (LayerStuck, "layer 1 where 2 was due"),
        (ExitMovesOn, "Exit must not move"),
        (Truncates, "never truncated"),
        (ForcedUnsaid, "forced False"),
        (IdOff, "id 0, stored"),
        (NoInstance, "are due in every step"),
        (CorrectOff, "'correct' is not what the store holds"),
        (MemorizedIsFirstCorrect, "Eq. 7"),
        (NoForcedExit, "terminated is False"),
        (StepsAfterTheEnd, "must raise ResetNeeded"),
        (Unseeded, "the same seed must give"),
        (OneSeed, "another seed must give"),
        (WithReplacement, "drawn twice within one pass"),
        (TakesAnyInstance, "options instance='0' must be refused"),
        (TakesAnyOption, "an unknown option must be refused"),
        (TakesAnyAction, "action 2 must be refused"),
        (ThreeActions, r"actions must be Discrete\(2\)"),
        (LayersFromZero, r"'layer' must be 1\.\.4"),
    ],
)
def test_each_fault_is_found(store: StateStore, kind: type[EarlyExitEnv], message: str) -> None:
    with pytest.raises(EnvironmentCheckError, match=message):
        check_early_exit_env(kind(store, alpha=0.1))


class VanillaUnderTheOtherName(Wrong):
    """Says it computes Eq. 4 and computes Eq. 3."""

    def alter(self, observation, reward, terminated, truncated, info):
        reward = -info["loss"] - self.alpha * info["exit_layer"] if terminated else 0.0
        return observation, reward, terminated, truncated, info


def test_the_other_formula_is_found(store: StateStore) -> None:
    with pytest.raises(EnvironmentCheckError, match="the formula gives"):
        check_early_exit_env(VanillaUnderTheOtherName(store, alpha=0.1))
    check_early_exit_env(VanillaUnderTheOtherName(store, "vanilla", alpha=0.1))
