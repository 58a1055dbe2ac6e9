"""The sampling benchmark: its parts measure what they say, and its recorded results are what the pages show."""

from __future__ import annotations

import copy
import importlib.util
import json
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_exit.errors import UserError
from rl_exit.listings import BENCH_MEASURES, bench_rows, bench_table
from rl_exit.method import exit_distribution, expected_return, rewards
from rl_exit.models.policy import PolicyHeads
from rl_exit.progress import Silent
from rl_exit.tables import plain_table
from rl_exit.trainers.bench import timing
from rl_exit.trainers.bench.bare import BareLoop
from rl_exit.trainers.bench.data import random_store
from rl_exit.trainers.bench.processes import actor_pids, private_mb
from rl_exit.trainers.bench.setup import Effort, Size

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "benchmarks" / "results" / "sampling.json"


def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


def render() -> Any:
    spec = importlib.util.spec_from_file_location("render", ROOT / "benchmarks" / "render.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_variants_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    costs = {"a": iter([9.0, 1.0, 2.0, 4.0]), "b": iter([1.0, 5.0, 5.0, 5.0])}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def variant(name: str) -> int:
        order.append(name)
        now[0] += next(costs[name])
        return 100

    rates = timing.interleaved({name: lambda name=name: variant(name) for name in costs}, 3)
    assert order == ["a", "b"] * 4
    assert rates["a"] == {"steps_per_second": 50.0, "runs": [100.0, 50.0, 25.0]}
    assert rates["b"]["steps_per_second"] == 20.0


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[BareLoop]:
    store = random_store(tmp_path / "store", 64, 4, 16)
    torch.manual_seed(0)
    yield BareLoop(store, PolicyHeads(4, 16, 8), batch_size=24, trajectories=50, epsilon=0.2, lr=1e-2)


def test_the_bare_loop_draws_from_the_exit_distribution(bare: BareLoop) -> None:
    states = torch.from_numpy(bare.store.states(np.arange(64)))
    with torch.no_grad():
        logits = bare.policy(states)
    drawn = torch.cat([bare._draw(logits, torch.arange(64))[0] for _ in range(8)], 1)
    counts = torch.stack([row.bincount(minlength=4) for row in drawn]).double()

    def chi_square(epsilon: float) -> float:
        pi = (1 - epsilon) * logits.sigmoid().double() + epsilon / 2
        wanted = drawn.shape[1] * exit_distribution(pi)
        return float(((counts - wanted) ** 2 / wanted).sum())

    freedom = 64 * 3
    assert chi_square(0.2) < freedom + 5 * np.sqrt(2 * freedom)
    assert chi_square(0.6) > freedom + 20 * np.sqrt(2 * freedom)


def test_the_bare_loop_counts_layers_and_goes_through_every_instance(bare: BareLoop) -> None:
    seen: list[torch.Tensor] = []
    draw = bare._draw
    bare._draw = lambda logits, rows: seen.append(rows) or draw(logits, rows)  # type: ignore[method-assign]
    with torch.no_grad():
        bare.policy.bias_out.fill_(50.0)
        bare.epsilon = 0.0
        assert bare.sample(3) == 64 * 50  # all leave at layer 1: 24, 24 and 16 instances
        bare.policy.bias_out.fill_(-50.0)
        assert bare.sample(1) == 24 * 50 * 4  # all go to the last
    assert sorted(torch.cat(seen[:3]).tolist()) == list(range(64))


def test_the_bare_loop_learns(bare: BareLoop) -> None:
    store = bare.store
    reward = torch.from_numpy(rewards(store.losses, store.memorized(), 0.05, "hardness"))
    states = torch.from_numpy(store.states(np.arange(64)))

    def value() -> float:
        with torch.no_grad():
            return float(expected_return(bare.policy(states), reward).mean())

    before = value()
    bare.train(60)
    assert value() > before + 0.1


def test_private_memory_counts_what_a_process_has_for_itself() -> None:
    before = private_mb(os.getpid())
    with mmap.mmap(-1, 40_000_000, flags=mmap.MAP_PRIVATE) as own:  # not from the heap, which may hold as much unused
        for _ in range(40):
            own.write(b"1" * 1_000_000)
        assert 35 < private_mb(os.getpid()) - before < 60
    with pytest.raises(UserError, match="needs Linux"):
        private_mb(2**22 + 1)
    assert actor_pids() == set()


def test_a_missed_target_shows() -> None:
    results = recorded()
    for key, words, _ in BENCH_MEASURES:
        wrong = copy.deepcopy(results)
        target = results["targets"][key]["value"]
        values = {True: 0.99 * target, False: 1.01 * target}
        at_least = results["targets"][key]["bound"] == "at least"
        for one in wrong["sizes"]:
            one[key] = values[not at_least]
        assert {cells[0]: met for cells, met in bench_rows(wrong)[1]}[words] is True
        wrong["sizes"][0][key] = values[at_least]
        assert {cells[0]: met for cells, met in bench_rows(wrong)[1]}[words] is False


def test_recorded_ratios_are_the_quotients_of_the_recorded_rates() -> None:
    results = recorded()
    assert results["command"] == "rl-exit bench sampling" and not results["quick"]
    assert results["settings"]["repetitions"] >= 5 and results["seconds"] < 300
    assert [(s["num_instances"], s["num_layers"], s["hidden_size"]) for s in results["sizes"]] == [
        (20000, 12, 768),
        (18000, 6, 384),
    ]
    for one in results["sizes"]:
        rate = {name: float(np.median(found["runs"])) for name, found in one["rates"].items()}
        stock = max(rate["rllib_runner_sync"], rate["rllib_runner_vector_entry_point"])
        for key, quotient in {
            "runner_vs_rllib": rate["runner"] / stock,
            "runner_vs_bare": rate["runner"] / rate["bare_sampling"],
            "pg_train_vs_bare": rate["pg_train"] / rate["bare_training"],
            "ppo_train_vs_stock": rate["ppo_train"] / rate["ppo_stock"],
        }.items():
            assert one[key] == pytest.approx(quotient, rel=1e-3)


def test_the_page_shows_the_recorded_results() -> None:
    module, page = render(), (ROOT / "docs" / "performance.md").read_text()
    assert module.MARKED.search(page)
    assert module.rendered(page) == page, "run: python benchmarks/render.py"
    assert module.rendered(page.replace("| runner / bare loop |", "| runner / bare loops |")) == page


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_has_all_keys_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from rl_exit.trainers.bench.sampling import run

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    threads = torch.get_num_threads()
    effort = Effort(repetitions=2, batches=2, stock_steps=256, stock_share=0.05, growth=-1)
    results = json.loads(json.dumps(run(True, Silent(), sizes=(Size(2000, 4, 32),), effort=effort)))

    assert not ray.is_initialized() and torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == []
    known = recorded()
    assert set(results) == set(known)
    assert set(results["scaling"]) == set(known["scaling"])
    (one,) = results["sizes"]
    assert set(one) == set(known["sizes"][0])
    assert set(one["rates"]) == set(known["sizes"][0]["rates"])
    assert all(len(rate["runs"]) == 2 for rate in one["rates"].values())
    # Loose by far: these only fail if something else than the named thing is measured.
    assert one["runner_vs_rllib"] > 20 and one["ppo_train_vs_stock"] > 5
    assert 8 < one["bytes_per_trajectory"] < 16
    assert 5 < one["private_mb_per_runner"] < 400
    assert results["scaling"]["num_instances"] == [200, 2000]
    assert list(results["scaling"]["policy_pass_seconds_by_k"]) == ["1", "2", "4", "8", "16", "32", "64"]
    text = plain_table(bench_table(results))
    assert all(words in text for _, words, _ in BENCH_MEASURES)


@pytest.mark.ray
@pytest.mark.parametrize(("bias", "layers"), [(50.0, 1), (-50.0, 4)])
def test_steps_of_rllib_are_layers_visited(tmp_path: Path, bias: float, layers: int) -> None:
    from rl_exit.trainers.bench import stock

    store = random_store(tmp_path / "store", 64, 4, 16)
    for kind in stock.VECTORISATIONS:
        config = stock.config(str(store.path), 8, 4, 8, kind)
        runner = stock.CountingRunner(config=config, worker_index=0, num_workers=0)
        with torch.no_grad():
            runner.module.policy.bias_out.fill_(bias)
        episodes = runner.sample(num_episodes=40)
        assert runner.layers_visited == layers * len(episodes) and len(episodes) >= 40
        runner.stop()


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rl_exit.trainers.bench import sampling

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    huge = (Size(10**9, 12, 768),)
    with pytest.raises(UserError, match=r"GB are free; set TMPDIR"):
        sampling.run(True, Silent(), sizes=huge)
    assert list(tmp_path.iterdir()) == []
