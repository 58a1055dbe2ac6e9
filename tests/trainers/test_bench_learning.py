"""The learning benchmark: its yardstick is exact, its shares are what they say, the page shows what was recorded."""

from __future__ import annotations

import copy
import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rllib_stores import heads, random_store, reward_table, solvable_store

from rl_exit.envs.state_store import StateStore
from rl_exit.method import exit_distribution, threshold_exit
from rl_exit.models.policy import PolicyHeads
from rl_exit.progress import Silent
from rl_exit.tables import plain_table
from rl_exit.trainers.bench import learning
from rl_exit.trainers.bench.learning import OPTIMA, PLANS, SEEDS, Optimum, Yardstick, initial_policy, shares
from rl_exit.trainers.bench.learning_report import learning_rows, learning_svg, learning_table, percent, share_at
from rl_exit.trainers.rllib.registry import algorithms

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "benchmarks" / "results" / "learning-stackoverflow.json"


def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


def render() -> Any:
    spec = importlib.util.spec_from_file_location("render", ROOT / "benchmarks" / "render.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    return random_store(tmp_path_factory.mktemp("learning") / "store")


def test_returns_are_those_of_the_exit_distribution(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "BLOCK", 40)  # not a divisor of 96
    yardstick = Yardstick(store, "vanilla", 0.05)
    policy = heads(store)
    torch.nn.init.normal_(policy.weight_out)
    with torch.no_grad():
        pi = policy(store.states(store.rows)).sigmoid().double()
    table = reward_table(store, alpha=0.05).double()
    found = yardstick.returns(policy)
    assert found["stochastic"] == pytest.approx(float((exit_distribution(pi) * table).sum(1).mean()), abs=1e-6)
    greedy = float(table.gather(1, threshold_exit(pi).unsqueeze(1) - 1).mean())
    assert found["greedy"] == pytest.approx(greedy, abs=1e-6)
    assert abs(found["stochastic"] - found["greedy"]) > 1e-2
    assert yardstick.uniform == pytest.approx(float(table.mean()), abs=1e-6)
    assert yardstick.oracle == pytest.approx(float(table.max(1).values.mean()), abs=1e-6)
    assert yardstick.oracle > max(found.values())


def test_shares_count_from_uniform_to_optimum() -> None:
    results = {"uniform": -2.0, "optimum": {"return": -1.0}}
    curves = [
        [
            {"trajectories": 0.0, "stochastic": -2.0, "greedy": -3.0},
            {"trajectories": 10.0, "stochastic": last, "greedy": -1.5},
        ]
        for last in (-1.2, -1.0)
    ]
    entry = {"judged": "stochastic", "runs": [{"curve": curve} for curve in curves]}
    found = shares(results, entry)
    assert found["stochastic"] == pytest.approx({"mean": 0.9, "min": 0.8, "max": 1.0})
    assert found["greedy"]["mean"] == pytest.approx(0.5)
    assert [point["mean"] for point in found["curve"]] == pytest.approx([0.0, 0.9])
    judged = shares(results, {**entry, "judged": "greedy"})
    assert [point["mean"] for point in judged["curve"]] == pytest.approx([-1.0, 0.5])
    assert share_at({**entry, **found}, 10) == pytest.approx(0.9)
    assert percent(0.98999) == "98.9 %" and percent(0.99) == "99.0 %"  # never rounded up to a target


def test_the_optimum_is_found_where_it_is_known(tmp_path: Path) -> None:
    store = solvable_store(tmp_path / "store")
    yardstick = Yardstick(store, "vanilla", 0.0)
    parts: list[float] = []
    found = learning.train_optimum(yardstick, Optimum(120, 64, 1e-2, 0), parts.append)
    assert yardstick.oracle == pytest.approx(0.0)
    assert found["stochastic"] > -0.02
    assert yardstick.returns(initial_policy(store, 0))["stochastic"] < -0.5
    assert sum(parts) == pytest.approx(1.0)


def test_every_algorithm_has_a_plan_and_the_targets_are_those_asked_for() -> None:
    assert set(PLANS) == {info.name for info in algorithms()}
    for name, plan in PLANS.items():
        assert plan.target == (0.99 if name in ("pg", "ppo", "exact") else 0.95)
        settings = learning.phase_settings(name, plan, "hardness", 0.1)
        assert settings["epochs"] * settings["trajectories"] == plan.per_instance


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_measures_saves_and_goes_on(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "OPTIMA", (Optimum(100, 32, 1e-2, 0),))
    saved: list[dict[str, Any]] = []

    def save(results: dict[str, Any]) -> None:
        saved.append(json.loads(json.dumps(results)))

    first = learning.run(store.path, Silent(), algorithms=["pg"], seeds=[0, 1], quick=True, on_result=save)
    assert [len(each["algorithms"].get("pg", {}).get("runs", [])) for each in saved] == [0, 1, 2]
    others = [name for name in PLANS if name != "pg"]
    second = learning.run(store.path, Silent(), algorithms=others, seeds=[0], quick=True, previous=saved[-1])
    assert list(second["algorithms"]) == list(PLANS)
    assert second["algorithms"]["pg"] == json.loads(json.dumps(first["algorithms"]["pg"]))
    assert second["optimum"] == first["optimum"]
    curve = second["algorithms"]["pg"]["runs"][0]["curve"]
    assert curve[0]["trajectories"] == 0 and curve[-1]["trajectories"] == 40 * store.num_instances
    assert [point["trajectories"] for point in curve] == sorted(point["trajectories"] for point in curve)
    other = learning.run(store.path, Silent(), algorithms=[], quick=True, alpha=0.3, previous=saved[-1])
    assert other["algorithms"] == {} and other["uniform"] != first["uniform"]
    again = learning.run(store.path, Silent(), algorithms=["pg"], seeds=[0], quick=True)
    assert again["algorithms"]["pg"]["runs"][0]["curve"] == first["algorithms"]["pg"]["runs"][0]["curve"]


def test_recorded_shares_follow_from_the_recorded_returns() -> None:
    results = recorded()
    assert not results["quick"] and results["store"]["num_instances"] == 18000
    assert set(results["algorithms"]) == set(PLANS)
    assert [run["seed"] for run in results["optimum"]["runs"]] == [one.seed for one in OPTIMA]
    assert results["optimum"]["return"] == max(run["stochastic"] for run in results["optimum"]["runs"])
    for name, entry in results["algorithms"].items():
        assert [run["seed"] for run in entry["runs"]] == list(SEEDS)
        assert entry["target"] == PLANS[name].target and entry["judged"] == PLANS[name].judged
        found = shares(results, entry)
        for key in ("stochastic", "greedy"):
            assert entry[key] == pytest.approx(found[key])
        wrong = copy.deepcopy(results)
        wrong["optimum"]["return"] += 0.01
        assert shares(wrong, entry)["greedy"] != pytest.approx(entry["greedy"])


def test_the_page_and_the_figure_show_the_recorded_results() -> None:
    module, page = render(), (ROOT / "docs" / "algorithms.md").read_text()
    results = recorded()
    assert module.rendered(page) == page, "run: python benchmarks/render.py"
    for name, entry in results["algorithms"].items():
        assert f"| {name} |" in page and percent(entry[entry["judged"]]["mean"]) in page
    image = (ROOT / "docs" / "images" / "learning.svg").read_text()
    assert image == learning_svg(results), "run: python benchmarks/render.py"
    other = copy.deepcopy(results)
    for point in other["algorithms"]["pg"]["curve"]:
        point["mean"] -= 0.02
    assert learning_svg(other) != image
    root = ElementTree.fromstring(image)
    labels = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert set(results["algorithms"]) <= labels
    _, rows = learning_rows(results)
    text = plain_table(learning_table(results))
    assert all(cell in text for row in rows for cell in row[:2])


def test_initial_policies_leave_the_generator_alone(store: StateStore) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, other = initial_policy(store, 0), initial_policy(store, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(one, PolicyHeads) and not torch.equal(one.weight_in, other.weight_in)
    assert np.isfinite(one.weight_in.detach().numpy()).all()
