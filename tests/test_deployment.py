"""From the outside: profile, calibrate, dial, prune and bench inference on a tiny model; then predict by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import write_tiny_task
from typer.testing import CliRunner

from rl_exit import EarlyExitModel, deployment, engine_bench
from rl_exit.cli import app
from rl_exit.config import dump_config, load_config
from rl_exit.costs import CostModel
from rl_exit.errors import ConfigError, ModelError, UserError
from rl_exit.operating import Clocked
from rl_exit.profiling import profile

TEXTS = ["the red cat", "saw", "my old hammer near a big dog", "drill under the horse"] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    root = tmp_path_factory.mktemp("deployment")
    write_tiny_task(root / "task", {"train": 64, "dev": 400, "test": 64})
    model = EarlyExitModel.from_backbone(
        str(tiny_backbone), ("animal", "tool"), policy_inputs="answers", policy_shared=True, max_length=32
    )
    torch.manual_seed(0)
    with torch.no_grad():
        model.policy.weight_out.normal_(0.0, 3.0)
    model.save_pretrained(root / "model")
    config = load_config(None, ["task.name=local", f"task.path={root / 'task'}", "task.labels=[animal, tool]"])
    (root / "model" / "training.yaml").write_text(dump_config(config))
    return root / "model"


@pytest.fixture(autouse=True)
def _by_the_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the clock says of a tiny model is chance, and the cost model's own figures are: a layer takes a millisecond.

    tests/test_operating.py tests what is made of either.
    """
    monkeypatch.setattr(Clocked, "bias", lambda *_: 1.0)

    def settled(*args: Any, **words: Any) -> CostModel:
        costs = profile(*args, **words)
        small = {name: np.full_like(getattr(costs, name), 1e-5) for name in ("embed", "exits", "policy")}
        return replace(costs, layers=np.full_like(costs.layers, 1e-3), **small)

    for where in (deployment, engine_bench):
        monkeypatch.setattr(where, "profile", settled)


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 2
    return " ".join(done.output.split())


def test_a_wish_becomes_a_point_and_predict_takes_it(folder):
    costs = json.loads(run("profile", folder, "--batch-size", 4, "--json"))
    assert costs["batch_sizes"] == [4] and (folder / "costs.json").is_file()
    point = json.loads(run("calibrate", folder, "--speedup", 1.3, "--batch-size", 4, "--json"))
    assert point["speedup"] == pytest.approx(1.3, rel=0.05) and point["texts"] == 400
    safe = run("calibrate", folder, "--max-loss", 30, "--confidence", 0.9, "--criterion", "all", "--name", "careful")
    assert "guaranteed with confidence 0.9: at most 30 points" in safe
    model = EarlyExitModel.from_pretrained(folder)
    assert set(model.config.operating_points) == {"fast", "careful"}
    found = model.predict(TEXTS, operating_point="fast")
    assert found == model.predict(TEXTS, threshold=point["params"]["threshold"])
    rows = json.loads(run("predict", folder, "--text", TEXTS[0], "--point", "fast", "--json"))
    assert rows[0]["exit_layer"] == found[0].exit_layer
    with pytest.raises(ConfigError, match=r"'fats' is unknown; accepted: fast, careful.*fast"):
        model.predict(TEXTS, operating_point="fats")
    with pytest.raises(ConfigError, match="threshold and operating_point: give one"):
        model.predict(TEXTS, operating_point="fast", threshold=0.5)


def test_wishes_that_cannot_be_granted_are_refused(folder, tmp_path):
    assert "give either --speedup or --max-loss" in refused("calibrate", folder)
    assert "give either --speedup or --max-loss" in refused("calibrate", folder, "--speedup", 2, "--max-loss", 1)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": "the cat", "label": "animal"}) + "\n" for _ in range(40)))
    assert "40 calibration texts are too few" in refused("calibrate", folder, "--max-loss", 1, "--data", few)
    few.write_text(json.dumps({"text": "the cat", "label": "fish"}) + "\n")
    assert "fish" in refused("calibrate", folder, "--max-loss", 1, "--data", few)
    few.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert "no column 'label'" in refused("calibrate", folder, "--max-loss", 1, "--data", few)
    assert "no such file" in refused("calibrate", folder, "--max-loss", 1, "--data", tmp_path / "none.csv")
    assert "no such model folder" in refused("calibrate", tmp_path / "none", "--speedup", 2)
    assert "letters, digits and underscores" in refused("calibrate", folder, "--speedup", 1.3, "--name", "a b")
    assert "a number above 1" in refused("calibrate", folder, "--speedup", 1)


def test_the_dial_is_trained_and_turned(folder, tmp_path):
    model = EarlyExitModel.from_pretrained(folder)
    with pytest.raises(ModelError, match="has no dial"):
        model.predict(TEXTS, speed=0.5)
    data = tmp_path / "more.jsonl"
    write_tiny_task(tmp_path, {"more": 128}, seed=3)
    found = json.loads(run("dial", folder, "--data", data, "--json"))
    assert found["trained_on"] == 128 and len(found["curve"]) == 7
    assert {answer.exit_layer for answer in model.predict(TEXTS, speed=0.0)} == {model.num_layers}
    slow, fast = (
        sum(answer.exit_layer for answer in model.predict(TEXTS, speed=speed, batch_size=size))
        for speed, size in ((0.1, 1), (1.0, 5))
    )
    assert fast <= slow
    for wrong in (-0.1, 1.1, "fast", True):
        with pytest.raises(ConfigError, match="accepted: a number from 0"):
            model.predict(TEXTS, speed=wrong)


def test_a_pruned_copy(folder, tmp_path):
    assert "2 layers" in run("prune", folder, tmp_path / "small", "--depth", 2)
    assert EarlyExitModel.from_pretrained(tmp_path / "small").num_layers == 2
    assert "is there already" in refused("prune", folder, tmp_path / "small", "--depth", 2)
    assert "can be cut to 2..2" in refused("prune", folder, tmp_path / "other", "--depth", 3)


@pytest.mark.slow
def test_the_benchmark_reports_what_the_issue_asks(folder):
    found = json.loads(run("bench", "inference", folder, "--quick", "--batch-size", 8, "--speedup", 1.3, "--json"))
    model = found["models"]["model"]
    for name in ("time_per_layer_speedup", "no_exit_overhead", "requested"):
        assert set(model[name]) == {"8"} and isinstance(model[name]["8"], float)
    assert found["command"].startswith("rl-exit bench inference model") and len(found["load_average"]) == 2
    row = model["engine"]["8"]
    assert row["time_per_layer_speedup"] == pytest.approx(row["speedup"] / row["layer_speedup"])
    assert row["layer_speedup"] > 1.0
    assert 0.0 <= model["guarantee"]["broken_of_a_known_whole"] <= 1.0 and model["guarantee"]["splits"] == 200
    assert "engine" in run("bench", "inference", folder, "--quick", "--batch-size", 8, "--speedup", 1.3)


def test_bfloat16_answers_nearly_alike(folder):
    model = EarlyExitModel.from_pretrained(folder)
    expected = model.predict(TEXTS, threshold=1.0)
    light = EarlyExitModel.from_pretrained(folder).lighten()
    for one, two in zip(light.predict(TEXTS, threshold=1.0), expected, strict=True):
        assert one.probabilities == pytest.approx(two.probabilities, abs=0.05)
    assert light.predict(TEXTS, threshold=1.0) != expected


def test_compiled_layers_answer_alike(folder):
    """With the backend that traces and generates no code: whether layers can be compiled, not how fast they are."""
    model = EarlyExitModel.from_pretrained(folder)
    expected = model.predict(TEXTS[:5], batch_size=2)
    compiled = EarlyExitModel.from_pretrained(folder).compile_layers(backend="eager")
    for one, two in zip(compiled.predict(TEXTS[:5], batch_size=2), expected, strict=True):
        assert one.probabilities == pytest.approx(two.probabilities, abs=1e-5)
        assert one.exit_layer == two.exit_layer
    layers = compiled.backbone.layer_modules()
    assert all(layer._compiled_call_impl is not None for layer in layers)


def test_latency_is_a_cost_of_the_reward():
    assert load_config(None, ["reward.cost=latency"]).reward.cost == "latency"
    with pytest.raises(UserError, match=r"reward\.cost"):
        load_config(None, ["reward.cost=seconds"])
    assert yaml.safe_load(dump_config(load_config()))["reward"]["cost"] == "layers"
