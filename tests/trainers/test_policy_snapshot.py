"""A policy phase that is interrupted goes on from its snapshot, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rllib_stores import heads, random_store

from rl_exit.envs.state_store import StateStore
from rl_exit.trainers import policy_phase
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, PolicyProgress, PolicyResult, train_policy
from rl_exit.trainers.rllib.snapshot import PolicySnapshot

QUICK = PolicyPhaseSettings(
    epochs=3,
    batch_size=32,
    trajectories=4,
    reward="vanilla",
    lr_final=0.0,
    width=16,
    epsilon=0.2,
    minibatch_size=16,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    return random_store(tmp_path_factory.mktemp("store") / "store")


def phase(store: StateStore, settings: PolicyPhaseSettings, folder: Path, stop_at: int | None = None) -> PolicyResult:
    def stop(at: PolicyProgress) -> None:
        if at.step == stop_at:
            raise KeyboardInterrupt

    return train_policy(store.path, heads(store).state_dict(), settings, stop, folder)


def same(one: PolicyResult, other: PolicyResult) -> bool:
    return all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())


@pytest.mark.parametrize("algorithm", ["pg", "ppo", "exact"])
def test_an_interrupted_phase_goes_on_exactly(
    store: StateStore, tmp_path: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(QUICK, algorithm=algorithm)
    whole = phase(store, settings, tmp_path / "none")
    assert not (tmp_path / "none").exists()  # too short for a snapshot
    monkeypatch.setattr(policy_phase, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        phase(store, settings, tmp_path / "kept", stop_at=5)
    there = PolicySnapshot.load(tmp_path / "kept")
    assert there is not None and (there.epoch, there.update, there.number) == (1, 1, 4)
    told: list[int] = []
    again = train_policy(
        store.path, heads(store).state_dict(), settings, lambda at: told.append(at.step), tmp_path / "kept"
    )
    assert same(again, whole)
    assert told == [int(row["step"]) for row in whole.rows] == list(range(1, 10))  # also what was done before
    names = [name for name in whole.rows[0] if "second" not in name and name != "sample_share"]
    assert all(a[name] == b[name] for a, b in zip(again.rows, whole.rows, strict=True) for name in names)


def test_the_optimiser_is_part_of_it(store: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = phase(store, QUICK, tmp_path / "none")
    monkeypatch.setattr(policy_phase, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        phase(store, QUICK, tmp_path / "kept", stop_at=5)
    there = PolicySnapshot.load(tmp_path / "kept")
    assert there is not None
    weights_only = {name: value for name, value in there.tensors.items() if name.startswith("module.")}
    assert len(weights_only) < len(there.tensors)
    replace(there, tensors=weights_only).save(tmp_path / "kept")
    assert not same(phase(store, QUICK, tmp_path / "kept"), whole)


def test_what_is_no_snapshot_is_passed_over(tmp_path: Path) -> None:
    assert PolicySnapshot.load(tmp_path) is None
    (tmp_path / "position.json").write_text("{}")
    assert PolicySnapshot.load(tmp_path) is None
    (tmp_path / "position.json").write_text('{"epoch": 0, "update": 0, "number": 0, "rows": []}')
    (tmp_path / "state.safetensors").write_bytes(b"half")
    assert PolicySnapshot.load(tmp_path) is None
