"""One Ray session for a run: started or joined only where the run needs it, checked against what the run asks for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from rl_exit.config import RunConfig
from rl_exit.errors import UserError
from rl_exit.trainers.rllib.registry import needs_session


def cpus_needed(config: RunConfig) -> dict[str, int]:
    """CPUs that each phase holds at once, by the key that sets them. Phases alternate, so the largest counts."""
    return {
        "sampling.num_env_runners + learners.num_learners": config.sampling.num_env_runners
        + config.learners.num_learners,
        "task_step.num_workers": config.task_step.num_workers,
        "store.num_workers": config.store.num_workers,
    }


def needs_ray(config: RunConfig) -> bool:
    """Whether anything of the run happens outside of this process."""
    stock = config.sampling.runner == "rllib" or needs_session(config.algorithm)
    return stock or config.cluster != "local" or any(cpus_needed(config).values())


@contextmanager
def ray_session(config: RunConfig, at_least: int = 0) -> Iterator[None]:
    """Join or start Ray for the time of a run; does nothing where the run stays in this process.

    Args:
        config: Of the run, or of the largest run of a sweep.
        at_least: CPUs that a session started here offers; a sweep needs a session whatever its runs need.

    Raises:
        UserError: The cluster cannot be reached, or is too small for the run.
    """
    if not needs_ray(config) and not at_least:
        yield
        return
    import ray

    started = not ray.is_initialized()
    if started:
        _start(config, at_least)
    try:
        _check_size(config, ray.cluster_resources())
        yield
    finally:
        if started:
            ray.shutdown()


def _start(config: RunConfig, at_least: int) -> None:
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if config.cluster != "local":
        try:
            ray.init(address=config.cluster, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise UserError(f"cluster={config.cluster}: cannot be reached: {error}") from None
        return
    # On one machine more actors than cores are slow but right; one more for the controller of Ray Train.
    wanted = max(*cpus_needed(config).values(), at_least) + 1
    ray.init(
        "local",  # never join another Ray of this machine by chance
        num_cpus=max(wanted, os.cpu_count() or 1),
        include_dashboard=False,
        logging_level=logging.WARNING,
        log_to_driver=False,
    )


def _check_size(config: RunConfig, resources: dict[str, float]) -> None:
    have = resources.get("CPU", 0.0)
    for keys, need in cpus_needed(config).items():
        if need > have:
            raise UserError(
                f"the cluster has {have:g} CPUs and {keys} asks for {need}: {need - have:g} are missing; lower {keys}"
            )
    gpus = (config.task_step.num_workers or 1) if config.task_step.use_gpu else 0
    if gpus > resources.get("GPU", 0.0) and config.task_step.num_workers:
        raise UserError(
            f"the cluster has {resources.get('GPU', 0.0):g} GPUs and task_step asks for {gpus}; "
            "lower task_step.num_workers or set task_step.use_gpu=false"
        )
