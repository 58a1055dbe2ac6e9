"""What learned criteria keep: files that come back to the bit, heads whose two ways of answering agree."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from rl_exit.criteria import LEARNED, Learned, criterion, load_criterion, save_criterion
from rl_exit.criteria.heads import head_of, learned_head, make_head, uncertainty
from rl_exit.criteria.learned import learned_words, read_learned, write_learned
from rl_exit.errors import ConfigError, RunError

HEADS = ["lte", "calm_meta", "cat", "palbert", "jei"]
SIZES = {"num_layers": 5, "hidden_size": 6, "num_classes": 3}


def fresh(word: str, seed: int = 0):
    torch.manual_seed(seed)
    head = make_head(word, **SIZES)
    with torch.no_grad():
        for weight in head.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return head


def sample(count: int = 7):
    torch.manual_seed(1)
    return torch.randn(count, 5, 6), torch.randn(count, 5, 3)


@pytest.mark.parametrize("word", HEADS)
def test_files_come_back_to_the_bit(word, tmp_path):
    head = fresh(word)
    learned = learned_head(word, head, **SIZES, params={"threshold": 0.25}, notes={"seed": 3})
    write_learned(tmp_path, learned)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{word}.json", f"{word}.safetensors"]
    back = read_learned(tmp_path, word)
    assert (back.params, back.notes) == ({"threshold": 0.25}, {"seed": 3}) and back.hidden_size == 6
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in head.state_dict().items())
    rule = load_criterion(tmp_path, word)
    assert rule.threshold == 0.25 and load_criterion(tmp_path, word, threshold=0.5).threshold == 0.5
    save_criterion(replace(rule, threshold=0.75), tmp_path / "again")
    assert load_criterion(tmp_path / "again", word).threshold == 0.75


@pytest.mark.parametrize("word", HEADS)
@pytest.mark.parametrize("num_layers", [2, 3, 6])
def test_shapes_for_any_depth(word, num_layers):
    head = make_head(word, num_layers, 4, 2)
    assert head(torch.randn(5, num_layers, 4), torch.randn(5, num_layers, 2)).shape == (5, num_layers - 1)


@pytest.mark.parametrize("word", HEADS)
def test_training_changes_no_copy_and_loading_no_generator(word):
    head = fresh(word)
    learned = learned_head(word, head, **SIZES)
    before = {name: tensor.clone() for name, tensor in learned.tensors.items()}
    with torch.no_grad():
        for weight in head.parameters():
            weight += 1
    assert all(torch.equal(learned.tensors[name], before[name]) for name in before)
    state = torch.get_rng_state()
    loaded = head_of(learned)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(weight.requires_grad for weight in loaded.parameters())


@pytest.mark.parametrize("word", HEADS)
def test_a_head_takes_in_the_scale_it_was_trained_on(word):
    head, (states, logits) = fresh(word), sample()
    mean, scale = torch.randn(6), torch.rand(6) + 0.5
    expected = head((states - mean) / scale, logits)
    head.absorb(mean, scale)
    torch.testing.assert_close(head(states, logits), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(head(states + 0.1, logits), expected, atol=1e-3)


@pytest.mark.parametrize("word", HEADS)
def test_heads_send_gradients_to_states_but_not_to_logits(word):
    head, (states, logits) = fresh(word), sample()
    states.requires_grad_(), logits.requires_grad_()
    head(states, logits).sum().backward()
    assert states.grad is not None and states.grad.abs().sum() > 0
    assert logits.grad is None


def test_uncertainty_hand_worked():
    found = uncertainty(torch.tensor([0.7, 0.2, 0.1]).log())
    squared = torch.tensor([0.49, 0.04, 0.01]) / 0.54
    expected = [0.7, 0.8018186, 0.5, float(-(squared * squared.log()).sum())]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)
    certain = uncertainty(torch.tensor([0.0, -torch.inf]))
    torch.testing.assert_close(certain, torch.tensor([1.0, 0.0, 1.0, 0.0]))


def test_what_cannot_be_kept():
    with pytest.raises(RunError, match="not finite: weight"):
        Learned("beem", 3, 0, 2, {"weight": torch.tensor([0.5, torch.nan])})
    with pytest.raises(RunError, match="no tensors"):
        Learned("beem", 3, 0, 2, {})
    with pytest.raises(ValueError, match="'pabee' is no learned criterion"):
        Learned("pabee", 3, 0, 2, {"weight": torch.ones(2)})
    with pytest.raises(ValueError, match="'beem' has no head"):
        make_head("beem", 3, 4, 2)


def test_damaged_folders(tmp_path):
    write_learned(tmp_path, learned_head("lte", fresh("lte"), **SIZES))
    write_learned(tmp_path, Learned("beem", 5, 0, 3, {"weight": torch.ones(4)}))
    assert learned_words(tmp_path) == ["lte", "beem"] and learned_words(tmp_path / "none") == []
    with pytest.raises(RunError, match=r"no learned criterion 'cat' here; found: lte, beem"):
        read_learned(tmp_path, "cat")

    weights = tmp_path / "lte.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes((tmp_path / "beem.safetensors").read_bytes())
    with pytest.raises(RunError, match=r"lte\.safetensors: its tensors are not those that lte\.json describes"):
        read_learned(tmp_path, "lte")
    weights.write_bytes(kept[:20])
    with pytest.raises(RunError, match=r"lte\.safetensors: cannot be read"):
        read_learned(tmp_path, "lte")
    weights.unlink()
    with pytest.raises(RunError, match=r"lte\.safetensors: cannot be read"):
        read_learned(tmp_path, "lte")
    weights.write_bytes(kept)

    described = tmp_path / "lte.json"
    tree = json.loads(described.read_text())
    for change, told in (
        ({"format": 2}, "format 2 of criterion 'lte'; accepted here: format 1"),
        ({"criterion": "cat"}, "of criterion 'cat'"),
        ({"num_layers": None}, "must be whole numbers"),
    ):
        described.write_text(json.dumps(tree | change))
        with pytest.raises(RunError, match=told):
            read_learned(tmp_path, "lte")
    described.write_text(json.dumps(tree | {"hidden_size": 9}))
    with pytest.raises(RunError, match="the tensors do not fit"):
        load_criterion(tmp_path, "lte")
    described.write_text("{")
    with pytest.raises(RunError, match="cannot be read as JSON"):
        read_learned(tmp_path, "lte")


def test_a_word_cannot_use_what_another_learned():
    learned = learned_head("lte", fresh("lte"), **SIZES)
    with pytest.raises(ConfigError, match="'calm_meta' cannot use what criterion 'lte' has learned"):
        criterion("calm_meta", learned=learned, threshold=0.5)
    assert set(LEARNED) == {*HEADS, "right_tool", "beem"}
