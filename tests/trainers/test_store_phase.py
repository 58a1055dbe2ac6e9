"""The state store of a model: content, going on after a kill, and the same from a pool of Ray actors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rl_exit.data.instances import Instances
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import RunError, UserError
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.trainers import store_phase
from rl_exit.trainers.store_phase import build_store, model_fingerprint

SHARD, BATCH = 16, 5
COLUMNS = ("ids", "labels", "losses", "correct", "logits")


class Counts:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def update(self, done: float, note: str = "") -> None:
        self.seen.append(done)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the actors: then sums are taken in the same order
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> tuple[Path, Path]:
    """(folder of a model, file of 60 instances of 3 to 12 tokens)."""
    folder = tmp_path_factory.mktemp("desk")
    model = EarlyExitModel.from_backbone(str(tiny_backbone), ("animal", "tool"), policy_width=8)
    model.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 13, 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    instances = Instances(
        ids=np.arange(100, 160, dtype=np.int64),
        labels=rng.integers(0, 2, 60).astype(np.int64),
        tokens=rng.integers(4, 20, offsets[-1]).astype(np.int32),
        offsets=offsets,
        token_types=None,
        pad_token_id=0,
    )
    instances.save(folder / "train.arrow")
    return folder / "model", folder / "train.arrow"


def build(desk: tuple[Path, Path], path: Path, num_workers: int = 0, progress: Counts | None = None) -> StateStore:
    model, instances = EarlyExitModel.from_pretrained(desk[0]), Instances.open(desk[1])
    return build_store(
        model,
        instances,
        path,
        "float32",
        SHARD,
        BATCH,
        progress or Counts(),
        num_workers=num_workers,
        model_path=desk[0],
        instances_path=desk[1],
    )


def same(one: StateStore, other: StateStore) -> bool:
    rows = np.arange(one.num_instances)
    states = np.array_equal(one.states(rows), other.states(rows))
    return states and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in COLUMNS)


@pytest.fixture(scope="module")
def here(desk: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    """Built in this process."""
    return build(desk, tmp_path_factory.mktemp("here") / "store")


def test_rows_are_what_the_model_says_of_each_instance_alone(here: StateStore, desk: tuple[Path, Path]) -> None:
    model, instances = EarlyExitModel.from_pretrained(desk[0]).eval(), Instances.open(desk[1])
    assert (here.num_instances, len(here.shards)) == (60, 4)
    assert np.array_equal(here.ids, instances.ids) and np.array_equal(here.labels, instances.labels)
    for row in (0, 15, 16, 59):
        with torch.inference_mode():
            out = model.all_exits(**instances.batch([row]))
        # Another batch, hence other padding: equal up to rounding.
        np.testing.assert_allclose(here.states([row]), out.states.numpy(), atol=1e-5)
        assert not np.allclose(here.states([(row + 1) % 60]), out.states.numpy(), atol=1e-5)
        losses = [
            float(F.cross_entropy(logits[None], torch.tensor([instances.labels[row]]))) for logits in out.logits[0]
        ]
        np.testing.assert_allclose(here.losses[row], losses, atol=1e-5)
    assert np.array_equal(here.correct, here.logits.argmax(-1) == here.labels[:, None])


def test_the_store_carries_both_fingerprints(here: StateStore, desk: tuple[Path, Path]) -> None:
    model, instances = EarlyExitModel.from_pretrained(desk[0]), Instances.open(desk[1])
    assert here.instances_fingerprint == instances.fingerprint
    assert here.model_fingerprint == model_fingerprint(model)
    with torch.no_grad():
        model.policy.bias_out += 1.0
        assert model_fingerprint(model) == here.model_fingerprint  # states do not depend on the policy
        next(model.exits.parameters()).add_(1e-3)
    assert model_fingerprint(model) != here.model_fingerprint


def test_a_killed_build_goes_on_with_the_missing_shards(
    here: StateStore, desk: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    compute = store_phase.compute_shard

    def killed_at_two(job, index, *args):
        if index == 2 and 2 not in built:
            built.append(2)
            raise KeyboardInterrupt
        built.append(index)
        return compute(job, index, *args)

    monkeypatch.setattr(store_phase, "compute_shard", killed_at_two)
    with pytest.raises(KeyboardInterrupt):
        build(desk, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    progress = Counts()
    assert same(build(desk, tmp_path / "store", progress=progress), here)
    assert built == [0, 1, 2, 2, 3]
    assert progress.seen[0] == 2 * SHARD + BATCH and progress.seen[-1] == 60


def test_shards_of_another_model_are_not_taken_over(here: StateStore, desk: tuple[Path, Path], tmp_path: Path) -> None:
    model, instances = EarlyExitModel.from_pretrained(desk[0]), Instances.open(desk[1])
    with torch.no_grad():
        next(model.exits.parameters()).add_(1e-3)
    job = store_phase.StoreJob(
        str(tmp_path / "store"), 60, here.layout, SHARD, BATCH, instances.fingerprint, model_fingerprint(model)
    )
    assert sum(store_phase._build_here(job, [0, 3], model, instances)) == SHARD + 12
    assert store_phase.missing_shards(job) == [1, 2]
    assert same(build(desk, tmp_path / "store"), here)


def test_a_damaged_shard_of_a_killed_build_is_built_again(
    here: StateStore, desk: tuple[Path, Path], tmp_path: Path
) -> None:
    model, instances = EarlyExitModel.from_pretrained(desk[0]), Instances.open(desk[1])
    job = store_phase.StoreJob(
        str(tmp_path / "store"), 60, here.layout, SHARD, BATCH, here.instances_fingerprint, here.model_fingerprint
    )
    assert sum(store_phase._build_here(job, [0, 1], model, instances)) == 2 * SHARD
    (shard,) = tmp_path.glob(".*/shard-00001.arrow")
    shard.write_bytes(shard.read_bytes()[:1000])
    assert store_phase.missing_shards(job) == [1, 2, 3]
    assert same(build(desk, tmp_path / "store"), here)


def test_workers_need_paths(desk: tuple[Path, Path], tmp_path: Path) -> None:
    model, instances = EarlyExitModel.from_pretrained(desk[0]), Instances.open(desk[1])
    with pytest.raises(ValueError, match="model_path"):
        build_store(model, instances, tmp_path / "store", "float32", SHARD, BATCH, Counts(), num_workers=2)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
class TestWorkers:
    def test_any_number_of_workers_builds_the_same_store(
        self, desk: tuple[Path, Path], here: StateStore, tmp_path: Path
    ) -> None:
        progress = Counts()
        spread = build(desk, tmp_path / "store", 2, progress)
        assert same(spread, here)
        assert (spread.path / "store.json").read_text() == (here.path / "store.json").read_text()
        assert progress.seen[-1] == 60
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["store"]

    def test_the_shard_of_a_killed_worker_is_built_again(
        self, desk: tuple[Path, Path], here: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import ray

        from rl_exit.trainers import store_workers

        killed: list[int] = []
        hear = store_workers._Worker.hear

        def kill_once(worker):
            part = hear(worker)
            if worker.shard is not None and not isinstance(part, dict) and not killed:
                killed.append(worker.shard)
                ray.kill(worker.actor)
            return part

        monkeypatch.setattr(store_workers._Worker, "hear", kill_once)
        progress = Counts()
        assert same(build(desk, tmp_path / "store", 2, progress), here)
        assert len(killed) == 1 and progress.seen[-1] == 60
        assert min(np.diff(progress.seen)) <= 0  # what the lost worker had done (if not all had arrived) is taken back

    @pytest.mark.slow
    def test_a_shard_that_kills_every_worker_ends_the_build_in_words(
        self, desk: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import ray

        from rl_exit.trainers import store_workers

        begin = store_workers._Worker.begin

        def doomed(worker, shard):
            begin(worker, shard)
            if shard == 0:
                ray.kill(worker.actor)

        monkeypatch.setattr(store_workers._Worker, "begin", doomed)
        monkeypatch.setattr(store_workers, "ATTEMPTS", 2)
        with pytest.raises(RunError, match=r"shard 0 of .* was lost 2 times.*lower store.batch_size"):
            build(desk, tmp_path / "store", 1)

    def test_nodes_without_the_disk_get_everything_through_ray(
        self, desk: tuple[Path, Path], here: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from rl_exit.trainers import store_workers

        @contextmanager
        def elsewhere(job, model_path, instances_path):
            yield store_workers.Source(
                "/nowhere/model",
                "/nowhere/train.arrow",
                "/nowhere/probe",
                *store_workers.shipped(model_path, instances_path),
            )

        monkeypatch.setattr(store_workers, "_source", elsewhere)
        assert same(build(desk, tmp_path / "store", 2), here)

    def test_a_model_that_has_changed_is_noticed(self, desk: tuple[Path, Path], tmp_path: Path) -> None:
        model = EarlyExitModel.from_pretrained(desk[0])
        with torch.no_grad():
            next(model.exits.parameters()).add_(1e-3)
        with pytest.raises(UserError, match="were they changed meanwhile"):
            build_store(
                model,
                Instances.open(desk[1]),
                tmp_path / "store",
                "float32",
                SHARD,
                BATCH,
                Counts(),
                num_workers=1,
                model_path=desk[0],
                instances_path=desk[1],
            )

    def test_a_full_cluster_is_told_within_the_limit(
        self, desk: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import ray

        from rl_exit.trainers import store_workers

        @ray.remote(num_cpus=ray.cluster_resources()["CPU"])
        class Occupant:
            def here(self) -> bool:
                return True

        occupant = Occupant.remote()
        assert ray.get(occupant.here.remote(), timeout=60)
        monkeypatch.setattr(store_workers, "START_SECONDS", 1.0)
        started = time.monotonic()
        with pytest.raises(
            RunError, match=r"no room for 1 CPU within 1 s .* the cluster has 4 CPUs, of which 0 are free"
        ):
            build(desk, tmp_path / "store", 1)
        assert time.monotonic() - started < 60
        ray.kill(occupant)
