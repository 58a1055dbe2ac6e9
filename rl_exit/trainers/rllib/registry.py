"""Algorithms by one word."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from rl_exit.errors import ConfigError, nearest


@dataclass(frozen=True)
class AlgorithmInfo:
    """An algorithm that ``algorithm=`` accepts.

    Attributes:
        name: The word.
        path: Dotted path of the RLlib ``Algorithm`` class.
        what: What it is, one line.
        good_for: When to choose it, one line.
        plain_path: The class that serves it with ``sampling.runner=rllib``; default the same.
        needs_ray: RLlib's own runner group is part of it, which needs a Ray session even without actors.
    """

    name: str
    path: str
    what: str
    good_for: str
    plain_path: str | None = None
    needs_ray: bool = False


_ALGORITHMS = (
    AlgorithmInfo(
        "pg",
        "rl_exit.trainers.rllib.pg.PG",
        "the paper's policy gradient, with a baseline per instance that keeps it unbiased",
        "the default: fastest of the sampled ones, two settings that matter (lr, trajectories)",
    ),
    AlgorithmInfo(
        "ppo",
        "rl_exit.trainers.rllib.ppo.PPOExit",
        "several clipped passes over each batch, a learnt value per layer",
        "trajectories that are dear to draw, small K, steps that must stay small",
        "rl_exit.trainers.rllib.stock.StockPPO",
    ),
    AlgorithmInfo(
        "exact",
        "rl_exit.trainers.rllib.exact.Exact",
        "gradient of the expected return in closed form, without variance",
        "the best result for the time, and the yardstick; the reward must be one value per exit layer",
    ),
    AlgorithmInfo(
        "appo",
        "rl_exit.trainers.rllib.stock.StockAPPO",
        "RLlib's APPO: V-trace against a target policy, clipped steps",
        "many remote runners whose trajectories lag behind the policy",
        needs_ray=True,
    ),
    AlgorithmInfo(
        "impala",
        "rl_exit.trainers.rllib.stock.StockIMPALA",
        "RLlib's IMPALA: sampling and learning overlap, V-trace corrects the lag",
        "many remote runners and a learner that must never wait",
        needs_ray=True,
    ),
    AlgorithmInfo(
        "dqn",
        "rl_exit.trainers.rllib.dqn.StockDQN",
        "RLlib's DQN: learns what Exit and Continue are worth, replays episodes",
        "a greedy policy (inference.threshold=0.5), and returns that one wants to read off",
        needs_ray=True,
    ),
)


def algorithms() -> tuple[AlgorithmInfo, ...]:
    """The built-in algorithms, in the order in which to show them."""
    return _ALGORITHMS


def check_algorithm(name: str) -> None:
    """Refuse a word that is neither a built-in name nor a dotted path; imports nothing.

    Raises:
        ConfigError: With the nearest name.
    """
    names = [info.name for info in _ALGORITHMS]
    if name not in names and "." not in name:
        raise ConfigError(
            f"algorithm '{name}' is unknown.{nearest(name, names)} Accepted: {', '.join(names)}, or the dotted path of "
            "an RLlib Algorithm class."
        )


def check_importable(name: str) -> None:
    """Refuse what :func:`check_algorithm` refuses, and a dotted path that leads to no algorithm here.

    Before anything is started or computed for a run whose policy phase could not begin.

    Raises:
        ConfigError: Unknown name, or a path that leads to no algorithm of the policy phase.
    """
    check_algorithm(name)
    if "." in name:  # the built-in ones are there, and RLlib takes seconds to import
        algorithm_class(name)


def needs_session(name: str) -> bool:
    """Whether the algorithm needs Ray even without actors; an algorithm of the user's own is given it to be sure."""
    return next((info.needs_ray for info in _ALGORITHMS if info.name == name), True)


def algorithm_class(name: str, runner: str = "columnar") -> Any:
    """The RLlib ``Algorithm`` class of a name or dotted path.

    Args:
        name: A built-in name or a dotted path.
        runner: ``columnar`` or ``rllib``.

    Raises:
        ConfigError: Unknown name, or a path that leads to no algorithm of the policy phase.
    """
    from rl_exit.trainers.rllib.settings import PolicyAccess

    check_algorithm(name)
    info = next((info for info in _ALGORITHMS if info.name == name), AlgorithmInfo(name, name, "", ""))
    path = info.plain_path if runner == "rllib" and info.plain_path else info.path
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"algorithm '{name}': cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, PolicyAccess)):
        raise ConfigError(
            f"algorithm '{name}': a subclass of rl_exit.trainers.rllib.algorithm.ExitAlgorithm is expected"
        )
    return found
