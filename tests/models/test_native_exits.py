"""Decisions in compiled code agree with the modules' own methods; without a compiler nothing is missing."""

from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from rl_exit import EarlyExitModel, native
from rl_exit.criteria import ConsistentEE
from rl_exit.inference import run_batch
from rl_exit.models import native_exits
from rl_exit.models.answers import answer_figures
from rl_exit.models.quick_policy import KEY

LENGTHS = (9, 4, 1, 12, 12, 7, 3, 10, 5, 2, 11)  # more than a block of rows

compiled = pytest.mark.skipif(native.library(native_exits.SOURCE) is None, reason="no C compiler here")


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> str:
    return str(tiny_backbone)


def model_of(backbone: str, pooling: str = "mean", own: bool = True, classes: int = 3, shared: bool = True):
    made = EarlyExitModel.from_backbone(
        backbone,
        [f"c{number}" for number in range(classes)],
        pooling=pooling,
        policy_inputs="answers",
        policy_shared=shared,
        policy_answer="own" if own else "exit",
    )
    torch.manual_seed(1)
    for name, weight in [*made.policy.named_parameters(), *made.exits.named_parameters()]:
        torch.nn.init.normal_(weight, std=1.0 if "policy" in name or weight.dim() < 3 else 0.7)
    if made.answer_heads is not None:
        for weight in made.answer_heads.buffers():
            torch.nn.init.normal_(weight, std=0.3)
    return made.eval()


def batch_of(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(4, 20, mask.shape, generator=torch.Generator().manual_seed(len(lengths)))
    return {"input_ids": ids * mask, "attention_mask": mask}


def both(model: EarlyExitModel, batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Answers and log-odds of every layer below L: compiled, and by the modules."""
    found, carry, memory = [], {}, {}
    parts = model.exits, model.answer_heads, model.policy
    quick = native_exits.NativeExits.of(*parts, model.config.pooling, torch.float32)
    assert quick is not None
    with torch.inference_mode():
        state = model.backbone.begin(**batch)
        for layer in range(1, model.num_layers):
            state = model.backbone.step(layer, state)
            view = model.view(layer, state)
            fast = quick.decide(layer, model.backbone.hidden(layer, state), state, carry, 0.0)
            figures = answer_figures(layer, model.num_layers, view.answer, memory)
            odds = model.policy.at(layer, figures)
            found += [(fast.answers, view.answer), (fast.odds, odds)]
            above = fast.odds > 0.0
            if above.any():
                assert fast.apart.leaving.tolist() == above.nonzero()[:, 0].tolist()
                assert fast.apart.staying.tolist() == (~above).nonzero()[:, 0].tolist()
            else:
                assert fast.apart is None
    return found


@compiled
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize(("own", "classes", "shared"), [(True, 3, True), (False, 2, False), (True, 20, False)])
@pytest.mark.parametrize("lengths", [(5,), (6, 6), LENGTHS])
def test_it_agrees_with_the_modules(backbone, pooling, own, classes, shared, lengths):
    model = model_of(backbone, pooling, own, classes, shared)
    batch = batch_of(lengths)
    for fast, slow in both(model, batch):
        torch.testing.assert_close(fast, slow, atol=3e-5, rtol=1e-4)
    before = both(model, batch)[1][0].clone()
    with torch.no_grad():
        model.policy.bias_in += 1e-2
    assert (both(model, batch)[1][0] - before).abs().max() > 1e-4, "weights that change in place are followed"


@compiled
def test_ties_and_extremes_are_answered_alike(backbone):
    for scale in (0.0, 3e3):
        model = model_of(backbone, own=False)
        with torch.no_grad():
            model.exits.weight.mul_(scale)
            model.exits.bias.mul_(scale)
        for fast, slow in both(model, batch_of(LENGTHS)):
            assert bool(fast.isfinite().all())
            torch.testing.assert_close(fast, slow, atol=3e-5, rtol=1e-4)


@compiled
def test_the_engine_answers_the_same_without_it(backbone, monkeypatch):
    """Rows leave everywhere, memory goes with its row, and a copy of the model decides for itself."""
    model = model_of(backbone, classes=5)
    batch, rule = batch_of(LENGTHS), ConsistentEE(0.5)
    fast = run_batch(model, batch, rule)
    assert model._native is not None
    again = copy.deepcopy(model)
    assert again._native is None
    with torch.no_grad():
        model.policy.bias_out += 100.0
    assert run_batch(model, batch, rule).exit_layer.eq(1).all()
    assert run_batch(again, batch, rule).exit_layer.equal(fast.exit_layer)
    monkeypatch.setattr(native_exits, "_function", lambda: None)
    again._native = None
    slow = run_batch(again, batch, rule)
    assert again._native is None and slow.exit_layer.equal(fast.exit_layer) and len(slow.exit_layer.unique()) > 1
    torch.testing.assert_close(fast.logits, slow.logits, atol=1e-5, rtol=1e-5)


@compiled
@pytest.mark.parametrize("lengths", [(5,), LENGTHS])
def test_a_text_begun_without_compiled_code_goes_on_in_it_and_back(backbone, lengths, monkeypatch):
    """Both keep the same of a row, whoever was asked at the layer below."""
    model, batch = model_of(backbone, classes=5), batch_of(lengths)
    with torch.inference_mode():
        odds = {}
        for first, later in itertools.product((True, False), repeat=2):
            state, carry, odds[first, later] = model.backbone.begin(**batch), {}, []
            model._compiled_exits(state.hidden)
            native = model._native
            assert native is not None
            for layer in range(1, model.num_layers):
                state = model.backbone.step(layer, state)
                with monkeypatch.context() as here:
                    here.setattr(model, "_compiled_exits", lambda hidden, found=native: found)
                    if not (first if layer == 1 else later):
                        here.setattr(model, "_decide", lambda *given: None)
                    odds[first, later].append(model.view(layer, state).exit_logit(carry).clone())
                    assert carry[KEY].shape[1] == (24 if (first if layer == 1 else later) else 18)
    for found in odds.values():
        torch.testing.assert_close(found, odds[False, False], atol=3e-5, rtol=1e-4)


@compiled
def test_heads_that_have_moved_are_read_where_they_are(backbone):
    model = model_of(backbone)
    batch, rule = batch_of((4, 5)), ConsistentEE(0.5)
    run_batch(model, batch, rule)
    first = model._native
    model.policy.bias_out = torch.nn.Parameter(torch.full_like(model.policy.bias_out, 100.0))
    assert run_batch(model, batch, rule).exit_layer.tolist() == [1, 1]
    assert model._native is not first


@compiled
def test_other_heads_and_parametrised_ones(backbone):
    """A module put in place of another is read; one whose weights are computed is left to torch."""
    model = model_of(backbone)
    batch, rule = batch_of((4, 5)), ConsistentEE(0.5)
    run_batch(model, batch, rule)
    first, other = model._native, copy.deepcopy(model.policy)
    with torch.no_grad():
        other.bias_out += 100.0
    model.policy = other
    assert run_batch(model, batch, rule).exit_layer.tolist() == [1, 1]
    assert model._native is not first

    class Lower(torch.nn.Module):
        def forward(self, weight):
            return weight - 1000.0

    torch.nn.utils.parametrize.register_parametrization(model.policy, "bias_out", Lower())
    assert run_batch(model, batch, rule).exit_layer.tolist() == [model.num_layers] * 2
    assert model._native is None


def test_nobody_needs_a_compiler(tmp_path, monkeypatch):
    """None, and nothing written, without a compiler, on a folder that others may write to, or when told so."""
    source = tmp_path / "two.c"
    source.write_text("int two(void) { return 2; }\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fresh = native.library.__wrapped__
    monkeypatch.setenv("RL_EXIT_NATIVE", "0")
    assert fresh(source) is None and not (tmp_path / "cache").exists()
    monkeypatch.delenv("RL_EXIT_NATIVE")
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    assert fresh(source) is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "rl-exit"
    folder.chmod(0o777)
    assert fresh(source) is None and not list(folder.iterdir())
    folder.chmod(0o700)
    source.write_text("this is no C\n")
    assert fresh(source) is None and not list(folder.iterdir())


@compiled
def test_what_was_compiled_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "two.c"
    source.write_text("int two(void) { return 2; }\n")
    first = native.library.__wrapped__(source)
    assert first is not None and first.two() == 2
    (kept,) = (tmp_path / "rl-exit").iterdir()
    written = kept.stat().st_mtime_ns
    assert native.library.__wrapped__(source) is not None and kept.stat().st_mtime_ns == written
    source.write_text("int two(void) { return 3; }\n")
    again = native.library.__wrapped__(source)
    assert again is not None and again.two() == 3
    assert os.access(kept, os.R_OK) and np.all([path.suffix == ".so" for path in kept.parent.iterdir()])


@compiled
def test_a_lightened_model_is_not_asked_for_weights_at_every_text(backbone, monkeypatch):
    model = model_of(backbone).lighten()
    monkeypatch.setattr(native_exits, "HeadWeights", lambda *parts: pytest.fail("its states are not float32"))
    assert len(run_batch(model, batch_of((4, 5)), ConsistentEE(0.5)).exit_layer) == 2
    assert model._native is None


@compiled
def test_what_forward_gives_is_memory_of_its_own(backbone):
    model = model_of(backbone)
    with torch.no_grad():
        model.policy.bias_out += 100.0
        logits = model(**batch_of((4, 5))).logits
    assert logits.is_contiguous() and logits.untyped_storage().nbytes() == 2 * 3 * 4
