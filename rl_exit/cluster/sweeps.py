"""The Ray session of a sweep, and how its trials share it: planned before anything starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rl_exit.cluster.plan import nodes_of
from rl_exit.cluster.reach import check_folder
from rl_exit.cluster.session import ray_session
from rl_exit.config import RunConfig
from rl_exit.errors import UserError
from rl_exit.trainers.sweep import Share, share_of
from rl_exit.trainers.sweep_plan import SweepPlan
from rl_exit.trainers.sweep_results import is_finished

CORES_PER_TRIAL = 4  # Small models gain little from more threads, so further cores do further trials.
MOST_THREADS = 8


@contextmanager
def sweep_session(plan: SweepPlan, max_concurrent: int | None) -> Iterator[tuple[dict[str, Share], int]]:
    """Start or join Ray for a sweep; a finished one needs none.

    Args:
        plan: The sweep; all its runs name the same cluster.
        max_concurrent: Most trials at once; None: as many as the machine or cluster is good for.

    Yields:
        Resources of each trial and initialisation by label, and how many are done at once.

    Raises:
        UserError: The cluster cannot be reached, or is too small for a trial.
    """
    parts = {start.label: start.config for start in plan.initialisations}
    parts |= {trial.label: trial.config for trial in plan.trials}
    config = plan.trials[0].config
    if all(is_finished(trial) for trial in plan.trials):
        yield {}, 1
        return
    if config.cluster == "local":
        # On one machine more actors than cores are slow but right, so the session offers what the trials ask for.
        shares, at_once = allot(parts, os.cpu_count() or 1, max_concurrent)
        with ray_session(config, at_once * max(share.total for share in shares.values())):
            yield shares, at_once
        return
    with ray_session(config, 1):
        import ray

        check_folder(plan.folder)
        nodes = [{"CPU": node.cpus, "GPU": node.gpus} for node in nodes_of(ray.nodes())]
        cores = int(ray.cluster_resources().get("CPU", 0))
        yield allot(parts, cores, max_concurrent, nodes)


def allot(
    parts: Mapping[str, RunConfig],
    cores: int,
    max_concurrent: int | None,
    nodes: Sequence[Mapping[str, float]] = (),
) -> tuple[dict[str, Share], int]:
    """Share processors among trials.

    Args:
        parts: Label -> configuration.
        cores: Processors there are.
        max_concurrent: Most trials at once; None: one for every ``CORES_PER_TRIAL`` processors.
        nodes: Of a cluster, CPUs and GPUs of each: trials may not ask for more than there is, and a run's own process
            has all its threads on one of them. None: one machine, where at least one trial is always done.

    Returns:
        Share of each part, and how many parts are done at once.

    Raises:
        UserError: A single trial asks for more than the cluster has, or than any of its nodes.
    """
    wanted = min(max_concurrent or max(1, cores // CORES_PER_TRIAL), len(parts))
    threads = min(MOST_THREADS, max(1, cores // wanted))
    shares = {label: share_of(config, threads) for label, config in parts.items()}
    if not nodes:
        return shares, wanted
    # Actors and workers first; what is left goes to the threads of the runs' own processes.
    label, most = max(((label, share.actors + share.workers) for label, share in shares.items()), key=lambda at: at[1])
    if most + 1 > cores:
        raise UserError(
            f"{label} asks for {most + 1} CPUs and the cluster has {cores}; lower sampling.num_env_runners, "
            "learners.num_learners, store.num_workers or task_step.num_workers"
        )
    wanted = min(wanted, cores // (most + 1))
    threads = min(MOST_THREADS, max(1, cores // wanted - most))
    threads = max(1, min(threads, int(max(node["CPU"] for node in nodes))))
    shares = {label: share_of(config, threads) for label, config in parts.items()}
    for label, share in shares.items():
        for bundle in share.bundles():
            if not any(all(node.get(kind, 0) >= count for kind, count in bundle.items()) for node in nodes):
                asked = " and ".join(f"{count:g} {kind}" for kind, count in bundle.items())
                raise UserError(
                    f"{label} asks for {asked} on one node and no node has them; set use_gpu=false, or add one"
                )
    return shares, wanted
