"""Kernels for GPUs agree with their slow twins: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rl_exit import EarlyExitModel, gpu
from rl_exit.criteria import ConsistentEE, Fixed, criterion
from rl_exit.data.instances import Instances
from rl_exit.inference import run_instances
from rl_exit.models.answer_heads import AnswerHeads
from rl_exit.models.answers import answer_figures, confidence_log_odds
from rl_exit.models.backbones import rows
from rl_exit.models.exits import ExitHeads, pool
from rl_exit.models.gpu_exits import GpuExits
from rl_exit.models.head_weights import HeadWeights
from rl_exit.models.policy import PolicyHeads

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU here")


@pytest.fixture
def fresh():
    """Whether kernels can be had is asked anew in a test and after it."""
    gpu.kernels.cache_clear()
    yield
    gpu.kernels.cache_clear()


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton", reason="Triton, which comes with torch for GPUs, is not here")
    from rl_exit import gpu_kernels

    return gpu_kernels


def heads_of(own: bool, shared: bool, learned: bool, size: int, classes: int, layers: int):
    made = ExitHeads(layers, size, classes), AnswerHeads(layers, size, classes, 48), PolicyHeads(layers, 12, 10, shared)
    torch.manual_seed(classes)
    for module in made:
        for weight in [*module.parameters(), *module.buffers()]:
            torch.nn.init.normal_(weight, std=0.5)
        module.eval().to(DEVICE)
    return made[0], made[1] if own else None, made[2] if learned else None


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [(5,), (6, 6), (9, 40, 1, 12, 17, 0)])
@pytest.mark.parametrize(
    ("pooling", "own", "shared", "learned", "size", "classes"),
    [
        ("mean", True, True, True, 24, 3),
        ("cls", False, False, True, 100, 2),
        ("last", True, False, True, 40, 20),
        ("mean", True, True, False, 24, 5),
    ],
)
def test_a_decision_agrees_with_the_modules(kernels, pooling, own, shared, learned, size, classes, lengths):
    layers = 4
    exits, heads, policy = heads_of(own, shared, learned, size, classes, layers)
    weights = HeadWeights(exits, heads, policy)
    assert weights.readable(DEVICE.type)
    fast, carry, memory = GpuExits(weights, pooling, kernels.decide), {}, {}
    real = torch.tensor(lengths, device=DEVICE)
    mask = (torch.arange(max(lengths), device=DEVICE) < real[:, None]).long()
    for layer in range(1, layers):
        hidden = torch.randn(len(lengths), max(lengths), size, device=DEVICE)
        state = SimpleNamespace(padded=len(set(lengths)) > 1, device_lengths=real)
        found = fast.decide(layer, hidden, state, carry, 0.0)
        pooled = pool(hidden, mask, pooling)
        said = exits.at(layer, pooled)
        said = said if heads is None else heads.at(layer, pooled, said)
        odds = answer_figures(layer, layers, said, memory)
        odds = confidence_log_odds(said) if policy is None else policy.at(layer, odds)
        torch.testing.assert_close(found.answers, said, atol=3e-5, rtol=1e-4)
        torch.testing.assert_close(found.odds, odds, atol=3e-5, rtol=1e-4)
        leaving = (found.odds > 0.0).nonzero()[:, 0].tolist()
        assert (found.apart.leaving.tolist() if found.apart else []) == leaving
        assert fast.decide(layer, hidden, state, dict(carry), float("inf")).apart is None
    assert fast.serves(exits, heads, policy)
    exits.bias.data = exits.bias.data.clone()
    assert not fast.serves(exits, heads, policy), "weights that lie elsewhere are read there"


@torch.inference_mode()
@pytest.mark.parametrize("scale", [0.0, 3e3])
def test_ties_and_extremes_are_answered_alike(kernels, scale):
    exits, _, policy = heads_of(False, True, True, 24, 3, 3)
    exits.weight.mul_(scale)
    exits.bias.mul_(scale)
    fast, carry, memory = GpuExits(HeadWeights(exits, None, policy), "cls", kernels.decide), {}, {}
    # Of a tie the kernel takes the first class, as torch does on a CPU; on a GPU torch takes any.
    exits_there, policy_there = copy.deepcopy(exits).cpu(), copy.deepcopy(policy).cpu()
    for layer in (1, 2):
        hidden = torch.randn(4, 2, 24)
        found = fast.decide(layer, hidden.to(DEVICE), SimpleNamespace(padded=False), carry, 0.0)
        said = exits_there.at(layer, hidden[:, 0])
        assert scale == 0.0 or said.abs().max() > 1e3
        odds = policy_there.at(layer, answer_figures(layer, 3, said, memory))
        torch.testing.assert_close(found.answers.cpu(), said, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.odds.cpu(), odds, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(("size", "tokens"), [(6, 4), (384, 4), (384, 21)])
def test_rows_are_put_together_as_torch_does(kernels, size, tokens):
    """More tokens than a block has, rows of every source and an empty one, whose first position stays."""
    longer = tokens + 1
    sources = [torch.randn(3, longer, size, device=DEVICE), torch.randn(2, tokens, size, device=DEVICE)]
    lengths, chosen = [torch.tensor([longer, 2, 3]), torch.tensor([tokens, 0])], [np.array([2, 1]), None]
    fast = rows._padded_on_gpu(kernels.gather, sources, lengths, chosen, tokens)
    slow = rows._padded_by_torch(sources, lengths, chosen, tokens)
    assert fast.lengths.tolist() == slow.lengths.tolist() == fast.device_lengths.tolist() == [3, 2, tokens, 0]
    assert fast.padded and slow.padded
    for row, length in enumerate(max(length, 1) for length in fast.lengths.tolist()):
        assert torch.equal(fast.hidden[row, :length], slow.hidden[row, :length])
        assert not fast.hidden[row, length:].any()
        assert fast.seen[row, 0, 0].tolist() == [place < length for place in range(tokens)]
    nothing = torch.zeros(1, 0, size, device=DEVICE)
    without = rows._padded_on_gpu(
        kernels.gather, [nothing, sources[1]], [torch.tensor([0]), lengths[1]], [None] * 2, tokens
    )
    assert not without.hidden[0].any() and torch.equal(without.hidden[1], sources[1][0])
    for bad in (np.array([3]), np.array([-1])):
        with pytest.raises(IndexError):
            rows._padded_on_gpu(kernels.gather, sources[:1], lengths[:1], [bad], longer)
    with pytest.raises(ValueError, match=f"more than {tokens} tokens"):
        rows._padded_on_gpu(kernels.gather, sources[:1], lengths[:1], [None], tokens)


COMPILED = """
import itertools
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rl_exit import gpu_kernels

def check(kernel, types, constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    for capability in (80, 90):
        assert compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", capability, 32)).asm["cubin"]

numbers = {"lengths": "*i64", "rows": "*i64", "seen": "*i1", "leaving": "*i1", "cut": "fp32", "log_classes": "fp32"}
numbers |= dict.fromkeys(("tokens", "layer", "start", "old_tokens"), "i32")
sizes = dict(LAYERS=6, SIZE=384, CHUNK=64, BLOCK=16, SHARED=True, W2=64)
for padded, first in itertools.product((True, False), repeat=2):
    here = {"PADDED": padded, "FIRST": first}
    own = dict(CLASSES=20, C2=32, WIDE=128, A2=128, WIDTH=64, POOLING=1)
    check(gpu_kernels.decide, numbers, sizes | here | own)
    check(gpu_kernels.decide, numbers, sizes | here | dict(CLASSES=2, C2=2, WIDE=0, A2=1, WIDTH=0, POOLING=2))
check(gpu_kernels.decide, numbers | {"hidden": "*bf16"}, sizes | here | own)
for chosen in (True, False):
    check(gpu_kernels.gather, numbers, dict(SIZE=384, CHOSEN=chosen, BLOCK=8, H2=512))
print("compiled")
"""


def test_they_compile_for_gpus_that_are_not_here(kernels):
    """Triton's interpreter takes what its compiler does not, and the compiler needs no GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.stdout == "compiled\n", done.stderr


def test_there_are_none_without_a_gpu_or_where_they_are_refused(monkeypatch, fresh):
    asked, there = (None, "1", "0"), (True, False)
    monkeypatch.setattr(gpu, "import_module", lambda name: name)
    monkeypatch.setattr(gpu, "_try", lambda found: None)
    for word, has_gpu in itertools.product(asked, there):
        gpu.kernels.cache_clear()
        monkeypatch.delenv(gpu.SWITCH, raising=False) if word is None else monkeypatch.setenv(gpu.SWITCH, word)
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=has_gpu: answer)
        assert gpu.kernels() == ("rl_exit.gpu_kernels" if word != "0" and has_gpu else None)

    def refuse(found):
        raise RuntimeError("another compiler")

    monkeypatch.delenv(gpu.SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "_try", refuse)
    gpu.kernels.cache_clear()
    assert gpu.kernels() is None, "torch computes the same"


def test_a_kernel_that_cannot_be_had_is_tried_once(kernels, monkeypatch):
    """Whatever a compiler says of a decision, the model goes on by torch."""
    tried = []

    class Refuses:
        def __getitem__(self, grid):
            tried.append(grid)
            raise RuntimeError("out of resources")

    monkeypatch.setattr("rl_exit.models.gpu_exits._failed", set())
    monkeypatch.setattr("rl_exit.models.gpu_exits.kernels", lambda: SimpleNamespace(decide=Refuses()))
    monkeypatch.setattr(HeadWeights, "readable", lambda self, kind: True)
    exits, heads, policy = heads_of(True, True, True, 24, 3, 3)
    assert GpuExits.of(exits, heads, policy, "mean", torch.float32) is None
    assert GpuExits.of(exits, heads, policy, "mean", torch.float32) is None and len(tried) == 1
    assert GpuExits.of(exits, heads, policy, "cls", torch.float32) is None and len(tried) == 2
    monkeypatch.setattr("rl_exit.models.gpu_exits.kernels", lambda: kernels)
    assert GpuExits.of(exits, heads, policy, "last", torch.float32) is not None


@torch.inference_mode()
def test_rows_that_no_kernel_copies_are_copied_by_torch(monkeypatch):
    """Tried once for each kind of rows; what is wrong with the rows themselves is told all the same."""
    tried = []

    class Refuses:
        def __getitem__(self, grid):
            tried.append(grid)
            raise RuntimeError("out of resources")

    monkeypatch.setattr(rows, "_failed", set())
    given = [torch.randn(2, 3, 4)], [torch.tensor([3, 1])], [np.array([1])]
    assert rows._tried_on_gpu(Refuses(), *given, 3) is None
    assert rows._tried_on_gpu(Refuses(), *given, 3) is None and len(tried) == 1
    with pytest.raises(IndexError):
        rows._tried_on_gpu(Refuses(), [torch.randn(2, 3, 5)], given[1], [np.array([-1])], 3)
    assert rows._tried_on_gpu(Refuses(), [given[0][0].double()], *given[1:], 3) is None and len(tried) == 2


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_on_a_gpu_answers_as_on_the_cpu(tiny_backbone: Path, dtype, monkeypatch, fresh):
    monkeypatch.delenv(gpu.SWITCH, raising=False)
    model = EarlyExitModel.from_backbone(
        str(tiny_backbone), ["a", "b", "c"], pooling="mean", policy_inputs="answers", policy_answer="own"
    )
    torch.manual_seed(1)
    for weight in [*model.policy.parameters(), *model.exits.parameters(), *model.answer_heads.buffers()]:
        torch.nn.init.normal_(weight, std=0.7)
    lengths = np.random.default_rng(0).integers(1, 30, 40)
    tokens = np.random.default_rng(1).integers(4, 20, int(lengths.sum())).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.zeros(40, dtype=np.int64)
    instances = Instances(np.arange(40), labels, tokens, offsets, None, 0)
    there = copy.deepcopy(model).to("cuda")
    if dtype is torch.bfloat16:
        there.lighten()
    assert gpu.kernels() is not None, "a GPU machine of this project has Triton"
    rules = [ConsistentEE(0.5), Fixed(2), criterion("entropy", threshold=0.4), criterion("pabee", patience=1)]
    for rule in rules:
        slow = run_instances(model, instances, rule, 8)
        for size in (1, 7, 40):
            for pooled in (True, False):
                fast = run_instances(there, instances, rule, size, pooled=pooled)
                if dtype is torch.bfloat16:
                    same = fast.exit_layer == slow.exit_layer
                    assert same.double().mean() > 0.8
                    torch.testing.assert_close(fast.logits[same], slow.logits[same], atol=0.3, rtol=0.1)
                    continue
                assert torch.equal(fast.exit_layer, slow.exit_layer)
                torch.testing.assert_close(fast.logits, slow.logits, atol=1e-4, rtol=1e-4)
    assert isinstance(there._native, GpuExits) and len(slow.exit_layer.unique()) > 1
    if dtype is torch.float32:
        monkeypatch.setattr("rl_exit.models.gpu_exits.kernels", lambda: None)
        monkeypatch.setattr(rows, "kernels", lambda: None)
        there._native = None
        again = run_instances(there, instances, rules[0], 7)
        assert there._native is None
        torch.testing.assert_close(
            again.logits, run_instances(model, instances, rules[0], 8).logits, atol=1e-4, rtol=1e-4
        )
