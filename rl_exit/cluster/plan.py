"""The resource plan of a run: what each phase holds at once, what is kept between phases, and whether it all fits.

Phases take turns, so the largest of them counts; workers that are kept through the run count in every phase. Every
actor holds one CPU or one GPU, so a phase fits exactly if the whole CPUs and whole GPUs of the nodes suffice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor

from rl_exit.config import RunConfig
from rl_exit.errors import UserError


@dataclass(frozen=True)
class Role:
    """Actors of one kind, one CPU or one GPU each.

    Attributes:
        name: What they do.
        key: The key that sets their number.
        count: Their number.
        gpu_key: The key that gives each a GPU in place of the CPU.
        on_gpu: Whether it is set.
    """

    name: str
    key: str
    count: int
    gpu_key: str | None = None
    on_gpu: bool = False

    @property
    def resource(self) -> str:
        """``CPU`` or ``GPU``."""
        return "GPU" if self.on_gpu else "CPU"


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster offers."""

    cpus: float
    gpus: float = 0.0

    def units(self, resource: str) -> int:
        """Actors of one whole unit that it has room for."""
        return floor((self.gpus if resource == "GPU" else self.cpus) + 1e-9)


@dataclass(frozen=True)
class Phase:
    """What is held at once while a phase is at work."""

    name: str
    roles: tuple[Role, ...]

    def needs(self, resource: str) -> int:
        """Units of a resource."""
        return sum(role.count for role in self.roles if role.resource == resource)


@dataclass(frozen=True)
class Plan:
    """The run's phases and what is kept.

    Attributes:
        phases: In order; the roles of a phase include those that are kept.
        kept: Keys of the roles that hold their resources through the whole run.
        timeout: Seconds to wait for what others hold.
    """

    phases: tuple[Phase, ...]
    kept: frozenset[str] = frozenset()
    timeout: float = 120.0

    def needs(self, resource: str) -> int:
        """Most units of a resource that any phase holds."""
        return max((phase.needs(resource) for phase in self.phases), default=0)

    def describe(self) -> str:
        """The plan in one line."""
        parts = [f"{phase.name} {_sum(phase)}" for phase in self.phases if phase.roles]
        kept = f"; kept between rounds: {', '.join(sorted(self.kept))}" if self.kept else ""
        return f"plan: {'; '.join(parts)}{kept}" if parts else "plan: everything in this process"


TASK_KEY = "task_step.num_workers"
STORE_KEY = "store.num_workers"
_CHOICES = (frozenset({TASK_KEY, STORE_KEY}), frozenset({TASK_KEY}), frozenset[str]())


def roles(config: RunConfig) -> dict[str, tuple[Role, ...]]:
    """Phase -> the roles of its own."""
    train = Role("Ray Train workers", TASK_KEY, config.task_step.num_workers, "task_step.use_gpu")
    store = Role("store builders", STORE_KEY, config.store.num_workers, "store.use_gpu")
    learners = Role("learners", "learners.num_learners", config.learners.num_learners, "learners.use_gpu")
    train = replace(train, on_gpu=config.task_step.use_gpu)
    store = replace(store, on_gpu=config.store.use_gpu)
    learners = replace(learners, on_gpu=config.learners.use_gpu)
    runners = Role("env runners", "sampling.num_env_runners", config.sampling.num_env_runners)
    phases = {"initialisation and task step": (train,), "state store": (store,), "policy phase": (learners, runners)}
    return {name: tuple(role for role in those if role.count) for name, those in phases.items()}


def make_plan(config: RunConfig, nodes: Sequence[Node] | None) -> Plan:
    """Plan a run.

    Args:
        config: The run.
        nodes: Of the cluster; None: as many as it takes (a session on this machine).

    Returns:
        A plan that fits; of those that ``placement.workers`` allows, the one that keeps most.

    Raises:
        UserError: None fits; the message names resource, number missing, and keys.
    """
    own = roles(config)
    choices = {"keep": _CHOICES[:1], "alternate": _CHOICES[2:], "auto": _CHOICES}[config.placement.workers]
    plans = [_plan(own, keep, config.placement.timeout) for keep in choices]
    if nodes is None:
        return plans[0]
    for plan in plans:
        if not any(_missing(plan, nodes)):
            return plan
    raise UserError(refusal(plans[-1], nodes))


def refusal(plan: Plan, nodes: Sequence[Node]) -> str:
    """Why a plan does not fit: every resource that is short, by how much, and what to change."""
    return "; ".join(_explain(phase, resource, short, nodes, plan) for phase, resource, short in _missing(plan, nodes))


def nodes_of(ray_nodes: Iterable[Mapping[str, object]]) -> list[Node]:
    """Live nodes out of ``ray.nodes()``."""
    found = []
    for node in ray_nodes:
        resources = node.get("Resources")
        if node.get("Alive") and isinstance(resources, Mapping):
            found.append(Node(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0))))
    return found


def _plan(own: Mapping[str, tuple[Role, ...]], keep: frozenset[str], timeout: float) -> Plan:
    kept = [role for those in own.values() for role in those if role.key in keep]
    phases = tuple(
        Phase(name, (*those, *(role for role in kept if role not in those))) for name, those in own.items() if those
    )
    return Plan(phases, frozenset(role.key for role in kept), timeout)


def _missing(plan: Plan, nodes: Sequence[Node]) -> Iterator[tuple[Phase, str, int]]:
    """(phase, resource, units missing) of every resource that is short, in the phase that needs most of it."""
    for resource in ("CPU", "GPU"):
        have = sum(node.units(resource) for node in nodes)
        if plan.needs(resource) > have:
            worst = max(plan.phases, key=lambda phase: phase.needs(resource))
            yield worst, resource, worst.needs(resource) - have


def _explain(phase: Phase, resource: str, short: int, nodes: Sequence[Node], plan: Plan) -> str:
    have = sum(node.units(resource) for node in nodes)
    message = (
        f"the cluster has {_units(have, resource)} on {_count(len(nodes), 'node')}, and the {phase.name} needs "
        f"{phase.needs(resource)} at once ({_sum(phase, resource)}): {_units(short, resource)} "
        f"{'is' if short == 1 else 'are'} missing; lower {_advice(phase, resource, short)}"
    )
    if resource == "GPU":
        keys = [role.gpu_key for role in phase.roles if role.on_gpu and role.gpu_key]
        message += f", or set {' and '.join(f'{key}=false' for key in keys)}"
    elif plan.kept:
        message += ", or set placement.workers=alternate"
    return message


def _advice(phase: Phase, resource: str, short: int) -> str:
    """Which keys to lower to what: the most numerous first, until nothing is missing in this phase."""
    changes = []
    for role in sorted((r for r in phase.roles if r.resource == resource), key=lambda r: -r.count):
        less = min(short, role.count)
        if less:
            changes.append(f"{role.key} to {role.count - less}")
            short -= less
    return " and ".join(changes)


def _sum(phase: Phase, resource: str | None = None) -> str:
    parts = [role for role in phase.roles if resource in (None, role.resource)]
    return " + ".join(f"{role.key}={role.count}{' on GPUs' if role.on_gpu and not resource else ''}" for role in parts)


def _units(number: int, resource: str) -> str:
    return _count(number, resource)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
