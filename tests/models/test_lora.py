"""LoRA in place: starts as the identity, trains only adapters and exits, merges into a plain model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2Model

from rl_exit import EarlyExitModel
from rl_exit.errors import ModelError
from rl_exit.models.lora import add_lora, has_lora, merge_lora
from rl_exit.models.pretrained import find_source, load_tokenizer


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """GPT-2 has transposed linear layers (Conv1D)."""
    tokenizer = load_tokenizer(find_source(str(tiny_backbone)))
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("gpt2") / "tiny-gpt2"
    GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=2, n_positions=64)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["bert", "gpt2"])
def model(request: pytest.FixtureRequest, tiny_backbone: Path, tiny_gpt2: Path) -> EarlyExitModel:
    folder = tiny_backbone if request.param == "bert" else tiny_gpt2
    return EarlyExitModel.from_backbone(str(folder), ("a", "b"), max_length=32)


def batch_of(model: EarlyExitModel) -> dict[str, torch.Tensor]:
    batch = model.tokenizer(["the old cat", "a drill near my new big red saw"], padding=True, return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def states(model: EarlyExitModel) -> torch.Tensor:
    with torch.no_grad():
        return model.all_exits(**batch_of(model)).states


def step(model: EarlyExitModel) -> None:
    """One large update on what is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch_of(model), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()


def test_fresh_adapters_change_nothing(model):
    before = states(model)
    torch.manual_seed(0)
    add_lora(model, rank=4)
    torch.testing.assert_close(states(model), before, atol=1e-6, rtol=0)


def test_only_adapters_and_exits_are_trainable_and_move(model):
    torch.manual_seed(0)
    add_lora(model, rank=4, alpha=8.0)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"exits.weight", "exits.bias"} < trainable
    assert all("lora_" in name for name in trainable - {"exits.weight", "exits.bias"})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    step(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trainable
    assert any("lora_B" in name for name in moved)


def test_merged_equals_adapted_and_is_plain(model, tmp_path):
    plain = states(model)
    names = {name for name, _ in model.named_parameters()}
    torch.manual_seed(0)
    add_lora(model, rank=4, alpha=8.0)
    model.train()
    step(model)
    model.eval()
    adapted = states(model)
    assert not torch.allclose(adapted, plain, atol=1e-3), "the adapters must have learnt something to merge"
    with pytest.raises(ModelError, match="merge_lora"):
        model.save_pretrained(tmp_path / "model")
    merge_lora(model)
    torch.testing.assert_close(states(model), adapted, atol=1e-5, rtol=0)
    assert {name for name, _ in model.named_parameters()} == names
    assert all(p.requires_grad for p in model.parameters())
    assert not has_lora(model)
    model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(states(EarlyExitModel.from_pretrained(tmp_path / "model")), adapted, atol=1e-5, rtol=0)


def test_targets_choose_the_layers(tiny_backbone):
    model = EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b"), max_length=32)
    add_lora(model, rank=2, targets=("query", "value"))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted == {"query", "value"}


def test_adapters_can_be_put_on_again_after_merging(tiny_backbone):
    model = EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b"), max_length=32)
    add_lora(model, rank=2)
    with pytest.raises(ModelError, match="already"):
        add_lora(model, rank=2)
    merge_lora(model)
    add_lora(model, rank=3)
    assert has_lora(model)


def test_bad_settings_are_refused(tiny_backbone):
    model = EarlyExitModel.from_backbone(str(tiny_backbone), ("a", "b"), max_length=32)
    with pytest.raises(ModelError, match=r"'quary'.*Did you mean 'query'"):
        add_lora(model, rank=2, targets=("quary",))
    with pytest.raises(ModelError, match="rank 0"):
        add_lora(model, rank=0)
    with pytest.raises(ModelError, match="no LoRA adapters"):
        merge_lora(model)
