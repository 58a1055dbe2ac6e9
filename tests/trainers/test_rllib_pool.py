"""Sampling actors over several nodes: one batch whoever draws it, lost nodes, absent disks, little memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from rllib_stores import heads, random_store, share_of_best, solvable_store

from rl_exit.cluster.plan import make_plan, nodes_of
from rl_exit.config import load_config
from rl_exit.envs.sampler import Block, BlockPlan, BlockSampler, join
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import RunError, UserError
from rl_exit.method import Trajectories
from rl_exit.models.policy_arrays import exit_logits
from rl_exit.trainers.placement import await_room
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, build_algorithm, train_policy
from rl_exit.trainers.rllib import pool as pool_module
from rl_exit.trainers.rllib.pool import SamplerPool, idle_worker_megabytes
from rl_exit.trainers.rllib.remote import SamplerActor, SamplerSettings

SETTINGS: dict[str, Any] = {"seed": 5, "trajectories": 8, "reward": "hardness", "alpha": 0.1}
QUICK = PolicyPhaseSettings(
    epochs=2, batch_size=32, trajectories=4, reward="vanilla", alpha=0.05, width=16, epsilon=0.2, minibatch_size=16
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=2)
    ray.init(
        address=made.address,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    return random_store(tmp_path_factory.mktemp("store") / "store", count=600, shard_size=150)


def _weights(store: StateStore) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in heads(store).state_dict().items()}


def _plan(store: StateStore) -> BlockPlan:
    return BlockPlan.over(store, 300, 5, block_rows=64)


def _alone(store: StateStore, blocks: list[Block]) -> Trajectories:
    sampler = BlockSampler.over(store, **SETTINGS)
    weights = _weights(store)
    return join([sampler.draw(lambda states: exit_logits(weights, states), block, 0.1) for block in blocks])


def _pool(store: StateStore, count: int, transport: str = "auto") -> SamplerPool:
    return SamplerPool(count, store, _plan(store).groups, transport=transport, **SETTINGS)


def _same(one: Trajectories, other: Trajectories) -> bool:
    return all(np.array_equal(value, getattr(other, name)) for name, value in vars(one).items())


def test_an_actor_needs_neither_torch_nor_rllib() -> None:
    code = (
        "import sys, rl_exit.trainers.rllib.remote\n"
        "print([name for name in ('torch', 'ray.rllib', 'transformers', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_actor_draws_what_this_process_would_and_maps_what_it_needs(store: StateStore) -> None:
    manifest = (store.path / "store.json").read_text()
    actor = SamplerActor(SamplerSettings(path=str(store.path), manifest=manifest, transport="auto", **SETTINGS))
    assert actor.hello()
    blocks = [block for block in _plan(store).blocks(0, 0) if block.group in (1, 2)]
    drawn = actor.draw(_weights(store), blocks, 0.1)
    expected = _alone(store, blocks)
    for at, name in enumerate(("exit_layer", "log_prob", "reward")):
        np.testing.assert_array_equal(np.concatenate([columns[at] for columns in drawn]), getattr(expected, name))
    assert actor._sampler.reader.store.mapped_shards == (1, 2)
    other = SamplerSettings(path=str(store.path), manifest=manifest + " ", transport="auto", **SETTINGS)
    assert not SamplerActor(other).hello()  # another store at the same path
    with pytest.raises(RunError, match=r"sampling\.transport=objects"):
        SamplerActor(replace(other, transport="path"))


@pytest.mark.ray
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_actors_gives_the_same_batch(cluster: Cluster, store: StateStore, count: int) -> None:
    plan = _plan(store)
    assert plan.groups == 4
    blocks = plan.blocks(0, 1)
    pool = _pool(store, count)
    pool.wait()
    drawn = join(pool.sample(blocks, _weights(store), 0.1))
    assert _same(drawn, _alone(store, blocks))
    assert not _same(drawn, _alone(store, plan.blocks(1, 1)))
    # Each maps the shards of its own groups alone, and all shards have an owner.
    mapped = [usage["shards"] for usage in pool.usage()]
    assert sorted(index for shards in mapped for index in shards) == list(range(4))
    assert all(len(shards) == 4 // count for shards in mapped)
    pool.stop()


@pytest.mark.ray
def test_a_batch_travels_in_few_bytes_and_an_actor_holds_little(cluster: Cluster, store: StateStore) -> None:
    blocks = _plan(store).blocks(0, 0)
    pool = _pool(store, 1)
    pool.wait()
    drawn = pool.sample(blocks, _weights(store), 0.1)
    reply = [(part.exit_layer, part.log_prob, part.reward) for part in drawn]
    both_ways = len(cloudpickle.dumps(reply)) + len(cloudpickle.dumps(blocks))
    assert both_ways / sum(map(len, drawn)) <= 16
    assert len(cloudpickle.dumps([part.log_prob for part in drawn])) / sum(map(len, drawn)) > 4  # it is measured
    (usage,) = pool.usage()
    assert 0 < usage["private_mb"] - idle_worker_megabytes() <= 100
    pool.stop()


@pytest.mark.slow
@pytest.mark.ray
def test_killing_a_node_in_the_middle_costs_time_but_no_trajectory(cluster: Cluster, store: StateStore) -> None:
    node = cluster.add_node(num_cpus=2)
    pool = _pool(store, 5)  # more than the other nodes have room for beside it
    pool.wait()
    until = time.monotonic() + 60.0  # wait() is content with one actor; the one on the new node may come later
    while not any(usage["node"] == node.node_id for usage in pool.usage()):
        assert time.monotonic() < until, "no actor was placed on the new node"
        time.sleep(0.2)
    plan, weights = _plan(store), _weights(store)
    killer = threading.Timer(0.3, cluster.remove_node, (node,), {"allow_graceful": False})
    started = time.monotonic()
    killer.start()
    epochs = 0
    while killer.is_alive() or time.monotonic() - started < 2.0:
        for update in range(plan.updates):
            blocks = plan.blocks(epochs, update)
            assert _same(join(pool.sample(blocks, weights, 0.1)), _alone(store, blocks))
        epochs += 1
    assert len(pool._alive) < 5  # some were lost
    assert time.monotonic() - started < 120
    pool.stop()
    while any(one["NodeID"] == node.node_id and one["Alive"] for one in ray.nodes()):  # the next tests count the nodes
        assert time.monotonic() - started < 120, "Ray still takes the node for alive"
        time.sleep(0.2)


@pytest.mark.ray
def test_shards_come_through_the_object_store_where_the_path_is_absent(
    cluster: Cluster, store: StateStore, tmp_path: Path
) -> None:
    blocks = _plan(store).blocks(0, 0)
    expected = _alone(store, blocks)
    forced = _pool(store, 2, "objects")
    assert _same(join(forced.sample(blocks, _weights(store), 0.1)), expected)
    assert sorted(forced._objects) == [0, 1, 2, 3]
    ray.kill(forced.actors[0], no_restart=False)  # what restarts knows nothing of the shards any more
    for _ in range(3):
        assert _same(join(forced.sample(blocks, _weights(store), 0.1)), expected)
    forced.stop()
    # The actors' nodes have something else at that path.
    elsewhere = StateStore.open(store.path)
    elsewhere.path = tmp_path / "absent"
    elsewhere.path.mkdir()
    for file in store.path.iterdir():
        (elsewhere.path / file.name).symlink_to(file)
    pool = _pool(elsewhere, 1)
    (elsewhere.path / "store.json").unlink()
    (elsewhere.path / "store.json").write_text("{}")
    assert _same(join(pool.sample(blocks, _weights(store), 0.1)), expected)
    assert not any(pool._alive.values())
    pool.stop()


@pytest.mark.ray
def test_a_path_that_is_demanded_but_absent_is_told(cluster: Cluster, store: StateStore, tmp_path: Path) -> None:
    elsewhere = StateStore.open(store.path)
    elsewhere.path = tmp_path
    (tmp_path / "store.json").write_text((store.path / "store.json").read_text() + " ")
    pool = _pool(elsewhere, 1, "path")
    (tmp_path / "store.json").unlink()
    with pytest.raises(RunError, match=r"sampling.transport=objects"):
        pool.wait()
    pool.stop()


@pytest.mark.ray
def test_too_few_cpus_are_told_and_lost_actors_are_not_awaited_for_ever(
    cluster: Cluster, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = _pool(store, 9)  # more than any node that came or went meanwhile could add
    with pytest.raises(RunError, match=r"of 9 sampling runners are up .* the cluster has [567]\b"):
        pool.wait(seconds=4.0)
    pool.stop()
    monkeypatch.setattr(pool_module, "RESTORE_SECONDS", 2.0)
    pool = _pool(store, 1)
    pool.wait()
    ray.kill(pool.actors[0], no_restart=True)
    with pytest.raises(RunError, match=r"runner"):
        pool.sample(_plan(store).blocks(0, 0), _weights(store), 0.1)
    pool.stop()


@pytest.mark.ray
def test_what_the_plan_accepts_has_room_and_what_it_refuses_has_none(cluster: Cluster) -> None:
    nodes = nodes_of(ray.nodes())
    have = sum(node.units("CPU") for node in nodes)
    for number in (1, have, have + 1, have + 3):
        config = load_config(None, [f"sampling.num_env_runners={number}"])
        if number <= have:
            make_plan(config, nodes)
            await_room("runners", 20.0, cpus=number)
            continue
        with pytest.raises(
            UserError, match=rf"{number - have} CPUs? (is|are) missing; lower sampling.num_env_runners to {have}"
        ):
            make_plan(config, nodes)
        with pytest.raises(RunError, match=rf"no room for {number} CPUs within 0.5 s .* the cluster has {have} CPUs"):
            await_room("runners", 0.5, cpus=number)
    with pytest.raises(RunError, match=r"no room for 1 CPU and 1 GPU .* 0 GPUs, of which 0 are free"):
        await_room("learners", 0.5, cpus=1, gpus=1)


@pytest.mark.ray
@pytest.mark.parametrize("algorithm", ["pg", pytest.param("ppo", marks=pytest.mark.slow)])
def test_overlap_has_a_lag_of_one_and_depends_on_no_timing(cluster: Cluster, store: StateStore, algorithm: str) -> None:
    start = heads(store).state_dict()
    settings = replace(QUICK, algorithm=algorithm, overlap=True, num_env_runners=2, batch_size=60, epochs=1)
    first = train_policy(store.path, start, settings)
    assert first.rows[0]["policy_lag"] == 0.0  # one update an iteration, and nothing was drawn before the first
    assert [row["policy_lag"] for row in first.rows[1:]] == [1.0] * 9
    algo = build_algorithm(store.path, replace(settings, num_env_runners=3))
    algo.load_policy(start)
    while not algo.finished:
        time.sleep(0.02)
        algo.train()
    again = algo.policy_weights()
    algo.stop()
    assert all(torch.equal(value, again[name]) for name, value in first.weights.items())
    strict = train_policy(store.path, start, replace(settings, overlap=False))
    assert all(row["policy_lag"] == 0.0 for row in strict.rows)
    assert not torch.equal(strict.weights["weight_in"], again["weight_in"])


@pytest.mark.ray
@pytest.mark.parametrize("algorithm", ["pg", pytest.param("ppo", marks=pytest.mark.slow)])
def test_overlap_finds_the_best_exits(cluster: Cluster, tmp_path: Path, algorithm: str) -> None:
    store = solvable_store(tmp_path / "store")
    settings = PolicyPhaseSettings(
        algorithm=algorithm,
        epochs=40,
        batch_size=64,
        alpha=0.0,
        reward="vanilla",
        lr=1e-2,
        width=16,
        minibatch_size=64,
        overlap=True,
        num_env_runners=1,
    )
    result = train_policy(store.path, heads(store).state_dict(), settings)
    assert share_of_best(store, result.weights) > 0.99
