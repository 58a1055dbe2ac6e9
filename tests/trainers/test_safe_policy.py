"""Safe policy improvement: who decides is settled on instances that are new to the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_exit.config import load_config
from rl_exit.criteria import ConsistentEE, MaxProbability
from rl_exit.data.instances import Instances
from rl_exit.envs.state_store import StateStore, StateStoreWriter
from rl_exit.errors import ConfigError, ModelError
from rl_exit.evaluation import exit_layers, log_odds
from rl_exit.files import read_json
from rl_exit.inference import run_batch
from rl_exit.measurement import losses_of
from rl_exit.models import native_exits
from rl_exit.models.answers import confidence_log_odds
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.models.policy import PolicyHeads
from rl_exit.progress import Silent
from rl_exit.trainers import label_steps, safe_policy
from rl_exit.trainers.alternation import train
from rl_exit.trainers.safe_policy import PolicyTrial, try_policy
from rl_exit.trainers.store_evaluation import deciding_logits

LAYERS, COUNT = 3, 600


def sure(labels: np.ndarray, right: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Logits [N, 2] of an exit that is right where ``right`` is, by a margin."""
    sign = np.where(right, 1.0, -1.0) * (2 * labels - 1)
    return np.stack([-0.5 * sign * margin, 0.5 * sign * margin], -1).astype(np.float32)


def store_of(path: Path, confident_and_wrong: bool) -> StateStore:
    """Layer 1 is right in half of the cases: where it is sure, or where it is not; the layers above are right."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, COUNT)
    certain = rng.random(COUNT) < 0.5
    margin = np.where(certain, rng.uniform(3.5, 4.5, COUNT), rng.uniform(0.2, 0.8, COUNT))
    low, high = (1.0, 2.0) if confident_and_wrong else (3.5, 4.5)
    first = sure(labels, certain != confident_and_wrong, margin)
    above = [sure(labels, np.ones(COUNT, bool), rng.uniform(low, high, COUNT)) for _ in range(LAYERS - 1)]
    logits = np.stack([first, *above], 1)
    states = rng.normal(size=(COUNT, LAYERS, 4)).astype(np.float32)
    with StateStoreWriter(path, LAYERS, 4, 2, "float32", 256, instances="i", model="m") as writer:
        right = logits.argmax(-1) == labels[:, None]
        writer.append(np.arange(COUNT), labels, states, losses_of(logits, labels), right, logits)
    return StateStore.open(path)


def heads() -> PolicyHeads:
    return PolicyHeads(LAYERS, 12, 16, shared=True)


@pytest.fixture
def config() -> Any:
    return load_config(None, ["algorithm=exact", "policy.epochs=40", "policy.answer=exit", "seed=1"])


@pytest.mark.parametrize(("misleading", "better"), [(True, True), (False, False)])
def test_a_policy_decides_only_where_confidence_misleads(tmp_path: Path, config: Any, misleading: bool, better: bool):
    store_of(tmp_path / "store", misleading)
    told: list[int] = []
    trial = try_policy(config, tmp_path / "store", heads(), "accuracy", told=told.append)
    assert trial.better is better and trial.instances == COUNT and told == [1, 2, 3, 4, 5]
    assert (trial.gain > 5.0) if better else (trial.gain <= 0.0)
    assert trial.interval[0] <= trial.gain <= trial.interval[1]
    assert ("the policy decides" if better else "leaves by confidence") in trial.in_words()
    if better:
        assert trial == try_policy(config, tmp_path / "store", heads(), "accuracy"), "the same seed, the same trial"
    assert not list(tmp_path.glob("store-*")), "what folds learn on is removed"


def test_no_fold_is_decided_by_a_policy_that_knows_it(tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch):
    """Instances that the exits were fitted to are learnt on by all folds and tried by none."""
    store = store_of(tmp_path / "store", True)
    learnt: list[set[int]] = []
    tried: list[set[int]] = []

    def remember(config: Any, path: Path, like: PolicyHeads, seed: int, **_: Any) -> PolicyHeads:
        learnt.append(set(np.array(StateStore.open(path).ids).tolist()))
        return like

    def score(store: StateStore, policy: Any, inputs: Any, answers: Any, only: Any) -> np.ndarray:
        tried.append(set(np.array(store.ids)[only].tolist()))
        return np.zeros((len(only), LAYERS - 1), np.float32)

    monkeypatch.setattr(safe_policy, "exact_policy", remember)
    monkeypatch.setattr(safe_policy, "exit_logits_of", score)
    held = np.arange(0, COUNT, 3)
    trial = try_policy(config, tmp_path / "store", heads(), "accuracy", held)
    assert trial.instances == len(held) and trial.folds == 5
    assert sorted(one for part in tried for one in part) == held.tolist()
    for seen, new in zip(learnt, tried, strict=True):
        assert not seen & new and seen | new == set(range(COUNT))
    assert store.num_instances == COUNT


def test_own_answers_are_what_is_tried(tmp_path: Path, config: Any):
    """With answers that are always right at layer 1 nothing is left to gain or lose: both leave there."""
    store = store_of(tmp_path / "store", True)
    answers = np.array(store.logits)
    answers[:, 0] = sure(np.array(store.labels), np.ones(COUNT, bool), np.full(COUNT, 3.0))
    trial = try_policy(config, tmp_path / "store", heads(), "accuracy", answers=answers)
    assert trial.gain == 0.0 and not trial.better


def test_log_odds_of_confidence_are_those_of_the_largest_probability():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0], [200.0, 0.0, 1.0], [210.0, 0.0, 1.0]])
    found = confidence_log_odds(logits)
    torch.testing.assert_close(found.sigmoid(), logits.softmax(-1).amax(-1))
    assert found[3] > found[2], "their order is kept where the probability is 1"
    assert found[1] == pytest.approx(np.log(0.5))


@pytest.mark.parametrize("inputs", ["answers", "state", "both"])
@pytest.mark.parametrize("own", [False, True])
def test_a_model_leaves_by_confidence(tiny_backbone: Path, tmp_path: Path, monkeypatch, inputs: Any, own: bool):
    torch.manual_seed(0)
    model = EarlyExitModel.from_backbone(
        str(tiny_backbone), ["a", "b", "c"], policy_inputs=inputs, policy_answer="own" if own else "exit"
    ).eval()
    with torch.no_grad():
        model.exits.weight.normal_(0.0, 0.2)
        if model.answer_heads is not None:
            model.answer_heads.weight_out.normal_(0.0, 0.3)
    ids = torch.randint(4, 20, (40, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def layers(one: EarlyExitModel) -> list[int]:
        return run_batch(one, batch, ConsistentEE(cut)).exit_layer.tolist()

    with torch.inference_mode():
        every = model.all_exits(**batch)
        said = model.answers(every.states, every.logits).softmax(-1).amax(-1)
    cut = float(said[:, 0].sort().values[19:21].mean())  # between two instances
    expected = (1 + torch.cat([said[:, :-1] > cut, torch.ones(40, 1, dtype=torch.bool)], 1).float().argmax(1)).tolist()
    learned = layers(model)
    model.config.policy_rule = "confidence"
    assert layers(model) == expected != learned and len(set(expected)) > 1
    if not own:
        assert run_batch(model, batch, MaxProbability(cut)).exit_layer.tolist() == expected
    model.tokenizer = EarlyExitModel.from_backbone(str(tiny_backbone), ["a", "b"]).tokenizer
    model.save_pretrained(tmp_path / "model")
    again = EarlyExitModel.from_pretrained(tmp_path / "model").eval()
    assert layers(again) == expected
    monkeypatch.setattr(native_exits, "_function", lambda: None)
    again._native = None
    assert layers(again) == expected, "without compiled code"
    again.config.policy_rule = "learned"
    assert layers(again) == learned, "the heads are kept"
    again.config.policy_rule = "mood"
    with pytest.raises(ModelError, match="policy_rule 'mood'"):
        EarlyExitModel(again.config)


@pytest.mark.parametrize("better", [True, False])
def test_a_run_ends_with_the_rule_that_the_trial_chose(tiny_run: list[str], monkeypatch, better: bool):
    trial = PolicyTrial(better, 0.25 if better else -0.25, [-1.0, 1.0], 48, 5)
    asked: list[Any] = []

    def decide(config: Any, kept: Path, like: Any, metric: str, ids: Any, *rest: Any) -> PolicyTrial:
        asked.append(sorted(ids.tolist()))
        return trial

    monkeypatch.setattr(label_steps, "try_policy", decide)
    words = [*tiny_run, "policy.holdout=0.25", "policy.inputs=answers", "policy.safe=true", "alternation.rounds=0"]
    config = load_config(None, words)
    train(config, Silent())
    path = Path(config.run_dir)
    rule = "learned" if better else "confidence"
    results = read_json(path / "results.json")
    assert (results["policy_rule"], results["policy_trial"]) == (rule, trial.to_dict())
    assert asked == [sorted(Instances.open(path / "data" / "held.arrow").ids.tolist())]
    model = EarlyExitModel.from_pretrained(path / "model")
    assert model.config.policy_rule == rule
    for told, words in (("model/README.md", "was no better"), ("report/index.html", "no better on instances new")):
        assert (words in (path / told).read_text()) == (not better)
    store = StateStore.open(path / "rounds" / "1" / "store-dev")
    answers = None if model.answer_heads is None else np.array(model.answers(*_stored(store)).detach())
    odds = deciding_logits(store, model, answers)
    said = np.array(store.logits) if answers is None else answers
    if not better:
        assert np.allclose(odds, confidence_log_odds(torch.from_numpy(said[:, :-1])).numpy())
    assert results["dev"]["mean_exit_layer"] == exit_layers(odds, log_odds(results["threshold"])).mean()


def _stored(store: StateStore) -> tuple[torch.Tensor, torch.Tensor]:
    rows = np.arange(store.num_instances)
    return torch.from_numpy(store.states(rows)).float(), torch.from_numpy(np.array(store.logits))


def test_it_is_tried_where_it_can_be():
    assert load_config(None).tries_policy
    for words in (
        ["policy.holdout=0"],
        ["policy.inputs=state"],
        ["recipe=paper"],
        ["policy.epochs=0"],
        ["inference.threshold=0.5"],
    ):
        assert not load_config(None, words).tries_policy
        with pytest.raises(ConfigError, match=r"policy\.safe = true needs"):
            load_config(None, [*words, "policy.safe=true"])
    assert not load_config(None, ["policy.safe=false"]).tries_policy


def test_a_handful_of_instances_says_nothing(tmp_path: Path, config: Any):
    store_of(tmp_path / "store", True)
    for count in (1, safe_policy.FEWEST - 1):
        assert try_policy(config, tmp_path / "store", heads(), "accuracy", np.arange(count)) is None
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"epochs": 1})})
    assert try_policy(config, tmp_path / "store", heads(), "f1", np.arange(safe_policy.FEWEST)) is not None


def test_a_measured_cost_is_what_the_trial_counts(tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch):
    store_of(tmp_path / "store", True)
    seen: list[Any] = []
    once = safe_policy.measure_at
    monkeypatch.setattr(safe_policy, "measure_at", lambda *given: seen.append(given[2].depths.tolist()) or once(*given))
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"epochs": 1})})
    cost = (1.0, 1.5, 3.0)
    try_policy(config, tmp_path / "store", heads(), "accuracy", changes={"cost": cost})
    try_policy(config, tmp_path / "store", heads(), "accuracy", changes={"cost": None})
    assert seen == [list(cost)] * 2 + [[1.0, 2.0, 3.0]] * 2


def test_a_task_step_draws_by_the_learned_heads(tiny_backbone: Path):
    """Confidence is no distribution over layers; the heads' logits do not depend on who decides."""
    model = EarlyExitModel.from_backbone(str(tiny_backbone), ["a", "b"], policy_inputs="answers").eval()
    ids = torch.randint(4, 20, (6, 5), generator=torch.Generator().manual_seed(0))
    every = model.all_exits(ids)
    job: Any = type("Job", (), {"weights": "expected", "settings": type("S", (), {"epochs": 1}), "options": None})
    asked: list[Any] = []
    from rl_exit.trainers import exit_training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exit_training, "task_step", lambda policy, *_: asked.append(policy))
        exit_training._objective(job, model)
    before = asked[0](every.states, every.logits)
    model.config.policy_rule = "confidence"
    assert torch.equal(asked[0](every.states, every.logits), before)
    assert not torch.equal(model.exit_logits(every.states, every.logits), before)
