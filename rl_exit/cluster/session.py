"""One Ray session for a run: started or joined only where the run needs it, checked against what the run asks for."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rl_exit.cluster.plan import Plan, make_plan, nodes_of, roles
from rl_exit.config import RunConfig
from rl_exit.errors import UserError
from rl_exit.trainers.local_ray import start_local
from rl_exit.trainers.rllib.registry import check_importable, needs_session

POLL_SECONDS = 2.0


def needs_ray(config: RunConfig) -> bool:
    """Whether anything of the run happens outside of this process."""
    stock = config.sampling.runner == "rllib" or needs_session(config.algorithm)
    return stock or config.cluster != "local" or any(roles(config).values())


@contextmanager
def ray_session(config: RunConfig, at_least: int = 0) -> Iterator[Plan]:
    """Join or start Ray for the time of a run; does nothing where the run stays in this process.

    Args:
        config: Of the run, or of the largest run of a sweep.
        at_least: CPUs that a session started here offers; a sweep needs a session whatever its runs need.

    Yields:
        The run's plan, which fits.

    Raises:
        UserError: The algorithm is unknown, the cluster cannot be reached, or it is too small for the run.
    """
    if not at_least:  # a sweep's runs have processes of their own, where the GPUs are, and fail each for itself
        check_importable(config.algorithm)  # not after the seconds that a session takes to start
        _check_own_process(config)
    plan = make_plan(config, None)
    if not needs_ray(config) and not at_least:
        yield plan
        return
    import ray

    started = not ray.is_initialized()
    if started:
        _start(config, plan, at_least)
    try:
        yield _fitting(config)
    finally:
        if config.placement.autoscale and config.cluster != "local":
            with suppress(Exception):  # the cluster itself may be gone
                from ray.autoscaler.sdk import request_resources

                request_resources()  # what was asked for is not needed any more
        if started:
            ray.shutdown()


def _check_own_process(config: RunConfig) -> None:
    """What has no workers happens in this process: without a GPU here it is refused now, not when its turn comes."""
    import torch

    step, learners = config.task_step, config.learners
    alone = {
        "task_step.use_gpu": ("task_step.num_workers", step.use_gpu and not step.num_workers),
        "learners.use_gpu": ("learners.num_learners", learners.use_gpu and not learners.num_learners),
    }
    for key, (workers, wanted) in alone.items():
        if wanted and not torch.cuda.is_available():
            raise UserError(
                f"{key}=true, but torch finds no GPU here; set it to false, or {workers} to 1 or more where a cluster "
                "has GPUs"
            )


def _start(config: RunConfig, plan: Plan, at_least: int) -> None:
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if config.cluster != "local":
        try:
            ray.init(address=config.cluster, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise UserError(f"cluster={config.cluster}: cannot be reached: {error}") from None
        return
    # On one machine more actors than cores are slow but right; one more for whatever Ray itself may start.
    wanted = max(plan.needs("CPU"), at_least) + 1
    start_local(max(wanted, os.cpu_count() or 1))


def _fitting(config: RunConfig) -> Plan:
    """The plan for the cluster as it is, or as it grows to be within the time-out."""
    import ray

    deadline = time.monotonic() + config.placement.timeout
    asked = False
    while True:
        try:
            return make_plan(config, nodes_of(ray.nodes()))
        except UserError as error:
            if not config.placement.autoscale:
                raise
            if time.monotonic() > deadline:
                waited = f"{config.placement.timeout:g} s"
                raise UserError(f"{error} (it has not grown within {waited}, placement.timeout)") from None
        if not asked:
            from ray.autoscaler.sdk import request_resources

            keeps = config.placement.workers == "keep"
            least = make_plan(config if keeps else config.model_copy(update={"placement": _alternating(config)}), None)
            request_resources(bundles=[{"CPU": 1}] * least.needs("CPU") + [{"GPU": 1}] * least.needs("GPU"))
            asked = True
        time.sleep(min(POLL_SECONDS, config.placement.timeout))


def _alternating(config: RunConfig) -> object:
    return config.placement.model_copy(update={"workers": "alternate"})
