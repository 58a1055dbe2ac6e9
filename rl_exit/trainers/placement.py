"""Waiting for room on the cluster, for a limited time and with a reason at its end."""

from __future__ import annotations

from rl_exit.errors import RunError


def await_room(what: str, seconds: float, cpus: int = 0, gpus: int = 0) -> None:
    """Wait until so many actors of one CPU or one GPU each can all be placed now.

    Ray lets an actor that finds no room wait for ever and says nothing, and a phase of which half is placed holds what
    others wait for. A placement group is placed as a whole or not at all; it is given back at once, so this is a
    limit on waiting and no reservation.

    Args:
        what: What is to be placed, with its keys, for the message.
        seconds: How long to wait.
        cpus: Actors of one CPU.
        gpus: Actors of one GPU.

    Raises:
        RunError: There is no room within the time.
    """
    import ray
    from ray.util.placement_group import get_current_placement_group, placement_group, remove_placement_group

    if not cpus + gpus or get_current_placement_group() is not None:  # a trial of a sweep has its place already
        return
    group = placement_group([{"CPU": 1.0}] * cpus + [{"GPU": 1.0}] * gpus)
    try:
        if group.wait(seconds):
            return
    finally:
        remove_placement_group(group)
    parts = [(name, number) for name, number in (("CPU", cpus), ("GPU", gpus)) if number]
    wanted = " and ".join(f"{number} {name}{'s' if number > 1 else ''}" for name, number in parts)
    have, free = ray.cluster_resources(), ray.available_resources()
    told = ", ".join(f"{have.get(name, 0):g} {name}s, of which {free.get(name, 0):g} are free" for name, _ in parts)
    raise RunError(
        f"{what}: no room for {wanted} within {seconds:g} s (placement.timeout); the cluster has {told}. Wait for the "
        "others, or lower the number"
    )
