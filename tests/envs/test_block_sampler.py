"""Blocks of trajectories: the plan, reproducibility, and the distribution they are drawn from."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rl_exit.envs.sampler import ArrayPolicy, BlockPlan, BlockSampler, RewardTable, join, linear_schedule, take
from rl_exit.envs.state_store import StateStore, StateStoreWriter
from rl_exit.method import exit_distribution, rewards
from rl_exit.models.policy import PolicyHeads
from rl_exit.models.policy_arrays import exit_logits


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("store") / "store"
    writer = StateStoreWriter(path, 4, 6, 2, "float32", 20)
    writer.append(
        np.arange(50),
        np.zeros(50, int),
        rng.standard_normal((50, 4, 6), dtype=np.float32),
        rng.exponential(1.0, (50, 4)).astype(np.float32),
        rng.random((50, 4)) < 0.5,
        np.zeros((50, 4, 2), np.float32),
    )
    writer.close()
    return path


def _parts(
    path: Path, batch_size: int = 16, block_rows: int = 6, trajectories: int = 5
) -> tuple[BlockSampler, BlockPlan]:
    store = StateStore.open(path)
    sampler = BlockSampler.over(store, seed=3, trajectories=trajectories, reward="hardness", alpha=0.1)
    return sampler, BlockPlan.over(store, batch_size, 3, block_rows)


def _policy(seed: int = 0) -> PolicyHeads:
    torch.manual_seed(seed)
    return PolicyHeads(4, 6, 8)


def _arrays(heads: PolicyHeads) -> ArrayPolicy:
    weights = {name: value.numpy() for name, value in heads.state_dict().items()}
    return lambda states: exit_logits(weights, states)


@pytest.mark.parametrize(("count", "batch", "rows"), [(50, 16, 6), (50, 16, 16), (50, 7, 256), (1, 8, 3), (48, 16, 8)])
@pytest.mark.parametrize("bounds", [(), (7,), (7, 30)])
def test_blocks_cover_every_instance_once(count: int, batch: int, rows: int, bounds: tuple[int, ...]) -> None:
    bounds = tuple(bound for bound in bounds if bound < count)
    plan = BlockPlan(count, batch, 0, rows, bounds)
    seen, numbers = [], []
    for update in range(plan.updates):
        blocks = plan.blocks(2, update)
        assert all(0 < len(block.rows) <= 1.5 * rows for block in blocks)
        whole = np.concatenate([block.rows for block in blocks])
        expected = plan.permutation(2)[update * batch : (update + 1) * batch]
        assert sorted(whole) == sorted(expected)
        if bounds:
            edges = (0, *bounds, count)
            assert all(edges[b.group] <= b.rows.min() and b.rows.max() < edges[b.group + 1] for b in blocks)
        else:
            firsts = range(0, len(expected), rows)
            assert [sorted(b.rows) for b in blocks] == [sorted(expected[at : at + rows]) for at in firsts]
        assert all((np.diff(block.rows) > 0).all() for block in blocks)
        seen.append(whole)
        numbers += [block.number for block in blocks]
    assert sorted(np.concatenate(seen)) == list(range(count))
    assert len(set(numbers)) == len(numbers)


def test_groups_follow_from_store_and_sizes(store_path: Path) -> None:
    store = StateStore.open(store_path)  # shards of 20, 20 and 10
    assert BlockPlan.over(store, 16, 0, 16).bounds == ()  # one block an update: no runner could draw a part of it
    assert BlockPlan.over(store, 32, 0, 16).bounds == (20,)
    assert BlockPlan.over(store, 48, 0, 16).bounds == (20, 40)
    assert BlockPlan.over(store, 50, 0, 1).bounds == (20, 40)  # no more groups than shards


def test_order_depends_on_seed_and_epoch() -> None:
    plan = BlockPlan(50, 16, 0)
    assert (plan.permutation(0) == BlockPlan(50, 8, 0).permutation(0)).all()
    assert (plan.permutation(0) != plan.permutation(1)).any()
    assert (plan.permutation(0) != BlockPlan(50, 16, 1).permutation(0)).any()


def test_a_block_is_the_same_whoever_draws_it_and_when(store_path: Path) -> None:
    policy = _arrays(_policy())
    (first, plan), (second, _) = _parts(store_path), _parts(store_path)
    blocks = plan.blocks(1, 0)
    assert len(blocks) >= 2
    in_order = [first.draw(policy, block, 0.2) for block in blocks]
    backwards = [second.draw(policy, block, 0.2) for block in blocks[::-1]][::-1]
    for one, other in zip(in_order, backwards, strict=True):
        for name, column in vars(one).items():
            np.testing.assert_array_equal(column, getattr(other, name))
    for changed in (replace(blocks[0], epoch=2), replace(blocks[0], number=99)):
        assert (first.draw(policy, changed, 0.2).exit_layer != in_order[0].exit_layer).any()


def test_draws_follow_the_exit_distribution_and_rewards_are_the_formula(store_path: Path) -> None:
    heads = _policy()
    sampler, plan = _parts(store_path, batch_size=50, block_rows=50, trajectories=4000)
    drawn = sampler.draw(_arrays(heads), plan.blocks(0, 0)[0], 0.3)
    store = sampler.reader.store
    with torch.no_grad():
        pi = heads(store.states(drawn.instance)).sigmoid().double()
    chance = exit_distribution(0.7 * pi + 0.15).numpy()
    counts = np.stack([np.bincount(row, minlength=5)[1:] for row in drawn.exit_layer])

    def chi_square(probability: np.ndarray) -> float:
        return float((((counts - 4000 * probability) ** 2) / (4000 * probability)).sum())

    # 50 * 3 degrees of freedom: mean 150, standard deviation sqrt(300).
    assert chi_square(chance) < 150 + 5 * np.sqrt(300)
    assert chi_square(exit_distribution(pi).numpy()) > 150 + 50 * np.sqrt(300)  # without exploration: another policy
    table = rewards(store.losses, store.memorized(), 0.1)
    np.testing.assert_array_equal(
        drawn.reward, np.take_along_axis(table[drawn.instance], drawn.exit_layer.astype(int) - 1, 1)
    )
    np.testing.assert_allclose(
        drawn.log_prob, np.log(np.take_along_axis(chance, drawn.exit_layer.astype(int) - 1, 1)), rtol=1e-4, atol=1e-5
    )


def test_states_are_gathered_once_for_the_same_rows(store_path: Path) -> None:
    reader = _parts(store_path)[0].reader
    rows = np.array([4, 30, 2])
    states = reader.gather(rows)
    assert reader.gather(rows.astype(np.int32)) is states
    other = reader.gather(np.array([4, 30, 3]))
    assert not np.array_equal(other, states)
    np.testing.assert_array_equal(states, reader.store.states(rows))


def test_rewards_are_those_of_the_whole_table(store_path: Path) -> None:
    store = StateStore.open(store_path)
    rows = np.random.default_rng(0).integers(0, 50, 40)
    for kind in ("hardness", "vanilla"):
        whole = rewards(store.losses, store.memorized(), 0.1, kind)
        np.testing.assert_array_equal(RewardTable(store, kind, 0.1)(rows), whole[rows])
        assert (RewardTable(store, kind, 0.2)(rows) != whole[rows]).any()


def test_join_and_take(store_path: Path) -> None:
    sampler, plan = _parts(store_path)
    policy = _arrays(_policy())
    parts = [sampler.draw(policy, block, 0.0) for block in plan.blocks(0, 0)]
    whole = join(parts)
    assert len(whole) == sum(map(len, parts))
    np.testing.assert_array_equal(take(whole, slice(len(parts[0].instance), None)).reward, join(parts[1:]).reward)
    with pytest.raises(ValueError, match="at least one"):
        join([])


def test_sampling_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys\nfor name in ('torch', 'ray', 'transformers'): sys.modules[name] = None\n"
        "import rl_exit.envs.sampler, rl_exit.models.policy_arrays"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_schedule_is_a_line_between_its_ends() -> None:
    values = [linear_schedule(0.2, 0.0, step, 5) for step in range(5)]
    np.testing.assert_allclose(values, [0.2, 0.15, 0.1, 0.05, 0.0], atol=1e-12)
    assert linear_schedule(0.2, 0.0, 0, 1) == 0.2


@pytest.mark.parametrize(
    "bad", [{"num_instances": 0}, {"batch_size": 0}, {"seed": -1}, {"block_rows": 0}, {"bounds": (4,)}]
)
def test_bad_plans_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="BlockPlan"):
        BlockPlan(**{"num_instances": 4, "batch_size": 2, "seed": 0, "block_rows": 2, **bad})
