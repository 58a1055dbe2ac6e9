"""Whole texts in two streams give the states that generation would: held against one forced pass per token and exit."""

from __future__ import annotations

import pytest
import torch
from causal_models import CONFIGS, early_exit, ragged

from rl_exit.criteria import ConsistentEE
from rl_exit.models.token_pass import DrawnByPolicy, may_leave, run_text, state_view, token_rows

LENGTHS, STARTS = [9, 6, 8], torch.tensor([3, 2, 5])


def layers_of(model, exits):
    return torch.tensor(model.exit_layers)[exits - 1]


@pytest.mark.parametrize("name", CONFIGS)
def test_states_of_every_exit_are_those_of_the_copying_pass(name):
    model = early_exit(name)
    ids, mask = ragged(LENGTHS)
    torch.manual_seed(1)
    with torch.no_grad():
        done = run_text(model, ids, mask, STARTS, DrawnByPolicy())
        assert len(done.exits.unique()) > 2, "the test needs tokens that leave at different exits"
        rows = token_rows(ids, mask, STARTS)
        shown = layers_of(model, done.exits)
        for row, position in zip(rows.row.tolist(), rows.position.tolist(), strict=True):
            for number, layer in enumerate(model.exit_layers):
                forced = shown.clone()
                forced[row, position] = layer
                expected = model.copied_states(ids, mask, forced)[row, position]
                torch.testing.assert_close(done.states[row, number, position], expected, atol=1e-5, rtol=1e-5)
        # Tokens that left do matter: at full depth the states are others.
        assert (done.states - model.all_exits(ids, mask))[rows.row, :, rows.position].abs().max() > 1e-2


def test_eager_attention_gives_the_same():
    model = early_exit("llama")
    ids, mask = ragged(LENGTHS)
    with torch.no_grad():
        expected = run_text(model, ids, mask, STARTS, ConsistentEE(0.4))
        model.backbone.model.set_attn_implementation("eager")
        found = run_text(model, ids, mask, STARTS, ConsistentEE(0.4))
    rows = token_rows(ids, mask, STARTS)
    torch.testing.assert_close(rows.of(found.states), rows.of(expected.states), atol=1e-5, rtol=1e-5)


def test_who_leaves_is_what_the_rule_says_of_the_states():
    model = early_exit("llama", exit_every=2)
    ids, mask = ragged(LENGTHS)
    rule = ConsistentEE(0.5)
    with torch.no_grad():
        done = run_text(model, ids, mask, STARTS, rule)
        pi = model.policy(done.states.transpose(1, 2).flatten(0, 1)).sigmoid().view(*ids.shape, -1)
    first = torch.cat([pi > 0.5, torch.ones_like(pi[..., :1], dtype=torch.bool)], -1).int().argmax(-1) + 1
    free = may_leave(ids, STARTS)
    assert torch.equal(done.exits[free & mask.bool()], first[free & mask.bool()])
    assert (done.exits[~free] == model.num_exits).all()
    assert 1 < done.exits[free & mask.bool()].float().mean() < model.num_exits


def test_episodes_are_the_tokens_that_predict_the_response():
    ids, mask = ragged(LENGTHS)
    rows = token_rows(ids, mask, STARTS)
    wanted = [(r, p) for r, (length, start) in enumerate(zip(LENGTHS, STARTS.tolist(), strict=True))
              for p in range(start - 1, length - 1)]  # fmt: skip
    assert list(zip(rows.row.tolist(), rows.position.tolist(), strict=True)) == wanted
    assert rows.target.tolist() == [int(ids[r, p + 1]) for r, p in wanted]


@pytest.mark.parametrize("inputs", ["state", "answers", "both"])
def test_the_policy_reads_the_same_in_blocks_and_exit_by_exit(inputs):
    model = early_exit("llama", policy_inputs=inputs)
    ids, mask = ragged(LENGTHS)
    rows = token_rows(ids, mask, STARTS)
    with torch.no_grad():
        states = rows.of(model.all_exits(ids, mask))
        carry: dict = {}
        stepped = [
            model.exit_logit(state_view(model, number, states[:, number - 1]), carry)
            for number in range(1, model.num_exits)
        ]
        torch.testing.assert_close(model.exit_logits(states), torch.stack(stepped, 1), atol=1e-5, rtol=1e-5)
