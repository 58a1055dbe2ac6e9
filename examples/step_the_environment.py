"""Walk through episodes of the Gymnasium environment with a policy of your own.

Run:     python examples/step_the_environment.py runs/docstrings
Expect:  the mean return and mean exit layer of three hand-written policies over 500 training instances. None of them
         looks at anything but the layer's number.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rl_exit.envs import EXIT, EarlyExitEnv, check_early_exit_env

Policy = Callable[[int, np.random.Generator], int]


def play(env: EarlyExitEnv, policy: Policy, episodes: int, seed: int) -> tuple[float, float]:
    """Mean return and mean exit layer of a policy that sees the layer number only."""
    rng = np.random.default_rng(seed)
    returns, layers = [], []
    observation, info = env.reset(seed=seed)
    for _ in range(episodes):
        over, reward = False, 0.0
        while not over:
            observation, reward, over, _, info = env.step(policy(int(observation["layer"]), rng))
        returns.append(reward)
        layers.append(info["exit_layer"])
        observation, info = env.reset()
    return float(np.mean(returns)), float(np.mean(layers))


def main(run: str) -> None:
    """Compare three blind policies on the state store of a run."""
    best = json.loads((Path(run) / "results.json").read_text())["best_round"]
    env = EarlyExitEnv(Path(run) / "rounds" / str(best) / "store-train", reward="hardness", alpha=0.05)
    check_early_exit_env(env)
    policies: dict[str, Policy] = {
        "leave at once": lambda layer, rng: EXIT,
        "never leave": lambda layer, rng: 1 - EXIT,
        "toss a coin": lambda layer, rng: int(rng.integers(2)),
    }
    for name, policy in policies.items():
        value, layer = play(env, policy, episodes=500, seed=0)
        print(f"{name:>14}: return {value:+.3f}, mean exit layer {layer:.2f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/docstrings")
