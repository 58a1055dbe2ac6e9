"""The engine: equal to all exits whatever the batch, and layers are really skipped."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from rl_exit import EarlyExitModel
from rl_exit import pooling as pools
from rl_exit.criteria import Carry, ConsistentEE, Fixed, LayerView, criterion
from rl_exit.data.instances import Instances
from rl_exit.errors import ConfigError, DataError
from rl_exit.inference import run_batch, run_instances
from rl_exit.models.pretrained import find_source, load_tokenizer
from rl_exit.pooling import DepthPool
from rl_exit.stepping import advance, enter, enter_singly

WORDS = ("cat", "dog", "horse", "saw", "drill", "the", "red", "near", "under", "my", "found")


@dataclass(frozen=True)
class Planned:
    """Rows leave where the test says; also holds that the carry stays with its row."""

    exits: Tensor
    seen: list[int] = field(default_factory=list)
    name = "planned"

    def start(self, batch_size: int, device: torch.device) -> Carry:
        return {"row": torch.arange(batch_size, device=device)}

    def leave(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        self.seen.append(len(carry["row"]))
        return self.exits[carry["row"]] == layer


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    tokenizer = load_tokenizer(find_source(str(tiny_backbone)))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("llama") / "tiny-llama"
    LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tiny_backbone: Path, tiny_llama: Path) -> dict[str, EarlyExitModel]:
    found = {}
    for pooling in ("cls", "mean", "last"):
        found[f"bert-{pooling}"] = EarlyExitModel.from_backbone(
            str(tiny_backbone), ("a", "b", "c"), pooling=pooling, max_length=40
        )
    for inputs in ("answers", "both"):
        found[f"bert-{inputs}"] = EarlyExitModel.from_backbone(
            str(tiny_backbone), ("a", "b", "c"), pooling="mean", max_length=40, policy_inputs=inputs, policy_shared=True
        )
    for inputs in ("answers", "state"):
        found[f"bert-own-{inputs}"] = own = EarlyExitModel.from_backbone(
            str(tiny_backbone),
            ("a", "b", "c"),
            pooling="mean",
            max_length=40,
            policy_inputs=inputs,
            policy_answer="own",
        )
        for value in own.answer_heads.buffers():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2)))
    found["llama-last"] = EarlyExitModel.from_backbone(str(tiny_llama), ("a", "b", "c"), max_length=40)
    sample = instances_of([random.Random(i).randint(1, 40) for i in range(50)], seed=1).batch(range(50))
    with torch.no_grad():
        for model in found.values():
            # Policies that let some rows go at every layer, so that the engine has something to do.
            model.policy.weight_out *= 30
            model.policy.bias_out -= model.exit_logits(*model.all_exits(**sample)).quantile(0.6, dim=0)
    return found


@pytest.fixture(scope="module")
def model(models: dict[str, EarlyExitModel]) -> EarlyExitModel:
    return models["bert-mean"]


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(count)]


def instances_of(lengths: list[int], seed: int, vocabulary: int = 20) -> Instances:
    rng = np.random.default_rng(seed)
    return Instances(
        ids=np.arange(len(lengths)),
        labels=np.zeros(len(lengths), dtype=np.int64),
        tokens=rng.integers(4, vocabulary, sum(lengths)).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_types=None,
        pad_token_id=0,
    )


@contextmanager
def counting(model: EarlyExitModel) -> Iterator[list[tuple[int, int, int]]]:
    """(layer, rows, tokens) of every call of a layer of the backbone."""
    calls: list[tuple[int, int, int]] = []
    layers: nn.ModuleList = model.backbone.model.encoder.layer

    def hook(number: int):
        def record(module, args):
            calls.append((number, args[0].shape[0], args[0].shape[1]))

        return record

    handles = [layer.register_forward_pre_hook(hook(number)) for number, layer in enumerate(layers, 1)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["bert-cls", "bert-mean", "bert-last", "llama-last"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_answers_equal_all_exits_whatever_the_batch(models, name, data):
    """Random lengths, batch sizes and exit layers; the reference is each row alone at full depth."""
    model = models[name]
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=12), "lengths")
    size = data.draw(st.integers(1, len(lengths)), "batch size")
    exits = data.draw(st.lists(st.integers(1, model.num_layers), min_size=len(lengths), max_size=len(lengths)), "exits")
    rows = instances_of(lengths, seed=sum(lengths))
    order = data.draw(st.permutations(range(len(lengths))), "order")
    for start in range(0, len(order), size):
        part = order[start : start + size]
        plan = Planned(torch.tensor([exits[row] for row in part]))
        out = run_batch(model, rows.batch(part), plan)
        assert out.exit_layer.tolist() == [exits[row] for row in part]
        with torch.no_grad():
            alone = torch.cat([model.all_exits(**rows.batch([row])).logits[:, exits[row] - 1] for row in part])
        torch.testing.assert_close(out.logits, alone, atol=1e-5, rtol=0)


@dataclass(frozen=True)
class Dated:
    """Rows leave where the test says, known by the norm of their first state, so whatever batch they run in."""

    exits: Tensor
    marks: Tensor
    name = "dated"

    def start(self, batch_size: int, device: torch.device) -> Carry:
        return {}

    def leave(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        if layer == 1:
            carry["mark"] = view.state.norm(dim=-1)  # goes with the row; unlike in any two rows
        apart = (carry["mark"][:, None] - self.marks[None]).abs()
        return self.exits[apart.argmin(1)] == layer


@pytest.mark.parametrize("name", ["bert-cls", "bert-mean", "bert-last", "llama-last"])
@pytest.mark.parametrize("pooled", [True, False])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_files_are_answered_as_row_by_row(models, name, pooled, data):
    """Random lengths, batch sizes and exits, with survivors of several batches put together."""
    model = models[name]
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=20), "lengths")
    size = data.draw(st.integers(1, 8), "batch size")
    exits = data.draw(st.lists(st.integers(1, model.num_layers), min_size=len(lengths), max_size=len(lengths)), "exits")
    rows = instances_of(lengths, seed=sum(lengths))
    with torch.no_grad():
        alone = [model.all_exits(**rows.batch([row])) for row in range(len(lengths))]
    marks = torch.cat([one.states[:, 0].norm(dim=-1) for one in alone])
    # Rows whose marks nearly coincide (equal texts) leave together.
    exits = [exits[int((marks - mark).abs().lt(1e-4).nonzero()[0])] for mark in marks]
    rule = Dated(torch.tensor(exits), marks)
    most = data.draw(st.sampled_from([1, 50, 768]), "most tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "MOST_TOKENS", most)
        patch.setattr(pools, "ENOUGH_TOKENS", (most + 1) // 2)
        out = run_instances(model, rows, rule, size, pooled=pooled)
    assert out.exit_layer.tolist() == exits
    expected = torch.stack([one.logits[0, layer - 1] for one, layer in zip(alone, exits, strict=True)])
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=0)


def test_survivors_of_several_batches_run_together(model):
    """At batch size 4 no layer runs for fewer than 4 rows while there are so many to wait for."""
    rows = instances_of([9] * 32, 0)
    with torch.no_grad():
        every = model.all_exits(**rows.batch(range(32)))
    score = every.logits[:, 0, 0]
    rule = Above(float(score.sort().values[15:17].mean()))  # 16 of 32 leave at layer 1
    with counting(model) as calls:
        out = run_instances(model, rows, rule, 4)
    assert sorted(calls) == [(1, 4, 9)] * 8 + [(2, 4, 9)] * 4 + [(3, 4, 9)] * 4
    with counting(model) as alone:
        again = run_instances(model, rows, rule, 4, pooled=False)
    assert len(alone) > len(calls)
    assert torch.equal(out.exit_layer, again.exit_layer)


@dataclass(frozen=True)
class Above:
    """Leave at layer 1 if the first logit is above the bound."""

    bound: float
    name = "above"

    def start(self, batch_size: int, device: torch.device) -> Carry:
        return {}

    def leave(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        return view.logits[:, 0] > self.bound if layer == 1 else view.everyone(False)


@pytest.mark.parametrize("name", ["bert-cls", "bert-mean", "llama-last"])
def test_single_rows_enter_together_and_run_alone(models, name, monkeypatch):
    """Embedded in one batch, each with its own length, mask and tables from then on; an empty row too."""
    model = models[name]
    instances = instances_of([9, 3, 1, 0, 9, 12, 5], seed=4)
    asked = []

    def counted(*given):
        asked.append(len(given[3]))
        return enter_singly(*given)

    monkeypatch.setattr("rl_exit.inference.enter_singly", counted)
    monkeypatch.setattr("rl_exit.inference.SINGLES", 4)
    together = run_instances(model, instances, Fixed(2), 1)
    assert asked == [4, 3]
    rows = np.array([5, 1, 3])
    with torch.inference_mode():
        for row, alone in zip(rows, enter_singly(model, instances, Fixed(2), rows), strict=True):
            length = int(instances.lengths[row])
            assert alone.rows.tolist() == [row] and alone.state.lengths.tolist() == [length]
            assert alone.state.length == max(length, 1) and alone.state.padded == (length == 0)
            single = enter(model, instances.batch(np.array([row])), Fixed(2))
            torch.testing.assert_close(alone.state.hidden[:, :length], single.state.hidden[:, :length])
            both = [advance(model, each, Fixed(9)).inside.state.hidden[:, :length] for each in (alone, single)]
            torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("rl_exit.inference.SINGLES", 1)
    torch.testing.assert_close(
        together.logits, run_instances(model, instances, Fixed(2), 1).logits, atol=1e-5, rtol=1e-5
    )


def test_enough_tokens_do_not_wait(model, monkeypatch):
    """Survivors that fill a CPU go on at once, unpadded, rather than wait for others of another length."""
    enough = 100
    monkeypatch.setattr(pools, "ENOUGH_TOKENS", enough)
    rows = instances_of([40] * 8 + [30] * 8, 0)
    with torch.no_grad():
        score = model.all_exits(**rows.batch(range(16))).logits[:, 0, 0]
    rule = Above(float(score.sort().values[7:9].mean()))
    with counting(model) as calls:
        run_instances(model, rows, rule, 8)
    left = {length: int((part > rule.bound).sum()) for length, part in ((40, score[:8]), (30, score[8:]))}
    assert left[40] + left[30] == 8
    at_once = {length: 8 - gone for length, gone in left.items() if (8 - gone) * length >= enough}
    assert at_once and all((2, stay, length) in calls for length, stay in at_once.items())


def test_few_rows_wait_at_any_time(model, monkeypatch):
    """What the pool holds is bounded by the layers and the batch size, not by the number of texts."""
    most = []
    put = DepthPool.put
    monkeypatch.setattr(DepthPool, "put", lambda self, group: (put(self, group), most.append(len(self)))[0])
    run_instances(model, instances_of([5 + i % 7 for i in range(300)], 0), ConsistentEE(0.5), 8)
    assert 8 <= max(most) <= model.num_layers * 8


def test_the_reference_tells_neighbouring_exits_apart(models):
    """What the property above would miss if all exits were alike."""
    for model in models.values():
        logits = model.all_exits(**instances_of([5, 9], 0).batch([0, 1])).logits
        assert (logits[:, 1:] - logits[:, :-1]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("name", ["bert-mean", "llama-last", "bert-own-answers", "bert-own-state"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_policy_exits_are_those_of_the_rule(models, name, batch_size):
    model = models[name]
    rows = instances_of([random.Random(i).randint(1, 40) for i in range(50)], seed=1)
    with torch.no_grad():
        every = model.all_exits(**rows.batch(range(50)))
        pi = model.exit_logits(every.states, every.logits).sigmoid()
    leave = torch.cat([pi > 0.5, torch.ones(50, 1, dtype=torch.bool)], 1)
    expected = leave.int().argmax(1) + 1
    assert len(expected.unique()) >= 3
    out = run_instances(model, rows, ConsistentEE(0.5), batch_size)
    assert torch.equal(out.exit_layer, expected)
    told = model.answers(every.states, every.logits)[torch.arange(50), expected - 1]
    torch.testing.assert_close(out.logits, told, atol=1e-5, rtol=0)
    if model.answer_heads is not None:
        plain = every.logits[torch.arange(50), expected - 1]
        assert (plain - told).abs().max() > 0.1, "the heads must matter"
        rule = criterion("fixed", depth=2)
        by_depth = run_instances(model, rows, rule, batch_size).logits
        torch.testing.assert_close(by_depth, every.logits[:, 1], atol=1e-5, rtol=0)


def test_layers_are_really_skipped(model):
    """Each layer runs once, on the survivors only, no longer than the longest of them."""
    lengths, exits = [30, 4, 12, 7], [1, 3, 2, 3]
    plan = Planned(torch.tensor(exits))
    with counting(model) as calls:
        run_batch(model, instances_of(lengths, 0).batch(range(4)), plan)
    assert calls == [(1, 4, 30), (2, 3, 12), (3, 2, 7)]
    assert plan.seen == [4, 3]


def test_no_layer_runs_after_the_last_row_has_left(model):
    with counting(model) as calls:
        out = run_batch(model, instances_of([9, 3], 0).batch([0, 1]), Fixed(1))
    assert calls == [(1, 2, 9)]
    assert out.exit_layer.tolist() == [1, 1]
    with counting(model) as calls:
        run_batch(model, instances_of([9, 3], 0).batch([0, 1]), Fixed(99))
    assert [call[0] for call in calls] == [1, 2, 3]


def test_predict_skips_layers_and_sorts_by_length(model):
    texts = ["cat", " ".join(WORDS * 3), "dog horse", " ".join(WORDS * 2)]
    with counting(model) as calls:
        found = model.predict(texts, batch_size=2, criterion=Fixed(1))
    assert {call[0] for call in calls} == {1}
    assert sorted(call[2] for call in calls) == [4, 35], "long with long, short with short"
    assert [answer.exit_layer for answer in found] == [1, 1, 1, 1]


def test_criteria_that_read_nothing_cost_nothing(model, monkeypatch):
    asked = []
    original = model.exits.at
    monkeypatch.setattr(model.exits, "at", lambda layer, state: asked.append(layer) or original(layer, state))
    monkeypatch.setattr(model.policy, "at", lambda *args: pytest.fail("the policy was asked"))
    run_batch(model, instances_of([9, 3], 0).batch([0, 1]), Fixed(2))
    assert asked == [2]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 1000])
def test_predictions_do_not_depend_on_batch_size_or_order(model, batch_size):
    texts = random_texts(40)
    expected = model.predict(texts, batch_size=16)
    assert len({answer.exit_layer for answer in expected}) >= 2
    found = model.predict(texts, batch_size=batch_size)
    again = model.predict(texts[::-1], batch_size=batch_size)[::-1]
    for one, two, three in zip(expected, found, again, strict=True):
        assert (one.label_id, one.exit_layer) == (two.label_id, two.exit_layer) == (three.label_id, three.exit_layer)
        assert two.probabilities == pytest.approx(one.probabilities, abs=1e-5)


def test_text_pairs_are_read(model):
    first, second = ["cat dog", "saw"], ["the drill", "red"]
    found = model.predict(first, second, threshold=1.0)
    encoded = model.tokenizer(first, second, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.all_exits(encoded["input_ids"], encoded["attention_mask"], encoded.get("token_type_ids")).logits
    for answer, row in zip(found, logits[:, -1].softmax(-1).tolist(), strict=True):
        assert answer.probabilities == pytest.approx(row, abs=1e-5)
    alone = model.predict(first, threshold=1.0)[0].probabilities
    assert alone != pytest.approx(found[0].probabilities, abs=1e-5), "the second text must matter"


def test_threshold_and_criterion(model):
    texts = random_texts(20)
    full = model.predict(texts, threshold=1.0)
    assert {answer.exit_layer for answer in full} == {model.num_layers}
    assert {answer.exit_layer for answer in model.predict(texts, threshold=0.0)} == {1}
    assert model.predict(texts, criterion=criterion("fixed", depth=3)) == full


def test_no_texts_give_no_predictions(model):
    assert model.predict([]) == []
    assert model.predict([], []) == []


def test_odd_texts_are_answered(model):
    texts = ["", " \n", "unknownword", "cat " * 500, "\x00", "日本語 🎉"]
    assert len(model.predict(texts)) == len(texts)
    assert model.predict(iter(texts)) == model.predict(tuple(texts)) == model.predict(np.array(texts, dtype=object))


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ("one string", r"got one string; write \[text\]"),
        (None, "got NoneType"),
        (3, "got int"),
        (b"bytes", "got bytes"),
        ({"text": "x"}, "got dict"),
        (["a", None], r"texts\[1\]: a string is expected, got NoneType"),
        (["a", 3.5], r"texts\[1\]: a string is expected, got float \(3\.5\)"),
        ([["a", "b"]], r"texts\[0\]: a string is expected, got list"),
        (["a", "\ud800"], r"texts\[1\]: not valid Unicode"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(model, texts, told):
    with pytest.raises(DataError, match=told):
        model.predict(texts)


def test_pairs_must_match(model):
    with pytest.raises(DataError, match="2 texts and 1 text_pairs"):
        model.predict(["a", "b"], ["c"])
    with pytest.raises(DataError, match="text_pairs: a list of texts"):
        model.predict(["a"], "c")


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "8", True, None])
def test_batch_size_must_be_a_count(model, batch_size):
    with pytest.raises(ConfigError, match="batch_size"):
        model.predict(["cat"], batch_size=batch_size)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), "0.5", True])
def test_threshold_must_be_a_probability(model, threshold):
    with pytest.raises(ConfigError, match="threshold"):
        model.predict(["cat"], threshold=threshold)


def test_threshold_with_criterion_is_refused(model):
    with pytest.raises(ConfigError, match="either threshold or criterion"):
        model.predict(["cat"], threshold=0.5, criterion=Fixed(1))
    with pytest.raises(ConfigError, match="criterion 'entropy'"):
        model.predict(["cat"], criterion="entropy")


def test_training_mode_is_left_as_it_was(model):
    model.train()
    try:
        expected = model.predict(["cat dog"])
        assert model.training
        assert model.predict(["cat dog"]) == expected, "no dropout in predict"
        with pytest.raises(ValueError, match="evaluation mode"):
            run_batch(model, instances_of([3], 0).batch([0]), Fixed(1))
    finally:
        model.eval()


def test_progress_is_told_every_row(model):
    class Recorder:
        def __init__(self) -> None:
            self.done: list[float] = []

        def update(self, done: float, note: str = "") -> None:
            self.done.append(done)

    recorder = Recorder()
    run_instances(model, instances_of([3, 4, 5], 0), Fixed(1), 2, recorder)
    assert recorder.done == [2, 3]


def test_progress_goes_to_standard_error(model, capsys):
    model.predict(["cat"], progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "predict" in captured.err


def test_empty_instances_are_refused(model):
    with pytest.raises(ValueError, match="at least one instance"):
        run_instances(model, instances_of([], 0), Fixed(1))
