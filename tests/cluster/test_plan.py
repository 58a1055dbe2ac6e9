"""The plan against a simulated cluster: what it accepts ends however actors are placed, what it refuses would hang."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_exit.cluster.plan import STORE_KEY, TASK_KEY, Node, Plan, make_plan, nodes_of, refusal
from rl_exit.config import RunConfig, load_config
from rl_exit.errors import UserError

NUMBERS = {
    "sampling.num_env_runners": st.integers(0, 6),
    "learners.num_learners": st.integers(0, 3),
    STORE_KEY: st.integers(0, 5),
    TASK_KEY: st.integers(0, 4),
}
FLAGS = {
    "learners.use_gpu": st.booleans(),
    "store.use_gpu": st.booleans(),
    "task_step.use_gpu": st.booleans(),
    "placement.workers": st.sampled_from(["auto", "keep", "alternate"]),
}
configs = st.fixed_dictionaries(NUMBERS | FLAGS).map(
    lambda words: load_config(None, [f"{k}={v}" for k, v in words.items()])
)
clusters = st.lists(st.tuples(st.sampled_from([0, 0.5, 1, 2, 3, 5]), st.integers(0, 2)), min_size=1, max_size=4).map(
    lambda nodes: [Node(*node) for node in nodes]
)


class Hung(Exception):
    """An actor waits for a place and nobody will give one back."""


class SimulatedCluster:
    """Places actors one by one on any node with room, as an adversary would; knows nothing of the plan."""

    def __init__(self, nodes: list[Node], seed: int) -> None:
        self.free = [{"CPU": node.cpus, "GPU": node.gpus} for node in nodes]
        self.random = random.Random(seed)

    def place(self, resource: str) -> tuple[int, str]:
        room = [number for number, free in enumerate(self.free) if free[resource] >= 1]
        if not room:
            raise Hung(resource)
        number = self.random.choice(room)
        self.free[number][resource] -= 1
        return number, resource

    def give_back(self, actors: list[tuple[int, str]]) -> None:
        for number, resource in actors:
            self.free[number][resource] += 1


def go_through(config: RunConfig, kept: frozenset[str], cluster: SimulatedCluster) -> None:
    """The order in which a run takes and gives back, as rl_exit.trainers.alternation does it."""
    held: dict[str, list[tuple[int, str]]] = {}

    def turn(key: str, count: int, on_gpu: bool) -> None:
        if key not in held:
            held[key] = [cluster.place("GPU" if on_gpu else "CPU") for _ in range(count)]

    def over(key: str) -> None:
        if key not in kept:
            cluster.give_back(held.pop(key))

    def train() -> None:
        turn(TASK_KEY, config.task_step.num_workers, config.task_step.use_gpu)
        over(TASK_KEY)

    train()  # initialisation
    for _ in range(2):
        turn(STORE_KEY, config.store.num_workers, config.store.use_gpu)
        over(STORE_KEY)
        turn("learners", config.learners.num_learners, config.learners.use_gpu)
        turn("runners", config.sampling.num_env_runners, False)
        over("learners")
        over("runners")
        train()


def accepted(config: RunConfig, nodes: list[Node]) -> Plan | str:
    try:
        return make_plan(config, nodes)
    except UserError as error:
        return str(error)


@settings(max_examples=150, deadline=None)
@given(config=configs, nodes=clusters, seed=st.integers(0, 2**16))
def test_a_run_starts_and_ends_or_is_refused_with_the_key_to_change(
    config: RunConfig, nodes: list[Node], seed: int
) -> None:
    plan = accepted(config, nodes)
    if isinstance(plan, Plan):
        go_through(config, plan.kept, SimulatedCluster(nodes, seed))
        return
    # What is refused would have waited for ever, in whatever way it keeps its workers.
    least = frozenset({TASK_KEY, STORE_KEY}) if config.placement.workers == "keep" else frozenset[str]()
    with pytest.raises(Hung):
        go_through(config, least, SimulatedCluster(nodes, seed))
    # The message names what is missing, and doing what it says is enough.
    for _ in range(6):
        words = re.findall(r"([a-z_]+\.num_\w+) to (\d+)", plan)
        assert words and re.search(r"\d+ [CG]PUs? (is|are) missing; lower", plan), plan
        tree = config.model_dump()
        for key, number in words:
            section, name = key.split(".")
            assert int(number) < tree[section][name]
            tree[section][name] = int(number)
        config = RunConfig.model_validate(tree)
        plan = accepted(config, nodes)
        if isinstance(plan, Plan):
            go_through(config, plan.kept, SimulatedCluster(nodes, seed))
            return
    raise AssertionError(f"still refused: {plan}")


def test_the_simulation_would_notice_a_plan_that_takes_too_much() -> None:
    config = load_config(None, ["sampling.num_env_runners=2", "task_step.num_workers=2"])
    nodes = [Node(2)]
    assert make_plan(config, nodes).kept == frozenset()
    with pytest.raises(Hung):
        go_through(config, frozenset({TASK_KEY}), SimulatedCluster(nodes, 0))


def test_workers_are_kept_where_there_is_room() -> None:
    words = ["sampling.num_env_runners=2", "task_step.num_workers=2", "store.num_workers=1"]
    config = load_config(None, words)
    assert make_plan(config, [Node(3), Node(2)]).kept == {TASK_KEY, STORE_KEY}
    assert make_plan(config, [Node(4)]).kept == {TASK_KEY}
    assert make_plan(config, [Node(2)]).kept == frozenset()
    assert make_plan(config, None).kept == {TASK_KEY, STORE_KEY}
    assert make_plan(config, None).needs("CPU") == 5
    assert make_plan(load_config(None, [*words, "placement.workers=alternate"]), None).needs("CPU") == 2
    with pytest.raises(UserError, match=r"or set placement\.workers=alternate"):
        make_plan(load_config(None, [*words, "placement.workers=keep"]), [Node(4)])


def test_one_message_has_every_resource_that_is_short() -> None:
    config = load_config(
        None,
        ["sampling.num_env_runners=3", "learners.num_learners=2", "task_step.num_workers=2", "task_step.use_gpu=true"],
    )
    with pytest.raises(UserError) as told:
        make_plan(config, [Node(2.5), Node(2, 1)])
    assert str(told.value) == (
        "the cluster has 4 CPUs on 2 nodes, and the policy phase needs 5 at once (learners.num_learners=2 + "
        "sampling.num_env_runners=3): 1 CPU is missing; lower sampling.num_env_runners to 2; "
        "the cluster has 1 GPU on 2 nodes, and the initialisation and task step needs 2 at once "
        "(task_step.num_workers=2): 1 GPU is missing; lower task_step.num_workers to 1, or set task_step.use_gpu=false"
    )


def test_the_plan_is_told_in_one_line() -> None:
    plan = make_plan(load_config(None, ["sampling.num_env_runners=2", "task_step.num_workers=1"]), None)
    assert plan.describe() == (
        "plan: initialisation and task step task_step.num_workers=1; policy phase sampling.num_env_runners=2 + "
        "task_step.num_workers=1; kept between rounds: task_step.num_workers"
    )
    assert make_plan(load_config(), None).describe() == "plan: everything in this process"
    assert refusal(plan, [Node(3)]) == ""


def test_dead_nodes_and_nodes_without_processors_count_for_nothing() -> None:
    found = nodes_of(
        [
            {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0, "memory": 1e9}},
            {"Alive": False, "Resources": {"CPU": 8.0}},
            {"Alive": True, "Resources": {}},
        ]
    )
    assert found == [Node(2, 1), Node(0, 0)]
