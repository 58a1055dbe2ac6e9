"""The multi-exit decoder: equal to the library at the last exit, state copying by definition, scores in blocks."""

from __future__ import annotations

from pathlib import Path

import generation_reference as reference
import pytest
import torch
from causal_models import CONFIGS, VOCABULARY, early_exit, library_model, ragged
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from rl_exit import EarlyExitModel
from rl_exit.errors import ModelError
from rl_exit.models import causal
from rl_exit.models.causal import EarlyExitCausalModel, present
from rl_exit.models.lora import add_lora, merge_lora
from rl_exit.models.pretrained import find_source, load_tokenizer
from rl_exit.objectives import ObjectiveOptions, Shape, objective
from rl_exit.trainers.phase_module import PhaseModule


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_exit_is_the_library_model(name):
    library, made = library_model(name), early_exit(name)
    ids, mask = ragged([9, 4, 7])
    with torch.no_grad():
        expected = library(ids, attention_mask=mask).logits
        states = made.all_exits(ids, mask)
        found = made.head(states[:, -1])
    assert states.shape == (3, made.num_exits, 9, 32)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(made.head(states[:, -2])[real], expected[real], atol=1e-2)


def test_fresh_exits_read_their_layer_as_the_model_reads_its_last():
    library = library_model("llama")
    made = EarlyExitCausalModel.from_model(library, None, exit_every=2, exit_rank=3)
    assert made.exit_layers == (2, 4) and made.num_exits == 2
    ids, _ = ragged([6])
    with torch.no_grad():
        hidden = library.model(ids, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(made.all_exits(ids)[:, 0], library.model.norm(hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("every", "layers"), [(1, (1, 2, 3, 4)), (2, (2, 4)), (3, (3, 4))])
def test_exits_stand_at_every_kth_layer_and_the_last(every, layers):
    assert early_exit("llama", exit_every=every).exit_layers == layers


@pytest.mark.parametrize("every", [0, 4, -1, 1.5, True, "2"])
def test_exits_that_cannot_be_are_refused(every):
    with pytest.raises(ModelError, match="exit_every"):
        early_exit("llama", exit_every=every)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("every", [1, 2])
def test_states_are_copied_by_definition(name, every):
    model = early_exit(name, exit_every=every, exit_rank=2)
    lengths = [7, 4]
    ids, mask = ragged(lengths)
    torch.manual_seed(3)
    exits = torch.tensor(model.exit_layers)[torch.randint(0, model.num_exits, ids.shape)]
    with torch.no_grad():
        found = model.copied_states(ids, mask, exits)
        full = model.copied_states(ids, mask, torch.full_like(exits, model.num_layers))
        torch.testing.assert_close(full, model.all_exits(ids, mask)[:, -1])
        for row, length in enumerate(lengths):
            expected = reference.copied_states(model, ids[row, :length].tolist(), exits[row].tolist())
            torch.testing.assert_close(found[row, :length], expected, atol=1e-5, rtol=1e-5)
            assert (full[row, :length] - expected).abs().max() > 1e-2, "copying must matter"


def test_present_takes_the_output_of_those_inside():
    before, after = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    inside = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(present(before, after, inside)[..., 0], inside.float())


def test_a_layer_without_exit_is_refused():
    model = early_exit("llama", exit_every=2)
    with pytest.raises(ValueError, match="without exit"):
        model.copied_states(torch.ones(1, 2, dtype=torch.int64), None, torch.tensor([[1, 4]]))


def test_tokens_are_scored_in_blocks(monkeypatch):
    model = early_exit("gpt2")
    ids, mask = ragged([8, 5])
    with torch.no_grad():
        states = model.all_exits(ids, mask).transpose(1, 2)[:, :-1].reshape(-1, 4, 32)
    targets = ids[:, 1:].reshape(-1)
    logits = model.head(states)
    expected = F.cross_entropy(logits.transpose(1, 2), targets[:, None].expand(-1, 4), reduction="none")
    for block in (1 << 22, 200):
        monkeypatch.setattr(causal, "BLOCK_LOGITS", block)
        scores = model.score_tokens(states, targets)
        torch.testing.assert_close(scores.losses, expected)
        assert torch.equal(scores.chosen, logits.argmax(-1))
        assert torch.equal(scores.correct, logits.argmax(-1) == targets[:, None])
        own = states[:, 2].clone().requires_grad_()
        losses = model.token_losses(own, targets)
        torch.testing.assert_close(losses, expected[:, 2])
        losses.sum().backward()
        assert own.grad is not None and own.grad.abs().sum() > 0
    assert model.token_losses(states[:0, 0], targets[:0]).shape == (0,)


def test_training_loss_is_weighted_by_exit():
    model = early_exit("qwen2")
    ids, mask = ragged([6, 6])
    labels = ids.clone()
    labels[:, :2] = -100
    losses = []
    with torch.no_grad():
        states = model.all_exits(ids, mask)
        for number in range(4):
            logits = model.head(states[:, number, 1:-1])
            losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten()))
        assert model(ids, mask, labels=labels).loss == pytest.approx(losses[-1].item(), abs=1e-5)
        model.train()
        expected = sum(n * loss for n, loss in enumerate(losses, 1)) / 10
        assert model(ids, mask, labels=labels).loss == pytest.approx(expected.item(), abs=1e-5)


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone: Path):
    return load_tokenizer(find_source(str(tiny_backbone)))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_saved_and_loaded_it_is_the_same(name, tokenizer, tmp_path):
    model = early_exit(name, exit_every=2, exit_rank=2, task="tales")
    model.tokenizer = tokenizer
    model.save_pretrained(tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "README.md", "tokenizer.json"} <= names
    assert "exits after layers 2, 4" in (tmp_path / "model" / "README.md").read_text()
    ids, mask = ragged([5, 3])
    for found in (
        EarlyExitModel.from_pretrained(tmp_path / "model"),
        EarlyExitCausalModel.from_pretrained(tmp_path / "model"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
    ):
        assert isinstance(found, EarlyExitCausalModel) and not found.training
        with torch.no_grad():
            assert torch.equal(found.all_exits(ids, mask), model.all_exits(ids, mask))
            assert torch.equal(found.head_weight, model.head_weight)
            assert all(
                torch.equal(a, b) for a, b in zip(found.policy.parameters(), model.policy.parameters(), strict=True)
            )


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_a_library_model_on_disk_is_a_backbone(name, tokenizer, tmp_path):
    library_model(name).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    model = EarlyExitCausalModel.from_backbone(str(tmp_path / "lm"), max_length=64)
    ids, mask = ragged([5, 3])
    expected = early_exit(name).all_exits(ids, mask)[:, -1]
    torch.testing.assert_close(model.all_exits(ids, mask)[:, -1], expected)


def test_a_text_longer_than_the_positions_is_refused(tokenizer, tmp_path):
    library_model("llama").save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(ModelError, match="accepts 4 to 128"):
        EarlyExitCausalModel.from_backbone(str(tmp_path / "lm"), max_length=200)


def test_a_model_without_head_or_without_causality_is_refused(tokenizer, tmp_path):
    library_model("llama").model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"lm_head\.weight missing"):
        EarlyExitCausalModel.from_backbone(str(tmp_path / "base"))
    bert = BertLMHeadModel(BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    bert.cls.predictions.decoder.bias = None
    with pytest.raises(ModelError, match="is an encoder"):
        EarlyExitCausalModel.from_model(bert, None)


def test_lora_leaves_the_head_alone_and_merges_back():
    model = early_exit("llama")
    ids, mask = ragged([6, 4])
    before = model.all_exits(ids, mask).detach()
    add_lora(model, rank=2)
    trainable = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"backbone", "exits"}
    model.token_losses(model.all_exits(ids, mask)[:, 2].flatten(0, 1), ids.flatten()).sum().backward()
    assert model.lm_head.weight.grad is None
    merge_lora(model)
    torch.testing.assert_close(model.all_exits(ids, mask), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_lora_learns_a_family_s_tokens_and_merges(name):
    model = early_exit(name)
    batch, starts = dict(zip(("input_ids", "attention_mask"), ragged([9, 6]), strict=True)), torch.tensor([3, 2])
    torch.manual_seed(0)
    add_lora(model, rank=4, alpha=8.0)
    model.train()
    chosen = objective("weighted", Shape(model.num_exits, 32, VOCABULARY), 1, ObjectiveOptions())
    module = PhaseModule(model, torch.nn.ModuleDict(), chosen.phases[0])
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=0.3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss, _, _ = module(batch, starts, 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        adapted = model.all_exits(**batch)
        merge_lora(model)
        torch.testing.assert_close(model.all_exits(**batch), adapted, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name in model.state_dict())
