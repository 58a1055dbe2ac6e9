"""``rl-exit predict`` and ``evaluate`` with a criterion named by its word."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rl_exit import EarlyExitModel
from rl_exit.cli import app
from rl_exit.criteria import StoredSplit, save_criterion
from rl_exit.criteria.fitting import FitSettings, fit_criterion


@pytest.fixture(scope="module")
def model(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of 3 layers with a fitted ``lte`` beside it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    EarlyExitModel.from_backbone(str(tiny_backbone), ("animal", "tool"), max_length=16).save_pretrained(folder)
    rng = np.random.default_rng(0)
    split = StoredSplit.from_logits(
        rng.integers(0, 2, 40), rng.normal(size=(40, 3, 2)), rng.normal(size=(40, 3, 32)).astype(np.float32)
    )
    save_criterion(fit_criterion("lte", split, settings=FitSettings(epochs=1)), folder / "criteria")
    return folder


def call(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def layers(model: Path, *words: str) -> list[int]:
    texts = ("--text", "the old horse", "--text", "a red hammer")
    return [row["exit_layer"] for row in json.loads(call("predict", str(model), *texts, "--json", *words))]


def test_predict(model):
    assert layers(model, "--criterion", "fixed", "--param", "depth=2") == [2, 2]
    assert layers(model, "--criterion", "entropy", "--param", "threshold=10") == [1, 1]
    assert layers(model, "--criterion", "pcee", "--param", "threshold=1e-9", "--param", "patience=1") == [3, 3]
    assert layers(model, "--criterion", "lte", "--param", "threshold=0") == [1, 1], "read from the model's folder"


def test_evaluate(model, tiny_task):
    data = ["task.name=local", f"task.path={tiny_task}", "task.max_dev=8"]
    words = ["--split", "dev", "--criterion", "fixed", "--param", "depth=2", "--json"]
    found = json.loads(call("evaluate", str(model), *data, *words))
    assert found["criterion"] == {"word": "fixed", "depth": 2}
    assert found["dev"]["mean_exit_layer"] == 2.0 and found["dev"]["saved_layers"] == pytest.approx(1 / 3)
    plain = json.loads(call("evaluate", str(model), *data, "--split", "dev", "--json"))
    assert "criterion" not in plain and plain["dev"]["full_depth_score"] == found["dev"]["full_depth_score"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--criterion", "pabbe"], "criterion 'pabbe' is unknown; accepted: consistentee, fixed"),
        (["--criterion", "pabee"], "parameters given: none; accepted: patience"),
        (["--criterion", "pabee", "--param", "patience"], "--param 'patience': key=value is accepted"),
        (["--criterion", "pabee", "--param", "patience=two"], "patience = 'two'; accepted: a whole number from 1"),
        (["--criterion", "entropy", "--param", "threshold=nan"], "accepted: 0 or more (nats)"),
        (["--criterion", "lte", "--param", "learned=x"], "--param 'learned=x': key=value is accepted"),
        (["--criterion", "cat"], "no learned criterion 'cat' here; found: lte"),
        (["--param", "patience=2"], "name one with --criterion"),
        (["--criterion", "entropy", "--param", "threshold=1", "--threshold", "0.5"], "threshold belongs to the policy"),
    ],
)
def test_what_is_wrong_is_told(words, told, model, tiny_task):
    assert told in call("predict", str(model), "--text", "x", *words, code=2)
    assert told in call("evaluate", str(model), "task.name=local", f"task.path={tiny_task}", *words, code=2)
