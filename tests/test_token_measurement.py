"""Decoders measured on text: tables, judgement, side by side, and the guarantee of Learn-then-Test."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from causal_models import early_exit
from token_examples import examples

from rl_exit.criteria import CALMSoftmax, ConsistentEE
from rl_exit.errors import ConfigError
from rl_exit.models.token_pass import run_text
from rl_exit.token_comparison import agreeing_oracle, calibrated_on_text, compare_rules, fit_meta
from rl_exit.token_measurement import judge, operating_points, tabulate
from rl_exit.writing import write_texts

LENGTHS, STARTS = [20, 14, 17, 12, 19, 15], [3, 2, 5, 4, 6, 3]


@pytest.fixture(scope="module")
def model():
    return early_exit("llama", policy_inputs="both")


@pytest.fixture(scope="module")
def data():
    return examples(LENGTHS, STARTS)


def test_a_table_is_in_the_order_of_the_text(model, data):
    full = tabulate(model, data, scores=(ConsistentEE(0.5),), batch_size=2)
    assert len(full) == sum(LENGTHS) - sum(STARTS)
    assert full.examples.tolist() == sorted(full.examples.tolist())
    assert full.positions[full.examples == 1].tolist() == list(range(LENGTHS[1] - STARTS[1]))
    assert (full.exits == model.num_exits).all()
    leaving = tabulate(model, data, ConsistentEE(0.5), batch_size=3)
    scored = judge(leaving, full, model.exit_layers)
    rows = np.arange(len(full))
    assert scored.accuracy == pytest.approx(leaving.correct[rows, leaving.exits - 1].mean())
    assert scored.perplexity == pytest.approx(math.exp(leaving.losses[rows, leaving.exits - 1].mean()), rel=1e-5)
    assert scored.agreement < 1.0 and scored.saved_layers == pytest.approx(1 - leaving.exits.mean() / 4)
    # Of the first token of each response the prefill decides, at full depth.
    assert (leaving.exits[leaving.positions == 0] == 4).all()
    assert judge(full, full, model.exit_layers).agreement == 1.0


def test_points_and_oracle(model, data):
    full = tabulate(model, data, scores=(ConsistentEE(0.5),))
    points = operating_points(ConsistentEE(0.5), full.scores["consistentee"], 5)
    means = [tabulate(model, data, point).exits.mean() for point in points]
    assert 3 <= len(points) <= 5 and means == sorted(means) and means[0] < means[-1]
    ideal = agreeing_oracle(full)
    assert judge(ideal, full, model.exit_layers).agreement == 1.0 and ideal.exits.mean() < 4
    assert (full.chosen[np.arange(len(full)), ideal.exits - 1] == full.chosen[:, -1]).all()


def test_side_by_side_has_every_rule_and_honest_ends(model, data):
    found = compare_rules(model, data, data, points=2, more=lambda rule: {"seen": float(rule is None)})
    assert set(found) == {"full", "policy", "calm_softmax", "calm_saturation", "calm_meta", "fixed", "oracle"}
    assert found["full"][0]["agreement"] == 1.0 and found["full"][0]["seen"] == 1.0
    assert [row["depth"] for row in found["fixed"]] == [1, 2, 3]


def test_learn_then_test_keeps_its_word_or_says_that_it_cannot(model):
    data = examples([24] * 60, [4] * 60)
    meta, _ = calibrated_on_text(fit_meta(model, data), model, data, delta=0.9, grid=(1.0,))
    assert meta.name == "calm_meta" and meta.threshold == 1.0
    rule, tried = calibrated_on_text(CALMSoftmax(0.5), model, data, delta=0.6, grid=(1.0, 0.9, 0.5, 0.0))
    risks = {row["threshold"]: row["risk"] for row in tried}
    assert risks[rule.threshold] < 0.6
    full, table = tabulate(model, data), tabulate(model, data, rule)
    same = table.at_exit(table.chosen) == full.chosen[:, -1]
    by_text = [1.0 - same[full.examples == row].mean() for row in range(60)]
    assert risks[rule.threshold] == pytest.approx(np.mean(by_text), abs=1e-6)
    with pytest.raises(ConfigError, match="60 calibration texts"):
        calibrated_on_text(CALMSoftmax(0.5), model, data, delta=0.01, grid=(0.0,))


def test_what_is_written_leaves_where_the_forced_text_leaves(model, data):
    class Numbers:
        eos_token_id = None

        def decode(self, ids, skip_special_tokens=False):
            return " ".join(map(str, ids))

    model.tokenizer = Numbers()
    try:
        prompts = [data.tokens[data.offsets[row] : data.offsets[row] + STARTS[row]].tolist() for row in range(3)]
        written = write_texts(model, prompts, CALMSoftmax(0.3), 8, 2)
    finally:
        model.tokenizer = None
    for prompt, one in zip(prompts, written, strict=True):
        ids = torch.tensor([[*prompt, *map(int, one.text.split())]])
        start = torch.tensor([len(prompt)])
        with torch.no_grad():
            done = run_text(model, ids, torch.ones_like(ids), start, CALMSoftmax(0.3), horizon=8)
        assert one.exit_layers == done.exits[0, len(prompt) - 1 : -1].tolist()
