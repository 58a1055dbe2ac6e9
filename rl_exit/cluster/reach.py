"""Whether what a run writes outlives its node: on several nodes it must lie where all of them see it."""

from __future__ import annotations

import uuid
from pathlib import Path

from rl_exit.config import RunConfig
from rl_exit.errors import UserError
from rl_exit.storage import Storage

LOOK_SECONDS = 60.0
_LOCAL_PROTOCOLS = ("file", "local", "memory")


def check_reach(config: RunConfig) -> None:
    """Refuse a run on several nodes whose place is one node's own.

    A path is probed: a file is laid there, and every node is asked whether it sees it. A URL of a file system that is
    not a node's own is taken as it is.

    Raises:
        UserError: With the node that does not see the place, and what to give.
    """
    nodes = _nodes()
    if len(nodes) < 2:
        return
    place = config.storage_path or config.output_dir
    protocol = place.partition("://")[0] if "://" in place else "file"
    if protocol not in _LOCAL_PROTOCOLS:
        return
    key = "storage_path" if config.storage_path else "output_dir"
    if protocol == "memory":
        raise UserError(f"{key}={place}: is the memory of one process; the run has {len(nodes)} nodes")
    _refuse_blind(Path(Storage(place).path).absolute(), f"{key}={place}", nodes)


def check_folder(folder: Path) -> None:
    """Refuse a sweep whose folder, where its trials are, is one node's own.

    Raises:
        UserError: As :func:`check_reach`.
    """
    nodes = _nodes()
    if len(nodes) > 1:
        _refuse_blind(folder.absolute(), f"the sweep's folder {folder}", nodes)


def _nodes() -> dict[str, str]:
    """Address of each live node, by id; none without Ray."""
    import sys

    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _refuse_blind(folder: Path, name: str, nodes: dict[str, str]) -> None:
    blind = _who_does_not_see(folder, list(nodes))
    if blind:
        shown = ", ".join(sorted({nodes[node] for node in blind}))
        raise UserError(
            f"{name} is a path of this node alone: {len(blind)} of {len(nodes)} nodes ({shown}) do not see it, "
            "so workers there could neither read nor write the run, and it would be lost with this node. Give "
            "storage_path=... a folder that all nodes share (NFS), or a URL such as s3://bucket/runs"
        )


def _who_does_not_see(folder: Path, nodes: list[str]) -> list[str]:
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".rl-exit-probe-{uuid.uuid4().hex}"
    probe.touch()
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(_sees)
        asked = {
            node: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(str(probe))
            for node in nodes
        }
        blind = []
        for node, answer in asked.items():
            try:
                if not ray.get(answer, timeout=LOOK_SECONDS):
                    blind.append(node)
            except GetTimeoutError:
                raise UserError(f"node {node[:8]} of the cluster has not answered in {LOOK_SECONDS:.0f} s") from None
            except RayError:  # it has gone meanwhile; the run is told in its own way
                continue
        return blind
    finally:
        probe.unlink(missing_ok=True)


def _sees(path: str) -> bool:
    import os

    # Looking into the folder first: a network file system may remember that a file was not there.
    folder = os.path.dirname(path)  # noqa: PTH120 - sent as it is, without imports of this module
    return os.path.isdir(folder) and os.path.basename(path) in os.listdir(folder)  # noqa: PTH112, PTH119, PTH208
