"""Evidence of runs, groups and the command, on run directories made by hand from tiny models."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from rl_exit.cli import app
from rl_exit.config import dump_config, parse_config
from rl_exit.costs import write_costs
from rl_exit.criteria import CRITERIA, criterion, exits_from_store, leaving_above
from rl_exit.data.instances import Instances
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import RunError, UserError
from rl_exit.files import write_json
from rl_exit.inference import run_instances
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.profiling import profile
from rl_exit.progress import Silent
from rl_exit.trainers import compare_evidence
from rl_exit.trainers.compare import NUMBERS_ONLY, check_methods, compare_runs, outputs, write_comparison
from rl_exit.trainers.compare_evidence import own_threshold, run_evidence
from rl_exit.trainers.compare_groups import open_runs
from rl_exit.trainers.run_directory import RunDirectory

SIZES = {"train": 60, "dev": 24, "test": 30}
WORDS = ["consistentee", "fixed", "entropy", "pabee"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Maker:
    """Makes finished runs without training anything."""

    folder: Path
    models: Path

    def __call__(
        self, name: str, *, seed: int = 0, rounds: bool = True, splits: tuple[str, ...] = ("dev", "test"), **tree: Any
    ) -> Path:
        path = self.folder / name
        for split, size in SIZES.items():
            if split == "train" or split in splits:
                made_instances(size, len(split)).save(path / "data" / f"{split}.arrow")
        sizes = {split: SIZES[split] for split in ("train", *splits)}
        task = {"name": "animals", "label_names": ["animal", "tool"], "metric": "accuracy", "sizes": sizes}
        write_json(path / "data" / "task.json", task)
        shutil.copytree(self.models / "initial", path / "init" / "model")
        shutil.copytree(self.models / ("final" if rounds else "initial"), path / "model")
        shutil.copytree(self.models / "initial", path / "rounds" / "1" / "model")
        config = parse_config({"name": name, "output_dir": str(self.folder), "seed": seed, **tree}, "test")
        (path / "config.yaml").write_text(dump_config(config))
        write_json(path / "results.json", {"task": "animals"})
        return path


def made_instances(count: int, seed: int) -> Instances:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(3, 9, count))]).astype(np.int64)
    return Instances(
        ids=np.arange(count, dtype=np.int64),
        labels=rng.integers(0, 2, count).astype(np.int64),
        tokens=rng.integers(4, 20, offsets[-1]).astype(np.int32),
        offsets=offsets,
        token_types=None,
        pad_token_id=0,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("initial", "final")):
        answer = "own" if name == "final" else "exit"
        model = EarlyExitModel.from_backbone(
            str(tiny_backbone), ("animal", "tool"), policy_width=4, policy_answer=answer, seed=number
        )
        if model.answer_heads is not None:
            model.answer_heads.bias_out[:, 1] += 0.2
        with torch.no_grad():  # policies and exits that tell instances apart
            model.policy.weight_out.mul_(20)
            for parameter in model.exits.parameters():
                parameter.mul_(5)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def make(tmp_path: Path, models: Path) -> Maker:
    return Maker(tmp_path / "runs", models)


def test_scores_are_those_of_the_live_engine(make: Maker) -> None:
    run = RunDirectory.open(make("one"))
    found = run_evidence(run, "test", WORDS, Silent())
    assert list(found.sets) == ["final", "initial"] and found.seed == 0
    instances = Instances.open(run.path / "data" / "test.arrow")
    for name, folder in (("final", run.path / "model"), ("initial", run.path / "rounds" / "1" / "model")):
        model = EarlyExitModel.from_pretrained(folder)
        exits = found.sets[name]
        assert exits.split.labels.tolist() == instances.labels.tolist()
        for word, threshold, cut in (("consistentee", 0.4, -np.log(1.5)), ("entropy", 0.6, -0.6), ("pabee", 1, 0.5)):
            key = "patience" if word == "pabee" else "threshold"
            live = run_instances(model, instances, criterion(word, **{key: threshold}))
            above = np.concatenate([exits.scores[word].measured > cut, np.ones((30, 1), bool)], axis=1)
            layers = above.argmax(axis=1) + 1
            assert layers.tolist() == live.exit_layer.tolist(), (name, word)
            rows, own = np.arange(30), exits.scores[word].answers
            told = exits.split.predictions if own is None else own
            assert told[rows, layers - 1].tolist() == live.logits.argmax(-1).tolist()
            assert (own is not None) == (word == "consistentee" and name == "final"), (
                "the policy with heads of its own alone"
            )
            if own is not None:
                assert own.tolist() != exits.split.predictions.tolist()
            assert own_threshold(word, cut) == pytest.approx(threshold)


def test_thresholds_reported_bring_the_figures_reported(make: Maker) -> None:
    """What the table calls the threshold of an operating point, set in the criterion, gives its saved layers."""
    run = make("one", rounds=False)
    tree = compare_runs([run], Silent(), methods=WORDS, replicates=5)
    store = StateStore.open(run / "compare" / "final" / "store-test")
    checked = 0
    for word in ("entropy", "pabee", "fixed"):
        method = tree["methods"][word]
        for point in ("no_loss", "within_1"):
            threshold = method[point]["threshold"][0]
            if threshold is None:
                continue
            key = {"entropy": "threshold", "pabee": "patience", "fixed": "depth"}[word]
            rule = criterion(word, **{key: threshold if word == "entropy" else int(threshold)})
            left = exits_from_store(rule, store.states, store.logits, None).double()
            assert 1 - float(left.mean()) / 3 == pytest.approx(method[point]["saved_layers"]), word
            right = store.correct[np.arange(30), left.long().numpy() - 1].mean()
            assert right == pytest.approx(method[point]["score"])
            checked += 1
    assert checked


def test_layers_can_count_their_measured_time(make: Maker) -> None:
    """A first layer that takes half of all time: what is saved by leaving there is half, and is said to be time."""
    run = make("one", rounds=False)
    model = EarlyExitModel.from_pretrained(run / "model")
    measured = profile(model, [1, 32], lengths=[4, 8], runs=1)
    first = measured.layers.sum(2) + measured.exits.sum(1)[:, None] + measured.policy.sum(1)[:, None]
    layers = np.concatenate([100 * first[..., None], np.repeat(50 * first[..., None], 2, -1)], -1)
    write_costs(run / "model", replace(measured, embed=0 * measured.embed, layers=layers, exits=0 * measured.exits))
    tree = compare_runs([run], Silent(), methods=["fixed"], replicates=0, cost="latency")
    assert tree["cost"] == "latency" and tree["layer_costs"][0] == pytest.approx([1.5, 2.25, 3.0], rel=0.05)
    assert tree["methods"]["fixed"]["curve"][-1][0] == pytest.approx(0.5, abs=0.03)
    assert compare_runs([run], Silent(), methods=["fixed"], replicates=0)["layer_costs"] == [[1.0, 2.0, 3.0]]
    write_comparison(tree, outputs([run], None))
    page = (run / "compare" / "index.html").read_text()
    assert "saved time in %" in page and "saved layers in %" not in page


@pytest.mark.parametrize("word", [word for word in CRITERIA if word not in NUMBERS_ONLY])
def test_own_thresholds_are_those_of_the_criteria(word: str) -> None:
    kind = CRITERIA[word]
    cut = -0.5 if getattr(kind, "comparison", "") == "<" else 0.5
    if word in ("fixed", "pabee"):
        rule = leaving_above(criterion(word, **{kind.swept: 1}), 1.5)  # type: ignore[attr-defined]
        assert getattr(rule, kind.swept) == own_threshold(word, 1.5) == 2  # type: ignore[attr-defined]
    elif word == "consistentee":
        assert own_threshold(word, 0.0) == 0.5 and own_threshold(word, -np.log(3)) == pytest.approx(0.25)
    else:
        # Above the cut: where the threshold itself leaves too, it is the next number.
        assert own_threshold(word, cut) == pytest.approx(0.5, abs=1e-6)
        assert (own_threshold(word, cut) > 0.5) == (getattr(kind, "comparison", "") == ">=")
        assert own_threshold(word, -9.0 if cut > 0 else 9.0) == 0.0  # nothing below what it accepts


def test_a_second_call_reads_what_the_first_kept(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make("one")
    first = run_evidence(RunDirectory.open(path), "test", WORDS, Silent())
    kept = load_file(path / "compare" / "final" / "test.safetensors")
    assert set(kept) == {
        *("ids", "labels", "predictions", "answers.consistentee"),
        *(f"score.{word}" for word in WORDS),
    }

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed again")

    for name in ("build_store", "scores_from_store", "deciding_logits", "model_fingerprint"):
        monkeypatch.setattr(compare_evidence, name, refuse)
    again = run_evidence(RunDirectory.open(path), "test", WORDS, Silent())
    for name, exits in first.sets.items():
        assert again.sets[name].split.predictions.tolist() == exits.split.predictions.tolist()
        for word, scores in exits.scores.items():
            assert np.array_equal(again.sets[name].scores[word].measured, scores.measured)


def test_another_model_in_the_same_place_is_noticed(make: Maker, models: Path) -> None:
    path = make("one", rounds=False)
    before = run_evidence(RunDirectory.open(path), "test", WORDS, Silent())
    assert list(before.sets) == ["final"]  # the finished model's exits are the initial ones
    shutil.rmtree(path / "model")
    shutil.copytree(models / "final", path / "model", copy_function=shutil.copyfile)
    after = run_evidence(RunDirectory.open(path), "test", WORDS, Silent())
    assert list(after.sets) == ["final", "initial"]
    scores = [found.sets["final"].scores["entropy"].measured for found in (before, after)]
    assert not np.array_equal(*scores)
    assert np.array_equal(scores[0], after.sets["initial"].scores["entropy"].measured)


def test_learned_criteria_are_fitted_once_on_the_instances_of_the_policy(make: Maker) -> None:
    path = make("one", rounds=False, policy={"holdout": 0.3, "instances": "held"})
    made_instances(20, 9).save(path / "data" / "held.arrow")
    words = ["right_tool", "lte", "beem"]
    run_evidence(RunDirectory.open(path), "test", words, Silent())
    folder = path / "compare" / "final"
    assert StateStore.open(folder / "store-train").num_instances == 20
    fitted = {file.name: file.read_bytes() for file in sorted((folder / "criteria").iterdir())}
    assert {name.split(".")[0] for name in fitted} == set(words)
    run_evidence(RunDirectory.open(path), "test", [*words, "entropy"], Silent())
    assert fitted == {file.name: file.read_bytes() for file in sorted((folder / "criteria").iterdir())}


def test_criteria_trained_with_the_exits_are_taken(make: Maker) -> None:
    donor = make("donor", rounds=False)
    run_evidence(RunDirectory.open(donor), "test", ["lte"], Silent())
    path = make("one", rounds=False)
    for file in (donor / "compare" / "final" / "criteria").iterdir():
        (path / "init" / "model" / "criteria").mkdir(exist_ok=True)
        shutil.copyfile(file, path / "init" / "model" / "criteria" / file.name)
    run_evidence(RunDirectory.open(path), "test", ["lte"], Silent())
    assert not (path / "compare" / "final" / "criteria").exists()


def test_without_a_policy_for_them_initial_exits_serve_the_baselines(make: Maker) -> None:
    path = make("one")
    shutil.rmtree(path / "rounds")
    found = run_evidence(RunDirectory.open(path), "dev", WORDS, Silent())
    assert set(found.sets["final"].scores) == set(WORDS)
    assert set(found.sets["initial"].scores) == set(WORDS) - {"consistentee"}
    assert found.sets["final"].dev is None


def test_runs_are_grouped_by_everything_but_the_seed(make: Maker) -> None:
    runs = [make("plain-seed1", seed=1), make("plain-seed0"), make("longer-0", policy={"epochs": 77})]
    groups, task = open_runs(runs)
    assert [group.name for group in groups] == ["plain", "longer"] and task.metric == "accuracy"
    assert [run.config.seed for run in groups[0].runs] == [0, 1]
    assert groups[1].settings == {"policy.epochs": 77} and set(groups[0].settings) == {"policy.epochs"}
    # Names that do not tell them apart give way to the settings.
    odd = [make("x1", seed=1, policy={"epochs": 3}), make("x2", policy={"epochs": 4})]
    assert [group.name for group in open_runs(odd)[0]] == ["policy.epochs=3", "policy.epochs=4"]
    tree = compare_runs(runs, Silent(), methods=["entropy", "consistentee"], replicates=5)
    assert {"consistentee", "entropy@initial", "longer/consistentee"} <= set(tree["methods"])
    assert tree["seeds"] == [0, 1] and tree["groups"][1]["seeds"] == [0] and tree["split"] == "test"


@pytest.mark.parametrize("what", ["twice", "same", "task", "open", "nothing", "split", "word"])
def test_what_cannot_be_compared_is_said(make: Maker, tmp_path: Path, what: str) -> None:
    first = make("one", splits=("dev",))
    runs, words, expected = [first], {}, ""
    if what == "twice":
        runs, expected = [first, first], "given twice"
    elif what == "same":
        runs, expected = [first, make("two", splits=("dev",))], r"the seed \(0\)"
    elif what == "task":
        other = make("two", seed=1)
        task = json.loads((other / "data" / "task.json").read_text())
        write_json(other / "data" / "task.json", {**task, "label_names": ["a", "b", "c"]})
        runs, expected = [first, other], "3 classes"
    elif what == "open":
        (first / "results.json").unlink()
        expected = "has not finished"
    elif what == "nothing":
        runs, expected = [tmp_path / "nowhere"], "no run directory"
    elif what == "split":
        words, expected = {"split": "test"}, "labelled splits of task 'animals': dev"
    else:
        words, expected = {"methods": ["entropi"]}, "Did you mean 'entropy'"
    with pytest.raises(UserError, match=expected) as raised:
        compare_runs(runs, Silent(), **words)  # type: ignore[arg-type]
    assert isinstance(raised.value, RunError) or what in ("task", "split", "word")


def test_methods_keep_the_order_of_the_library() -> None:
    assert check_methods(["pabee", "consistentee"]) == ["consistentee", "pabee"]
    assert set(check_methods([])) == set(CRITERIA) - set(NUMBERS_ONLY)


def test_where_a_comparison_is_written(tmp_path: Path) -> None:
    runs = [Path("runs/a"), Path("runs/b")]
    assert outputs(runs, None).page == Path("runs/a/compare/index.html")
    assert outputs(runs, Path("x/all.json")).page == Path("x/all.html")
    assert outputs(runs, Path("x/all.html")).json == Path("x/all.json")
    assert outputs(runs, Path("x")).json == Path("x/compare.json")


def test_the_command_writes_json_and_a_page(make: Maker, tmp_path: Path) -> None:
    path = make("one", rounds=False)
    words = ["compare", str(path), "--methods", "consistentee,entropy", "--replicates", "5", "--quiet"]
    done = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    tree = json.loads(done.stdout)
    assert tree == json.loads((tmp_path / "out" / "compare.json").read_text())
    for key in ("task", "full_depth_score", "oracle", "methods", "difference", "seconds", "command", "versions"):
        assert tree[key], key
    assert "<h2" in (tmp_path / "out" / "index.html").read_text()
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "ConsistentEE" in shown.stdout and "within 1 point: " in shown.stdout
    assert (path / "compare" / "index.html").is_file()
    refused = CliRunner().invoke(app, ["compare", str(tmp_path)])
    assert refused.exit_code == 2
    write_comparison(tree, outputs([path], tmp_path / "again.json"))
    assert (tmp_path / "again.html").is_file()
