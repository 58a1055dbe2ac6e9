"""What people are told of a run at work: where the policy is, how far the run is, when it will be over."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rl_exit.progress import clock

_ROUND_STEPS = ("store", "policy", "dev", "task")


def steps_of(rounds: int) -> list[str]:
    """Names of all steps of a run with so many task steps, in order; a run may end earlier."""
    names = ["data", "init"]
    for number in range(1, rounds + 2):
        names += [f"round-{number}-{part}" for part in _ROUND_STEPS]
    return [*names[:-1], "final", "report"]  # the closing round has no task step


def seconds_left(seconds: Mapping[str, float], steps: Sequence[str]) -> float | None:
    """Seconds until the last step is done, at the latest.

    Args:
        seconds: Of the steps that are done.
        steps: All steps.

    Returns:
        None where a step of a kind that takes long is still to come and none of it has been done: nothing is known yet.
    """
    total = 0.0
    for step in steps:
        if step in seconds:
            continue
        like = [value for name, value in seconds.items() if _kind(name) == _kind(step)]
        if not like and _kind(step) in ("init", *_ROUND_STEPS):
            return None
        total += like[-1] if like else 0.0
    return total


def outlook(seconds: Mapping[str, float], rounds: int, now: float | None = None) -> str:
    """How far the run is and when it ends, in one line."""
    steps = steps_of(rounds)
    done = sum(step in seconds for step in steps)
    left = seconds_left(seconds, steps)
    text = f"run: {done} of {len(steps)} steps done"
    if left is None:
        return text
    end = time.strftime("%H:%M", time.localtime((time.time() if now is None else now) + left))
    return f"{text}, at most {clock(left)} left (about {end})"


def policy_in_words(metrics: Mapping[str, float]) -> str:
    """Return, mean exit layer, share of every layer in percent, and throughput, for a line of progress."""
    words = f"return {metrics['return']:.3f}, exit {metrics['mean_exit_layer']:.2f}"
    shares = [f"{100 * value:.0f}" for name, value in metrics.items() if name.startswith("exits_")]
    if shares:
        words += f" ({'/'.join(shares)} %)"
    speed = metrics.get("trajectories_per_second")
    return words + (f", {speed:,.0f} trajectories/s" if speed else "")


def _kind(step: str) -> str:
    return step.rsplit("-", 1)[-1]
