"""The analysis of a finished run, on a run directory made of files: no training of a backbone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_exit.analysis.tables import analysis_tables
from rl_exit.config import dump_config, load_config
from rl_exit.data.instances import Instances
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import RunError, UserError
from rl_exit.method.rewards import memorized_layer
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.progress import Silent
from rl_exit.report_analysis import render_analysis, write_analysis_page
from rl_exit.tables import plain_table
from rl_exit.trainers import analyse_hardness, kept_logits
from rl_exit.trainers.analyse import analyse, parse_alphas
from rl_exit.trainers.analyse_hardness import hardness
from rl_exit.trainers.forgetting import Visits
from rl_exit.trainers.store_phase import build_store

NAMES = ("animal", "tool")


class Nothing:
    def update(self, done: float, note: str = "") -> None:
        return


def texts(model: EarlyExitModel, count: int, seed: int) -> Instances:
    """Random words, the label being whether the first word is an animal."""
    rng = np.random.default_rng(seed)
    words = [["cat", "hammer"][i % 2] + " the old red"[: int(rng.integers(4, 12))] for i in range(count)]
    tokens = [model.tokenizer(word)["input_ids"] for word in words]
    return Instances(
        ids=np.arange(100, 100 + count),
        labels=np.arange(count) % 2,
        tokens=np.concatenate([np.array(row, dtype=np.int32) for row in tokens]),
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in tokens])]).astype(np.int64),
        token_types=None,
        pad_token_id=0,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """A run directory as a finished run leaves it, the models untrained."""
    run = tmp_path_factory.mktemp("runs") / "made"
    initial = EarlyExitModel.from_backbone(str(tiny_backbone), NAMES, policy_width=8, seed=0)
    initial.save_pretrained(run / "init" / "model")
    final = EarlyExitModel.from_backbone(str(tiny_backbone), NAMES, policy_width=8, seed=1)
    final.save_pretrained(run / "model")
    for split, count in (("train", 60), ("dev", 40)):
        instances = texts(final, count, seed=count)
        instances.save(run / "data" / f"{split}.arrow")
        build_store(final, instances, run / "rounds" / "2" / f"store-{split}", "float32", 32, 16, Nothing())
        if split == "train":
            visits = Visits(4, count)
            for epoch in range(4):
                right = np.random.default_rng(epoch).integers(0, 2, count)
                visits.record(epoch, np.arange(count), right)
            visits.save(run / "init" / "forgetting.arrow", instances.ids)
    config = load_config(
        None,
        ["name=made", f"output_dir={run.parent}", "policy.epochs=2", "model.policy_width=8", "reward.name=hardness"],
    )
    (run / "config.yaml").write_text(dump_config(config))
    results = {
        "run_name": "made",
        "task": "animals",
        "metric": "accuracy",
        "seed": 0,
        "num_layers": 3,
        "threshold": 0.4,
        "best_round": 2,
        "initial_full_depth": {"dev": 0.5},
    }
    (run / "results.json").write_text(json.dumps(results))
    return run


@pytest.fixture(scope="module")
def tree(finished: Path) -> dict[str, Any]:
    return analyse(finished, Silent(), [0.05, 0.5])


def test_exits_of_both_objectives_on_the_same_groups(finished: Path, tree: dict[str, Any]) -> None:
    dev = Instances.open(finished / "data" / "dev.arrow")
    batch = dev.batch(range(len(dev)))
    models = {name: EarlyExitModel.from_pretrained(finished / name) for name in ("init/model", "model")}
    with torch.inference_mode():
        states = models["model"].all_exits(**batch).states
        pi = models["model"].policy(states).sigmoid().numpy()
        logits = {name: model.all_exits(**batch).logits.numpy() for name, model in models.items()}
    left = [next((layer for layer in (1, 2) if row[layer - 1] > 0.4), 3) for row in pi]
    for name, found in (("init/model", tree["exits"]["initial"]), ("model", tree["exits"]["final"])):
        assert found["leaving"] == [left.count(layer) for layer in (1, 2, 3)]
        p = np.exp(logits[name]) / np.exp(logits[name]).sum(-1, keepdims=True)
        ce = [-np.log(p[i, layer - 1, dev.labels[i]]) for i, layer in enumerate(left)]
        assert found["loss_at_exit"] == pytest.approx(np.mean(ce), rel=1e-4)
    assert tree["exits"]["initial"] != tree["exits"]["final"]


def test_hardness_knows_the_record_of_forgetting(tree: dict[str, Any]) -> None:
    found = tree["hardness"]["train"]["forgetting"]
    assert found["epochs"] == 4 and found["num_instances"] == 60
    flags = np.stack([np.random.default_rng(epoch).integers(0, 2, 60) for epoch in range(4)], 1)
    assert found["never_learnt"] == int((flags.sum(1) == 0).sum())
    assert found["mean_events"] == pytest.approx(((flags[:, :-1] == 1) & (flags[:, 1:] == 0)).sum() / 60)
    assert tree["hardness"]["dev"]["forgetting"] is None
    assert sum(tree["hardness"]["train"]["by_memorized"]["count"]) == 60


def test_where_the_policy_has_instances_of_its_own_the_training_set_is_passed_once(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EarlyExitModel.from_pretrained(finished / "model")
    stores = [StateStore.open(finished / "rounds" / "2" / f"store-{split}") for split in ("train", "dev")]
    fitted = texts(model, 50, seed=7)
    fitted.save(tmp_path / "data" / "train.arrow")
    (tmp_path / "init").mkdir()
    shutil.copy(finished / "init" / "forgetting.arrow", tmp_path / "init")
    found = hardness(tmp_path, Silent(), stores[0], stores[1], model, seed=0)["train"]
    assert found["num_instances"] == 50 and found["forgetting"]["num_instances"] == 50
    with torch.inference_mode():
        logits = model.all_exits(**fitted.batch(range(50))).logits.numpy()
    m = memorized_layer(logits.argmax(-1) == fitted.labels[:, None])
    assert found["by_memorized"]["count"] == [int((m == layer).sum()) for layer in (1, 2, 3)]
    monkeypatch.setattr(analyse_hardness, "MOST_INSTANCES", 30)
    assert hardness(tmp_path, Silent(), stores[0], stores[1], model, seed=0)["train"]["num_instances"] == 30


def test_a_policy_for_each_reward_and_alpha(tree: dict[str, Any]) -> None:
    assert [(row["reward"], row["alpha"]) for row in tree["policies"]] == [
        ("vanilla", 0.05),
        ("vanilla", 0.5),
        ("hardness", 0.05),
        ("hardness", 0.5),
        ("correctness", 0.005),
        ("correctness", 0.05),
    ]
    for row in tree["policies"]:
        assert row["threshold"] == 0.5
        assert row["saved_layers"] == pytest.approx(1 - row["mean_exit_layer"] / 3)
        assert [row["threshold"], row["score"], row["mean_exit_layer"]] in row["curve"]
    dear, cheap = tree["policies"][1], tree["policies"][0]
    assert dear["mean_exit_layer"] <= cheap["mean_exit_layer"]


def test_again_is_the_same_and_costs_no_pass_of_the_backbone(
    finished: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the backbone was asked again")

    assert json.loads((finished / "analysis" / "analysis.json").read_text()) == tree
    monkeypatch.setattr(kept_logits, "every_exit", refuse)
    again = analyse(finished, Silent(), [0.05])
    assert {key: again[key] for key in ("exits", "hardness")} == {key: tree[key] for key in ("exits", "hardness")}
    assert again["policies"][0] == tree["policies"][0]


def test_page_and_tables_show_every_part(finished: Path, tree: dict[str, Any]) -> None:
    page = write_analysis_page(finished).read_text()
    for figure in ("exit-loss", "exit-accuracy", "hardness-loss", "hardness-forgetting", "rewards", "alpha-saved"):
        assert f'data-figure="{figure}"' in page and f'"{figure}":' in page
    assert "src=" not in page.split("<script")[0] and "made" in page
    shown = {name: plain_table(table.for_terminal()) for name, table in analysis_tables(tree).items()}
    assert "forgetting events" in shown["hardness"]
    assert shown["rewards"].count("within 1 point") == 3
    assert "own exit" in shown["exits"] and "0.005" in shown["alphas"]


def test_missing_parts_are_said(tree: dict[str, Any]) -> None:
    bare = json.loads(json.dumps(tree))
    bare["hardness"]["train"] |= {"forgetting": None, "forgetting_note": "the run has no record"}
    bare["hardness"]["train"]["loss"] = None
    bare["rewards"]["vanilla"] |= {"no_loss": None, "within_1": None}
    bare["exits"]["final"] = bare["exits"]["initial"]
    page = render_analysis(bare)
    assert "the run has no record" in page and "its exits are those of the initialisation" in page
    assert all(plain_table(table.for_terminal()) for table in analysis_tables(bare).values())


def test_names_are_shown_as_text(tree: dict[str, Any]) -> None:
    page = render_analysis({**tree, "run_name": "</script><b>x"})
    assert "<b>x" not in page


def test_what_cannot_be_analysed(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run directory"):
        analyse(tmp_path, Silent())
    run = tmp_path / "made"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("analysis"))
    shutil.rmtree(run / "rounds" / "2" / "store-train")
    with pytest.raises(RunError, match="store-train: the state store of the best round is gone"):
        analyse(run, Silent())
    (run / "results.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        analyse(run, Silent())


def test_alphas_are_numbers() -> None:
    assert parse_alphas(None) is None
    assert parse_alphas("0.2,0.1,2e-1") == (0.1, 0.2)
    for words in ("a", "", "0.1,", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="numbers of at least 0"):
            parse_alphas(words)
