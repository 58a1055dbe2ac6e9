"""A decoder's whole run: the built-in example as shipped, cut small; blocks, LoRA, resumption, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape

from rl_exit.config import load_config
from rl_exit.criteria import ConsistentEE
from rl_exit.data import documentation
from rl_exit.data.docstrings import Topic
from rl_exit.errors import ConfigError, UserError
from rl_exit.files import read_json
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.progress import Silent
from rl_exit.trainers import token_evaluation
from rl_exit.trainers.alternation import train
from rl_exit.trainers.analyse import analyse
from rl_exit.trainers.compare_groups import open_runs
from rl_exit.trainers.evaluate import evaluate_model
from rl_exit.trainers.token_store import build_block

CONFIG = Path(__file__).parents[2] / "configs" / "generation.yaml"
SMALL = [
    "model.scratch.layers=3",
    "model.scratch.hidden=32",
    "model.scratch.heads=2",
    "model.scratch.vocabulary=300",
    "model.policy_width=8",
    "init.epochs=1",
    "policy.epochs=1",
    "generation.samples=2",
    "generation.max_new_tokens=4",
    "generation.encoder=none",
]


@pytest.fixture(scope="module")
def small_text() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(documentation, "TOPICS", (Topic("server", ("uvicorn",)), Topic("client", ("requests",))))
    patch.setattr(documentation, "SIZES", {"train": 40, "dev": 3, "test": 3})
    patch.setattr(token_evaluation, "CURVE_POINTS", 3)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def finished(small_text: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    config = load_config(CONFIG, [*SMALL, f"output_dir={folder}", "store.max_gib=0.00005", "keep_rounds=all"])
    train(config, Silent())
    return config.run_dir


def test_the_built_in_example_runs_to_its_report(finished: Path):
    results, evaluation = read_json(finished / "results.json"), read_json(finished / "evaluation.json")
    assert results["kind"] == "generation" and results["num_layers"] == 3 and results["best_round"] in (1, 2)
    for split in ("dev", "test"):
        row = results[split]
        assert 0 <= row["score"] <= 1 and 0 <= row["saved_layers"] < 1
        text = results["generation"][split]
        assert text["prompts"] == 2 and 0 <= text["rouge_l_to_full_depth"] <= 1 and text["full_depth_perplexity"] > 1
        assert results["timing"][split]["tokens_per_second"] > 0
        sample = evaluation["generation"]["splits"][split]["samples"][0]
        assert len(sample["tokens"]) == len(sample["exit_layers"]) <= 4 and sample["exit_layers"][0] == 3
    page = (finished / "report" / "index.html").read_text()
    assert "Samples side by side" in page and page.count('class="token"') >= 2
    shown = evaluation["generation"]["splits"]["test"]["samples"][0]
    assert f"<td>{escape(shown['reference'])}</td><td>{escape(shown['full'])}</td><td>" in page
    rates = results["timing"]["test"]
    for rate in (rates["tokens_per_second_full_depth"], rates["tokens_per_second"]):
        assert f"<td>{rate:.0f}</td>" in page
    assert "CALM state saturation" in page
    model = EarlyExitCausalModel.from_pretrained(finished / "model")
    assert model.config.threshold == results["threshold"] and model.tokenizer.eos_token == "<|end|>"


def test_token_states_were_learnt_in_blocks_and_never_more(finished: Path):
    marker = read_json(finished / "steps" / "round-1-policy.json")["results"]
    assert marker["blocks"] > 1
    last = finished / "rounds" / "1" / "store-train"
    assert sum(file.stat().st_size for file in last.iterdir()) <= 0.00005 * 2**30


def test_later_rounds_see_copied_states_and_one_store_is_there_at_a_time(small_text: None, tmp_path: Path, monkeypatch):
    rules, stores = [], []

    def watched(model, some, path, dtype, size, batch, rule, **more):
        rules.append(rule)
        stores.append(len(list((tmp_path / "small" / "rounds").glob("*/store-train"))))
        return build_block(model, some, path, dtype, size, batch, rule, **more)

    monkeypatch.setattr("rl_exit.trainers.token_steps.build_block", watched)
    words = ["name=small", f"output_dir={tmp_path}", "alternation.rounds=1"]
    train(load_config(CONFIG, [*SMALL, *words, "generation.samples=0"]), Silent())
    assert rules == [None, ConsistentEE(0.5)] and stores == [0, 0]


def test_a_finished_run_is_told_not_repeated(finished: Path):
    config = load_config(finished / "config.yaml")
    assert train(config, Silent(), resume=True) == read_json(finished / "results.json")
    with pytest.raises(UserError, match="generat"):
        evaluate_model(finished, [], None, None, 8)
    with pytest.raises(UserError, match="decoder writes text"):
        analyse(finished, Silent())
    with pytest.raises(UserError, match="decoder writes text"):
        open_runs([finished])


def test_a_run_that_dies_goes_on_to_the_same_weights(small_text: None, tmp_path: Path, monkeypatch):
    words = [*SMALL, "alternation.rounds=0", "generation.samples=0"]

    def weights(name: str, dies: bool) -> dict:
        config = load_config(CONFIG, [*words, f"name={name}", f"output_dir={tmp_path}"])
        if dies:
            with monkeypatch.context() as patch:
                patch.setattr("rl_exit.trainers.token_steps.measure_split", _die)
                with pytest.raises(KeyboardInterrupt):
                    train(config, Silent())
        train(config, Silent(), resume=dies)
        return EarlyExitCausalModel.from_pretrained(config.run_dir / "model").state_dict()

    whole, resumed = weights("whole", False), weights("resumed", True)
    assert all(np.array_equal(whole[name].numpy(), resumed[name].numpy()) for name in whole)


def _die(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_lora_trains_adapters_and_exits_and_merges(small_text: None, tmp_path: Path):
    config = load_config(
        CONFIG,
        [
            *SMALL,
            "init.lora.rank=2",
            "task_step.lora.rank=2",
            "generation.samples=0",
            "keep_rounds=all",
            f"output_dir={tmp_path}",
        ],
    )
    train(config, Silent())
    start, model = (
        EarlyExitCausalModel.from_pretrained(config.run_dir / name) for name in ("init/model", "rounds/2/model")
    )
    assert not any("lora" in name for name in model.state_dict())
    embeddings = [one.get_input_embeddings().weight for one in (start, model)]
    assert bool((embeddings[0] == embeddings[1]).all()), "LoRA leaves the embeddings, and so the head, alone"
    moved = [one.backbone.model.layers[0].self_attn.q_proj.weight for one in (start, model)]
    assert bool((moved[0] != moved[1]).any())


def test_what_does_not_go_together_is_refused(tmp_path: Path):
    for name in ("agreement", "fidelity"):
        with pytest.raises(ConfigError, match=f"{name}' is for generation"):
            load_config(None, [f"reward.name={name}"])
    rows = "".join(json.dumps({"prompt": "a b", "response": " c d"}) + "\n" for _ in range(8))
    (tmp_path / "train.jsonl").write_text(rows)
    local = ["task.name=local", "task.kind=generation", f"task.path={tmp_path}", f"output_dir={tmp_path / 'runs'}"]
    for words, said in (
        (["model.backbone=minilm"], "an encoder"),
        (["init.objective=two_stage"], "accepted: weighted, uniform, distilled"),
        (["model.scratch.hidden=33"], "hidden a multiple"),
    ):
        config = load_config(None, [*SMALL, *local, *words])
        with pytest.raises(UserError, match=said):
            train(config, Silent(), overwrite=True)
