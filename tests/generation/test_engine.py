"""The engine against the library, against a reference without cache, and against the teacher-forced pass."""

from __future__ import annotations

from dataclasses import dataclass

import generation_reference as reference
import pytest
import torch
from causal_models import CONFIGS, VOCABULARY, early_exit, library_model, ragged
from torch import Tensor

from rl_exit.criteria import Carry, ConsistentEE, Fixed, LayerView, criterion
from rl_exit.criteria.heads import make_head
from rl_exit.criteria.learned import Learned
from rl_exit.generation import engine as engine_module
from rl_exit.generation.engine import Engine

LENGTHS = [9, 1, 4, 7]


@dataclass(frozen=True)
class Planned:
    """Rows leave where the test says: exit [steps, B], read by the share of the generation that is done."""

    exits: Tensor
    name = "planned"

    def start(self, batch_size: int, device: torch.device) -> Carry:
        return {"row": torch.arange(batch_size)}

    def leave(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        assert view.progress is not None
        step = (view.progress * len(self.exits)).round().long()
        return self.exits[step, carry["row"]] == layer


def left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers wants prompts."""
    shift = [int(row.sum()) for row in mask]
    rows = [torch.cat((row[n:], row[:n])) for row, n in zip(ids, shift, strict=True)]
    masks = [torch.cat((row[n:], row[:n])) for row, n in zip(mask, shift, strict=True)]
    return torch.stack(rows), torch.stack(masks)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_depth_is_the_library(name):
    """Greedy and sampled with a seed, token for token, for 8 ragged prompts."""
    library, model = library_model(name), early_exit(name)
    ids, mask = left_padded(*ragged([9, 4, 7, 1, 2, 12, 5, 5]))
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 20, "pad_token_id": 0}
    assert torch.equal(model.generate(**given, threshold=1.0), library.generate(**given, do_sample=False))
    for words in ({"temperature": 0.7, "top_k": 5}, {"top_p": 0.8, "top_k": 0, "min_p": 0.01}):
        torch.manual_seed(3)
        expected = library.generate(**given, do_sample=True, **words)
        found = model.generate(**given, do_sample=True, seed=3, criterion=Fixed(99), **words)
        assert torch.equal(found, expected)
        assert not torch.equal(found, model.generate(**given, do_sample=True, seed=4, threshold=1.0, **words))
    torch.manual_seed(3)
    assert torch.equal(model.generate(**given, do_sample=True, threshold=1.0, **words), expected), (
        "torch's own generator"
    )


def test_prompts_may_be_padded_on_either_side():
    model = early_exit("gpt2")
    ids, mask = ragged(LENGTHS)
    left, left_mask = left_padded(ids, mask)
    one = model.generate(ids, attention_mask=mask, max_new_tokens=9, threshold=0.5)
    two = model.generate(left, attention_mask=left_mask, max_new_tokens=9, threshold=0.5)
    assert torch.equal(one[:, :9], ids) and torch.equal(two[:, :9], left) and torch.equal(one[:, 9:], two[:, 9:])


def learned(word: str, model) -> Learned:
    torch.manual_seed(7)
    head = make_head(word, model.num_exits, 32, VOCABULARY)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0.0, 0.5)
    return Learned(word, model.num_exits, 32, VOCABULARY, head.state_dict())


RULES = {
    "policy": lambda model: ConsistentEE(0.5),
    "softmax": lambda model: criterion("calm_softmax", threshold=0.05),
    "saturation": lambda model: criterion("calm_saturation", threshold=0.55),
    "meta": lambda model: criterion("calm_meta", threshold=0.6, learned=learned("calm_meta", model)),
    "palbert": lambda model: criterion("palbert", threshold=0.7, learned=learned("palbert", model)),
    "patience": lambda model: criterion("pabee", patience=1),
    "fixed": lambda model: Fixed(2),
}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *(("llama", rule) for rule in RULES),
        *zip(
            ["qwen2-window", "qwen3", "gpt2", "gpt_neox", "llama-tied", "gpt_neox-serial", "qwen2"], RULES, strict=True
        ),
    ],
)
def test_tokens_and_exits_are_those_of_a_reference_without_cache(name, rule):
    seed = list(RULES).index(rule)
    model = early_exit(name, seed, exit_every=2 if rule in ("meta", "softmax") else 1, exit_rank=seed % 3)
    chosen = RULES[rule](model)
    ids, mask = ragged(LENGTHS, seed)
    given = {"max_new_tokens": 7, "eos_token_id": list(range(2, 8)), "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=mask, criterion=chosen, **given)
    layers = set()
    for row, length in enumerate(LENGTHS):
        tokens, exits = reference.generate(model, ids[row, :length].tolist(), chosen, 7, range(2, 8))
        count = len(tokens)
        assert out.sequences[row, 9 : 9 + count].tolist() == tokens
        assert out.exit_layers[row].tolist() == [*exits, *[0] * (out.exit_layers.shape[1] - count)]
        layers |= set(exits)
    assert len(layers) >= 2, "tokens must leave at different layers for this to tell anything"


@pytest.mark.parametrize(("seed", "padded"), [*((seed, False) for seed in range(9)), (1, True), (3, True), (5, True)])
def test_random_patterns_of_exits_are_those_of_the_reference(seed, padded, monkeypatch):
    """Batches, depths and patterns at random; on both forms of attention."""
    if padded:
        monkeypatch.setattr(engine_module, "_row_by_row", engine_module._padded)
    generator = torch.Generator().manual_seed(seed)
    name = list(CONFIGS)[seed % len(CONFIGS)]
    model = early_exit(name, seed, exit_every=1 + seed % 2)
    lengths = torch.randint(1, 8, (1 + seed % 5,), generator=generator).tolist()
    ids, mask = ragged(lengths, seed)
    plan = torch.randint(1, model.num_exits + 1, (6, len(lengths)), generator=generator)
    given = {"max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True}
    model.generation_config.eos_token_id = None
    out = model.generate(ids, attention_mask=mask, criterion=Planned(plan), **given)
    for row, length in enumerate(lengths):
        tokens, exits = reference.generate(model, ids[row, :length].tolist(), Planned(plan[:, row : row + 1]), 6)
        assert out.sequences[row, max(lengths) :].tolist() == tokens
        assert out.exit_layers[row].tolist() == exits
        assert exits[1:] == [model.exit_layers[number - 1] for number in plan[1:, row].tolist()]


@pytest.mark.parametrize("name", CONFIGS)
def test_states_in_generation_are_those_of_training(name):
    """The engine's states against the teacher-forced pass over the same text, to 1e-5."""
    model = early_exit(name)
    ids, mask = ragged(LENGTHS)
    prompts = [row[: int(one.sum())].tolist() for row, one in zip(ids, mask, strict=True)]
    generator = torch.Generator().manual_seed(0)
    plan = torch.randint(1, model.num_exits + 1, (12, 4), generator=generator)
    with torch.inference_mode():
        engine = Engine(model, 4, 9 + 12)
        tokens = engine.full(range(4), prompts).argmax(-1).tolist()
        texts, layers, states = prompts, [[model.num_layers] * len(one) for one in prompts], []
        for step in range(12):
            texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
            out = engine.step(range(4), tokens, Planned(plan), torch.full((4,), step / 12))
            assert out.exits == plan[step].tolist()
            layers = [[*one, model.exit_layers[n - 1]] for one, n in zip(layers, out.exits, strict=True)]
            states.append(out.states)
            tokens = out.logits.argmax(-1).tolist()
    size = max(map(len, texts))
    whole, seen = torch.zeros((2, 4, size), dtype=torch.int64)
    exits = torch.full((4, size), model.num_layers)
    for row, (text, one) in enumerate(zip(texts, layers, strict=True)):
        whole[row, : len(text)], seen[row, : len(text)] = torch.tensor(text), 1
        exits[row, : len(one)] = torch.tensor(one)
    with torch.no_grad():
        trained = model.copied_states(whole, seen, exits)
        uncopied = model.all_exits(whole, seen)
    apart = 0.0
    for row, prompt in enumerate(prompts):
        found = torch.stack([one[row] for one in states])
        expected = trained[row, len(prompt) : len(prompt) + 12]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        number = plan[:, row] - 1
        without = uncopied[row, number, torch.arange(len(prompt), len(prompt) + 12)]
        apart = max(apart, float((found - without).abs().max()))
    assert apart > 1e-2, "states of a pass without copying are others"


def test_layers_above_the_last_exit_are_not_run():
    model = early_exit("llama")
    calls = []
    hooks = [
        layer.mlp.register_forward_hook(lambda module, given, out, index=index: calls.append((index, len(given[0]))))
        for index, layer in enumerate(model.backbone.model.layers, 1)
    ]
    with torch.inference_mode():
        engine = Engine(model, 5, 20)
        engine.full(range(5), [[5, 6, 7], [8], [9, 10], [11], [12, 13, 14]])
        calls.clear()
        plan = torch.tensor([[2, 3, 2, 1, 2]])
        engine.step(range(5), [5, 6, 7, 8, 9], Planned(plan), torch.zeros(5))
    for hook in hooks:
        hook.remove()
    assert calls == [(1, 5), (2, 4), (3, 1)]


def test_what_tokens_owe_is_computed_in_one_product_when_a_later_token_comes():
    """Nothing is paid for a skipped layer until it is reached; then its keys take one product for all of them."""
    model = early_exit("llama")
    layer = model.backbone.model.layers[3]
    sizes: list[int] = []
    hook = layer.self_attn.k_proj.register_forward_hook(lambda module, given, out: sizes.append(len(given[0])))
    plan = torch.tensor([[1], [2], [1], [3], [4], [4]])
    with torch.inference_mode():
        engine = Engine(model, 1, 20)
        engine.full([0], [[5, 6, 7, 8, 9]])
        for step in range(6):
            engine.step([0], [5 + step], Planned(plan), torch.tensor([step / 6]))
    hook.remove()
    assert sizes == [5, 5, 1], "the prompt, four tokens that left below with the one that came, and one"


def test_the_cache_is_allocated_once():
    model = early_exit("qwen3")
    with torch.inference_mode():
        engine = Engine(model, 2, 16)
        places = [tensor.data_ptr() for tensor in (*engine.cache.keys, *engine.cache.values, engine.cache.shown)]
        tokens = engine.full([0, 1], [[5, 6], [7]]).argmax(-1).tolist()
        for _ in range(12):
            tokens = engine.step([0, 1], tokens, ConsistentEE(0.5)).logits.argmax(-1).tolist()
        after = [tensor.data_ptr() for tensor in (*engine.cache.keys, *engine.cache.values, engine.cache.shown)]
    assert places == after and engine.lengths == [14, 13]


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="evaluation mode"):
        early_exit("llama").train().generate(torch.tensor([[5, 6]]))


def test_criteria_that_read_no_logits_ask_the_head_once_a_step(monkeypatch):
    model = early_exit("gpt2")
    sizes = []
    original = model.head
    monkeypatch.setattr(model, "head", lambda states: sizes.append(len(states)) or original(states))
    ids, mask = ragged(LENGTHS)
    model.generation_config.eos_token_id = None
    model.generate(ids, attention_mask=mask, max_new_tokens=4, criterion=ConsistentEE(0.5))
    assert sizes == [4, 4, 4, 4]
