from __future__ import annotations

import pytest

from rl_exit.cluster.sweeps import allot
from rl_exit.config import RunConfig, load_config
from rl_exit.errors import UserError
from rl_exit.trainers.sweep import Share, share_of


def parts(count: int, *words: str) -> dict[str, RunConfig]:
    return {f"trial-{index}": load_config(None, list(words)) for index in range(count)}


@pytest.mark.parametrize(
    ("cores", "count", "asked", "at_once", "threads"),
    [
        (2, 6, None, 1, 2),
        (16, 6, None, 4, 4),
        (64, 3, None, 3, 8),
        (2, 6, 2, 2, 1),
        (2, 6, 4, 4, 1),  # slow but right
        (8, 1, 4, 1, 8),
    ],
)
def test_cores_of_one_machine_are_shared(cores: int, count: int, asked: int | None, at_once: int, threads: int) -> None:
    shares, found = allot(parts(count), cores, asked)
    assert found == at_once
    assert set(shares.values()) == {Share(cpus=threads)}


def test_a_cluster_is_never_asked_for_more_than_it_has() -> None:
    runs = parts(10, "sampling.num_env_runners=2", "learners.num_learners=1", "task_step.num_workers=2")
    for cores in range(6, 40):
        for asked in (None, 1, 3, 8):
            shares, at_once = allot(runs, cores, asked, [{"CPU": float(cores)}])
            assert 1 <= at_once <= (asked or 10)
            assert at_once * max(share.total for share in shares.values()) <= cores
    with pytest.raises(UserError, match="trial-0 asks for 6 CPUs and the cluster has 5"):
        allot(runs, 5, None, [{"CPU": 5.0}])


def test_no_trial_asks_for_more_than_a_node_has() -> None:
    small = [{"CPU": 2.0, "GPU": 0.0}] * 3
    shares, _ = allot(parts(3), 6, None, small)
    assert all(bundle["CPU"] <= 2 for share in shares.values() for bundle in share.bundles())
    with pytest.raises(UserError, match=r"asks for .* GPU on one node and no node has them"):
        allot(parts(1, "task_step.use_gpu=true"), 6, None, small)


def test_what_a_run_holds() -> None:
    plain = share_of(load_config(), 2)
    assert plain == Share(cpus=2) and plain.bundles() == [{"CPU": 2.0}]
    words = ["sampling.num_env_runners=2", "learners.num_learners=1", "learners.use_gpu=true", "store.num_workers=2"]
    spread = share_of(load_config(None, words), 1)
    assert spread.bundles() == [{"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0}]
    assert spread.total == 4
    alone = share_of(load_config(None, ["task_step.use_gpu=true"]), 1)
    assert alone.bundles() == [{"CPU": 1.0, "GPU": 1.0}]
    workers = share_of(load_config(None, ["task_step.use_gpu=true", "task_step.num_workers=2"]), 1)
    assert workers.bundles() == [{"CPU": 1.0}] and workers.total == 3  # Ray Train reserves its own
