"""Tokens in the state store: what each says, prompts left out, blocks within their size, and the loss of a batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from causal_models import VOCABULARY, early_exit
from token_examples import examples
from torch.nn import functional as F

from rl_exit.criteria import ConsistentEE
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import UserError
from rl_exit.method.rewards import memorized_layer
from rl_exit.models.token_pass import run_text
from rl_exit.objectives import ObjectiveOptions, Shape, objective, task_step
from rl_exit.trainers.phase_module import PhaseModule
from rl_exit.trainers.policy_phase import PolicyPhaseSettings, train_policy
from rl_exit.trainers.token_instances import token_instances
from rl_exit.trainers.token_steps import block_settings
from rl_exit.trainers.token_store import POSITIONS, build_block, bytes_per_token, plan_blocks, tokens_of

LENGTHS, STARTS = [9, 6, 8, 5], [3, 2, 5, 4]


@pytest.mark.parametrize("inputs", ["state", "both"])
def test_a_token_is_an_instance_and_prompts_are_none(tmp_path, inputs):
    model, data = early_exit("llama", policy_inputs=inputs), examples(LENGTHS, STARTS)
    rule = ConsistentEE(0.4)
    store = build_block(model, data, tmp_path / "store", "float32", 4, 2, rule)
    assert store.num_instances == sum(LENGTHS) - sum(STARTS) == int(tokens_of(data).sum())
    assert (store.num_layers, store.hidden_size, store.num_classes) == (4, model.policy.hidden_size, VOCABULARY)
    where = {int(number): row for row, number in enumerate(store.ids)}
    batch = data.batch(range(len(data)))
    with torch.no_grad():
        done = run_text(model, **batch, starts=torch.tensor(STARTS), rule=rule)
    for example, (length, start) in enumerate(zip(LENGTHS, STARTS, strict=True)):
        for position in range(start, length):  # of the token that is predicted
            row = where.pop(example * 10 * POSITIONS + position)
            state = done.states[example, :, position - 1]
            target = batch["input_ids"][example, position]
            with torch.no_grad():
                logits = model.head(state)
                reads = model.policy_reads(state[None])[0]
            assert store.labels[row] == int(target)
            np.testing.assert_allclose(store.losses[row], F.cross_entropy(logits, target.expand(4), reduction="none"),
                                       atol=1e-4)  # fmt: skip
            assert store.correct[row].tolist() == (logits.argmax(-1) == target).tolist()
            np.testing.assert_allclose(store.states([row])[0], reads, atol=1e-4)
    assert not where, "tokens of prompts are in the store"
    assert store.memorized().tolist() == memorized_layer(store.correct).tolist()
    assert store.logits.shape[-1] == 0 and StateStore.open(tmp_path / "store").block([0]).logits.shape == (1, 4, 0)


def test_agreement_stands_where_correct_stood(tmp_path):
    model, data = early_exit("llama"), examples(LENGTHS, STARTS)
    store = build_block(model, data, tmp_path / "store", "float32", 64, 4, agreement=True)
    assert store.correct[:, -1].all() and not store.correct[:, 0].all()


def test_blocks_keep_within_the_size_and_hold_every_example_once(tmp_path):
    model = early_exit("llama")
    data = examples([30] * 40, [5] * 40)
    gib = 300_000 / 2**30
    plan = plan_blocks(data, model.num_exits, model.policy.hidden_size, "float32", gib, seed=0)
    assert len(plan) > 1 and sorted(np.concatenate(plan).tolist()) == list(range(40))
    for rows in plan:
        store = build_block(model, data.take(rows), tmp_path / "store", "float32", 128, 8)
        on_disk = sum(file.stat().st_size for file in Path(store.path).iterdir())
        assert on_disk <= 300_000
        assert store.num_instances * bytes_per_token(4, 32, "float32") > 0.6 * on_disk
    with pytest.raises(UserError, match=r"store\.max_gib"):
        plan_blocks(data, 4, 32, "float32", 1e-7, seed=0)


def test_schedules_go_on_over_blocks():
    whole = PolicyPhaseSettings(lr=1.0, lr_final=0.0, epsilon=0.4, epsilon_final=0.0)
    parts = [block_settings(whole, index, 4) for index in range(4)]
    assert [part.lr for part in parts] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert [part.lr_final for part in parts] == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert [part.epsilon for part in parts] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert len({part.seed for part in parts}) == 4 and block_settings(whole, 0, 1) is whole


def test_the_policy_phase_runs_on_tokens_as_on_anything(tmp_path):
    model, data = early_exit("llama"), examples([30] * 12, [5] * 12)
    build_block(model, data, tmp_path / "store", "float32", 512, 8)
    weights = {name: value.detach().clone() for name, value in model.policy.state_dict().items()}
    settings = PolicyPhaseSettings(algorithm="exact", epochs=3, width=64, reward="vanilla", alpha=0.5, lr=1e-2)
    outcome = train_policy(tmp_path / "store", weights, settings)
    assert outcome.rows[-1]["return"] > outcome.rows[0]["return"]


def test_the_loss_of_a_batch_is_that_of_its_response_tokens():
    model, data = early_exit("llama"), examples(LENGTHS, STARTS)
    chosen = objective("weighted", Shape(4, 32, VOCABULARY), 1, ObjectiveOptions())
    module = PhaseModule(model, torch.nn.ModuleDict(), chosen.phases[0])
    batch, starts = data.batch(range(4)), torch.tensor(STARTS)
    loss, last, right = module(batch, starts, 0)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (length, start) in enumerate(zip(LENGTHS, STARTS, strict=True)):
        labels[row, start:length] = batch["input_ids"][row, start:length]
    model.train()  # in training its own forward gives Eq. 2
    expected = model(batch["input_ids"], batch["attention_mask"], labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert right.shape == (4,) and last > 0
    everything = labels.where(labels != -100, batch["input_ids"])
    assert abs(float((model(batch["input_ids"], labels=everything).loss - loss).detach())) > 1e-3, (
        "prompts would have counted"
    )


def test_in_the_task_step_tokens_see_what_those_that_left_show():
    model, data = early_exit("llama"), examples(LENGTHS, STARTS)
    batch, starts = data.batch(range(4)), torch.tensor(STARTS)
    (phase,) = task_step(lambda states, _: model.exit_logits(states), "sample", 1, ObjectiveOptions()).phases
    module = PhaseModule(model, torch.nn.ModuleDict(), phase)

    def expected(leaves: bool) -> torch.Tensor:
        torch.manual_seed(3)
        states, logits, targets, _ = token_instances(model, batch, starts, leaves)
        return phase.loss(states, logits, targets, 0)

    torch.manual_seed(3)
    loss, _, _ = module(batch, starts, 0)
    torch.testing.assert_close(loss, expected(leaves=True))
    assert abs(float((loss - expected(leaves=False)).detach())) > 1e-4, "copying would not have mattered"
