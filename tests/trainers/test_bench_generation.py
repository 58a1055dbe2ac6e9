"""The benchmark of generation: what its figures are made of."""

from __future__ import annotations

import itertools

import pytest
import torch

from rl_exit.listings import generation_rows, generation_table
from rl_exit.progress import Silent
from rl_exit.trainers.bench import generation


def test_exits_are_drawn_from_the_distribution():
    assert sum(generation.EXITS) == pytest.approx(1.0) and len(generation.EXITS) == generation.LAYERS == 12
    rule = generation.Drawn(torch.tensor(generation.EXITS), torch.Generator().manual_seed(0), [])
    for _ in range(500):
        rule.start(8, torch.device("cpu"))
    found = torch.bincount(torch.tensor(rule.seen), minlength=13)[1:] / len(rule.seen)
    assert (found - torch.tensor(generation.EXITS)).abs().max() < 0.03


def test_the_deepest_of_a_batch_by_enumeration(monkeypatch):
    monkeypatch.setattr(generation, "EXITS", (0.5, 0.2, 0.3))
    weights = {1: 0.5, 2: 0.2, 3: 0.3}
    expected = sum(
        max(draw) * torch.tensor([weights[x] for x in draw]).prod().item()
        for draw in itertools.product(weights, repeat=3)
    )
    assert generation.deepest(3) == pytest.approx(expected)
    assert generation.deepest(1) == pytest.approx(1.8)


def test_a_small_run_gives_all_figures(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 61}
    monkeypatch.setattr(generation, "SIZES", sizes)
    monkeypatch.setattr(generation, "CASES", ((1, 8), (3, 8), (1, 1024)))
    results = generation.run(True, Silent())
    assert [(case["batch"], case["context"]) for case in results["cases"]] == [(1, 8), (3, 8)], "quick: short contexts"
    for case in results["cases"]:
        rates = case["tokens_per_second"]
        assert case["speedup"] == pytest.approx(rates["exits"] / rates["full_depth"], abs=2e-3)
        assert case["layer_speedup"] == pytest.approx(12 / case["mean_exit_layer"], abs=2e-3)
        assert case["share"] == pytest.approx(case["speedup"] / case["layer_speedup"], abs=2e-3)
        assert 1 <= case["mean_exit_layer"] <= case["deepest_of_batch"] + 1
    rows = generation_rows(results)
    assert [met for _, met in rows] == [case["share"] >= 0.85 for case in results["cases"]]
    assert generation_table(results).row_count == 2


@torch.inference_mode()
def test_the_library_decodes_the_same_from_the_same_cache():
    """The baseline does the work that the engine does: the same logits from the same random context."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from rl_exit.models.causal import EarlyExitCausalModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=61, num_hidden_layers=12
    )
    library = LlamaForCausalLM(config).eval()
    engine = generation.filled(EarlyExitCausalModel.from_model(library, None), 2, 9)
    cache = DynamicCache()
    for index in range(12):
        keys, values = engine.cache.keys[index][:, :, :9], engine.cache.values[index][:, :, :9]
        cache.update(keys.contiguous(), values.contiguous(), index)
    expected = library(torch.ones((2, 1), dtype=torch.int64), past_key_values=cache).logits[:, -1]
    for row in range(2):
        engine.cut(row, 9)
    torch.testing.assert_close(engine.step([0, 1], [1, 1], None).logits, expected, atol=1e-5, rtol=1e-5)
