"""Stepping through a backbone gives the library's own hidden states, for every family on tiny random weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    CamembertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
)

from rl_exit.errors import ModelError
from rl_exit.models import backbones
from rl_exit.models.backbones import (
    SUPPORTED,
    SteppedBackbone,
    StepState,
    deviation,
    join_states,
    register_family,
    step_backbone,
)
from rl_exit.models.backbones.masks import attention_mask_for

TOLERANCE = 1e-5
VOCABULARY = 60
PAD = 1
LENGTHS = (12, 3, 9, 1, 7)
ATTENTIONS = ("sdpa", "eager")

_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": PAD}
_BERT: dict[str, Any] = {**_SMALL, "num_hidden_layers": 3, "intermediate_size": 48, "max_position_embeddings": 64}
_DEBERTA: dict[str, Any] = {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2}
_ROTARY: dict[str, Any] = {**_BERT, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}

CONFIGS: dict[str, PretrainedConfig] = {
    "bert": BertConfig(**_BERT),
    "roberta": RobertaConfig(**_BERT),
    "xlm-roberta": XLMRobertaConfig(**_BERT),
    "camembert": CamembertConfig(**_BERT),
    "distilbert": DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_heads=4,
        n_layers=3,
        hidden_dim=48,
        max_position_embeddings=64,
        pad_token_id=PAD,
    ),
    "albert": AlbertConfig(**_BERT | {"num_hidden_layers": 4, "num_hidden_groups": 2, "embedding_size": 16}),
    "albert-shared": AlbertConfig(**_BERT, num_hidden_groups=1, embedding_size=16),
    "electra": ElectraConfig(**_BERT, embedding_size=32),
    "electra-narrow": ElectraConfig(**_BERT, embedding_size=16),
    "deberta": DebertaConfig(**_DEBERTA, position_biased_input=False),
    "deberta-plain": DebertaConfig(**_BERT),
    "deberta-v2": DebertaV2Config(**_DEBERTA, conv_kernel_size=3, position_biased_input=True),
    "deberta-v3": DebertaV2Config(
        **_DEBERTA, position_buckets=4, share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False
    ),
    "mpnet": MPNetConfig(**_BERT),
    "modernbert": ModernBertConfig(
        **_BERT | {"num_hidden_layers": 4},
        local_attention=6,
        global_attn_every_n_layers=2,
        bos_token_id=0,
        eos_token_id=0,
        cls_token_id=0,
        sep_token_id=0,
    ),
    "llama": LlamaConfig(**_ROTARY),
    "qwen2": Qwen2Config(**_ROTARY),
    "qwen2-sliding": Qwen2Config(**_ROTARY, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**_ROTARY, head_dim=8),
    "qwen3-sliding": Qwen3Config(**_ROTARY, head_dim=8, use_sliding_window=True, sliding_window=3, max_window_layers=2),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_head=4, n_layer=3, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "gpt_neox": GPTNeoXConfig(**_BERT, bos_token_id=0, eos_token_id=0),
    "gpt_neox-serial": GPTNeoXConfig(**_BERT, use_parallel_residual=False, bos_token_id=0, eos_token_id=0),
}
SEGMENTS = {"bert", "electra", "albert", "deberta", "deberta-v2", "gpt2"}
PRE_NORM = {
    "modernbert",
    "llama",
    "qwen2",
    "qwen2-sliding",
    "qwen3",
    "qwen3-sliding",
    "gpt2",
    "gpt_neox",
    "gpt_neox-serial",
}
OWN_ATTENTION = {name for name in CONFIGS if name.startswith(("deberta", "mpnet"))}
VARIANTS = [(name, how) for name in CONFIGS for how in (("eager",) if name in OWN_ATTENTION else ATTENTIONS)]

every_family = pytest.mark.parametrize("name", CONFIGS)
every_variant = pytest.mark.parametrize(("name", "attention"), VARIANTS, ids=[f"{n}-{a}" for n, a in VARIANTS])


def build(name: str, attention: str | None = None) -> SteppedBackbone:
    """A tiny model whose layers matter: weights far larger than at initialisation, and nothing left at 0 or 1."""
    torch.manual_seed(0)
    attention = attention or ("eager" if name in OWN_ATTENTION else "sdpa")
    model = AutoModel.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.1))
    return step_backbone(model.eval())


def make_batch(lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0, segments: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(2, VOCABULARY, attention_mask.shape, generator=generator)
    batch = {"input_ids": torch.where(attention_mask.bool(), input_ids, PAD), "attention_mask": attention_mask}
    if segments:
        batch["token_type_ids"] = torch.randint(0, 2, attention_mask.shape, generator=generator) * attention_mask
    return batch


def run_to(backbone: SteppedBackbone, layer: int, state: StepState, first: int = 1) -> StepState:
    for index in range(first, layer + 1):
        state = backbone.step(index, state)
    return state


def difference(left: Tensor, right: Tensor, attention_mask: Tensor) -> float:
    real = attention_mask.bool()
    return float((left[real] - right[real]).abs().max().detach())


def test_every_supported_type_is_tested() -> None:
    assert {kind for kinds in SUPPORTED.values() for kind in kinds} == {c.model_type for c in CONFIGS.values()}


@every_variant
@pytest.mark.parametrize("lengths", [LENGTHS, (8, 8), (1, 1)], ids=["ragged", "full", "single"])
def test_stepping_equals_the_library(name: str, attention: str, lengths: tuple[int, ...]) -> None:
    assert deviation(build(name, attention), **make_batch(lengths)) < TOLERANCE


@pytest.mark.parametrize("name", sorted(SEGMENTS))
def test_segments_are_used(name: str) -> None:
    backbone, batch = build(name), make_batch(segments=True)
    assert deviation(backbone, **batch) < TOLERANCE
    without = backbone.hidden_states(batch["input_ids"], batch["attention_mask"])
    assert difference(without[-1], backbone.hidden_states(**batch)[-1], batch["attention_mask"]) > 1e-3


@every_family
def test_hidden_states_are_the_whole_tuple(name: str) -> None:
    backbone, batch = build(name), make_batch()
    expected = backbone.model(**batch, output_hidden_states=True).hidden_states
    stepped = backbone.hidden_states(**batch)
    assert len(stepped) == len(expected) == backbone.num_layers + 1
    for layer, (ours, theirs) in enumerate(zip(stepped, expected, strict=True)):
        assert difference(ours, theirs, batch["attention_mask"]) < TOLERANCE, layer


@every_family
def test_a_changed_layer_is_noticed(name: str) -> None:
    backbone, batch = build(name), make_batch()
    expected = [state.detach() for state in backbone.model(**batch, output_hidden_states=True).hidden_states]
    where = re.compile(r"groups\.0\." if name == "albert-shared" else r"(layers?|h|groups)\.1\.")
    weight = next(p for n, p in backbone.model.named_parameters() if p.ndim > 1 and where.search(n))
    with torch.no_grad():
        weight.add_(0.02 * torch.randn_like(weight))
    differences = [
        difference(a, b, batch["attention_mask"])
        for a, b in zip(backbone.hidden_states(**batch), expected, strict=True)
    ]
    assert differences[0] < TOLERANCE
    assert max(differences) > 10 * TOLERANCE


@every_family
def test_what_exits_read(name: str) -> None:
    backbone, batch = build(name), make_batch()
    library = backbone.model(**batch, output_hidden_states=True)
    middle = run_to(backbone, 1, backbone.begin(**batch))
    last = run_to(backbone, backbone.num_layers, middle, first=2)
    mask = batch["attention_mask"]
    assert difference(backbone.hidden(backbone.num_layers, last), library.last_hidden_state, mask) < TOLERANCE
    raw = library.hidden_states[1]
    assert difference(middle.hidden, raw, mask) < TOLERANCE
    # Pre-norm families show exits a normalised state, the others the layer's output as it is.
    shown = difference(backbone.hidden(1, middle), raw, mask)
    assert shown > 1e-2 if name in PRE_NORM else shown < TOLERANCE


@every_variant
@pytest.mark.parametrize("after", [0, 1, 2])
def test_survivors_go_on_as_if_alone(name: str, attention: str, after: int) -> None:
    backbone, batch = build(name, attention), make_batch()
    generator = torch.Generator().manual_seed(after)
    rows = torch.randperm(len(LENGTHS), generator=generator)[:3]
    state = run_to(backbone, after, backbone.begin(**batch))
    longest = int(state.lengths[rows].max())
    ours = run_to(backbone, backbone.num_layers, state.select(rows, longest), first=after + 1)
    alone = {key: value[rows, :longest] for key, value in batch.items()}
    expected = run_to(backbone, backbone.num_layers, backbone.begin(**alone))
    assert ours.hidden.shape == (3, longest, 32) == (ours.batch_size, ours.length, backbone.hidden_size)
    assert difference(ours.hidden, expected.hidden, alone["attention_mask"]) < TOLERANCE
    others = run_to(backbone, backbone.num_layers, state.select(rows.flip(0), longest), first=after + 1)
    assert difference(others.hidden, expected.hidden, alone["attention_mask"]) > 1e-2


@every_variant
@torch.no_grad()
def test_rows_that_go_apart_go_on_as_if_alone(name: str, attention: str) -> None:
    backbone, batch = build(name, attention), make_batch()
    together = backbone.begin(**batch)
    last = backbone.num_layers
    for row, (alone, length) in enumerate(zip(together.apart(), LENGTHS, strict=True)):
        assert (alone.batch_size, alone.length, alone.lengths.tolist(), alone.padded) == (1, length, [length], False)
        assert alone.hidden.data_ptr() == together.hidden[row].data_ptr(), "nothing is copied"
        single = backbone.begin(**{key: value[row : row + 1, :length] for key, value in batch.items()})
        mine, theirs = (backbone.hidden(last, run_to(backbone, last, state)) for state in (alone, single))
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@every_family
def test_rows_leave_one_layer_after_another(name: str) -> None:
    backbone, batch = build(name), make_batch()
    full = backbone.hidden_states(**batch)
    state, kept = backbone.begin(**batch), torch.arange(len(LENGTHS))
    for layer in range(1, backbone.num_layers):
        state = backbone.step(layer, state)
        rows = torch.arange(state.batch_size)[state.lengths != state.lengths.max()]  # the longest leaves
        kept, state = kept[rows], state.select(rows, int(state.lengths[rows].max()))
        mask = batch["attention_mask"][kept, : state.length]
        assert difference(state.hidden, full[layer][kept, : state.length], mask) < TOLERANCE


@every_variant
@pytest.mark.parametrize("shorter_first", [True, False])
def test_joined_batches_go_on_as_if_alone(name: str, attention: str, shorter_first: bool) -> None:
    """Two batches of different padding meet after layer 1, one of them without its longest row."""
    backbone, batches = build(name, attention), [make_batch((3, 5, 1), seed=1), make_batch((12, 9, 7), seed=2)]
    states = [run_to(backbone, 1, backbone.begin(**batch)) for batch in batches]
    alone = [run_to(backbone, backbone.num_layers, state, first=2) for state in states]
    parts = [(states[0], batches[0], alone[0], range(3)), (states[1], batches[1], alone[1], (1, 2))]
    if not shorter_first:
        parts.reverse()
    joined = join_states([part[0] for part in parts], [np.asarray(part[3]) for part in parts])
    assert (joined.batch_size, joined.length) == (5, 9)
    found, start = run_to(backbone, backbone.num_layers, joined, first=2), 0
    for _, batch, expected, rows in parts:
        for row in rows:
            real = int(batch["attention_mask"][row].sum())
            apart = (found.hidden[start, :real] - expected.hidden[row, :real]).abs().max()
            assert apart < TOLERANCE
            start += 1


@torch.inference_mode()
def test_row_numbers_that_compiled_code_could_not_trust_are_refused() -> None:
    state = build("bert").begin(**make_batch())
    wrongs = (np.ones(state.batch_size, dtype=bool), np.array([0], dtype=np.int32), np.array([[0]]))
    for wrong in wrongs:
        with pytest.raises(ValueError, match="int64"):
            join_states([state], [wrong])
    for none_such in ([state.batch_size], [0, -1]):
        for longest in (None, 12):
            with pytest.raises(IndexError):
                join_states([state], [np.array(none_such)], longest)
    with pytest.raises(ValueError, match="more than 2 tokens"):
        join_states([state], [np.array([0, 1])], 2)
    with pytest.raises(ValueError, match="at most 12"):
        join_states([state], [np.array([0, 1])], 13)
    every_second = np.arange(state.batch_size)[::2]  # not contiguous
    found = join_states([state], [every_second])
    expected = state.hidden[every_second.tolist(), : found.length]
    assert difference(found.hidden, expected, make_batch()["attention_mask"][every_second.tolist()]) == 0.0


@pytest.mark.parametrize("native", [True, False])
@torch.inference_mode()
def test_an_empty_row_keeps_its_first_position(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from rl_exit.models.backbones import rows as copying

    if not native:
        monkeypatch.setattr(copying, "_function", lambda: None)
    backbone = build("bert")
    batch = make_batch((5, 3))
    batch["attention_mask"][1] = 0
    state = backbone.step(1, backbone.begin(**batch))
    found = join_states([state], [np.array([1])])
    assert torch.equal(found.hidden[0, 0], state.hidden[1, 0]) and found.lengths.tolist() == [0]


@pytest.mark.parametrize("name", ["bert", "distilbert"])
@torch.inference_mode()
def test_attention_may_be_changed_while_rows_wait(name: str) -> None:
    backbone, batch = build(name, "sdpa"), make_batch()
    expected = run_to(backbone, backbone.num_layers, backbone.begin(**batch)).hidden
    waiting = run_to(backbone, 1, backbone.begin(**batch))
    backbone.model.set_attn_implementation("eager")
    found = run_to(backbone, backbone.num_layers, join_states([waiting], [np.arange(len(LENGTHS))]), first=2)
    assert difference(found.hidden, expected[:, : found.length], batch["attention_mask"][:, : found.length]) < TOLERANCE


@every_variant
def test_rows_run_end_to_end_as_they_do_alone(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build(name, attention)
    batch = make_batch()
    runs: list[tuple[int, ...]] = []
    once = SteppedBackbone._packed_step

    def counted(self: SteppedBackbone, layer: int, state: StepState) -> StepState:
        runs.append(tuple(state.hidden.shape))
        return once(self, layer, state)

    monkeypatch.setattr(SteppedBackbone, "_packed_step", counted)
    monkeypatch.setattr(SteppedBackbone, "_packing_pays", lambda self, state: True)
    packed = padded = backbone.begin(**batch)
    for layer in range(1, backbone.num_layers + 1):
        packed, padded = backbone.step(layer, packed, pack=True), backbone.step(layer, padded)
        assert difference(packed.hidden, padded.hidden, batch["attention_mask"]) < 1e-5
        assert packed.hidden.shape == padded.hidden.shape and bool(packed.hidden.isfinite().all())
    assert len(runs) == (backbone.num_layers if backbone.packs else 0)
    rows = torch.tensor([2, 0])
    on, off = (backbone.step(1, backbone.begin(**batch).select(rows), pack=pack).hidden for pack in (True, False))
    assert difference(on, off, batch["attention_mask"][rows]) < 1e-5
    full = make_batch((4, 4))
    before = len(runs)
    backbone.step(1, backbone.begin(**full), pack=True)
    assert len(runs) == before, "without padding there is nothing to gain"


def test_who_drops_padding_itself_says_so() -> None:
    for name, attention, drops in (("bert", "sdpa", True), ("bert", "eager", False), ("distilbert", "sdpa", False)):
        backbone = build(name, attention)
        state = backbone.begin(**make_batch((1, 1, 1, 40)))
        assert backbone.packs and backbone.drops_padding(1, state) == drops
        assert backbone.packs_step(state)
    backbone = build("bert")
    backbone.layer_modules()[1].register_forward_hook(lambda *given: None)
    state = backbone.begin(**make_batch((1, 40)))
    assert [backbone.drops_padding(layer, state) for layer in (1, 2)] == [True, False], "a hook wants its module called"


def test_packing_pays_where_padding_costs_more_than_attention_over_all() -> None:
    backbone = build("bert")
    per_token = 5.0 * backbone.hidden_size
    for lengths in ((1, 1, 1, 40), (40, 39, 40, 40), (3, 2)):
        state = backbone.begin(**make_batch(lengths))
        tokens, whole = sum(lengths), len(lengths) * max(lengths)
        pays = tokens + tokens**2 / per_token < whole + whole * max(lengths) / per_token
        assert backbone._packing_pays(state) == pays
    assert backbone._packing_pays(backbone.begin(**make_batch((1, 1, 1, 40))))
    assert not backbone._packing_pays(backbone.begin(**make_batch((40, 39, 40, 40))))
    assert backbone.packs
    backbone.model.config.chunk_size_feed_forward = 4
    assert not type(backbone)(backbone.model, backbone._family).packs, "chunks of a size refuse other numbers of tokens"


def test_what_cannot_be_joined_is_refused() -> None:
    one, two = build("bert"), build("bert")
    with pytest.raises(ValueError, match="one backbone"):
        join_states([])
    with pytest.raises(ValueError, match="one backbone"):
        join_states([one.begin(**make_batch()), two.begin(**make_batch())])


@every_family
def test_select_without_trimming_and_refusals(name: str) -> None:
    backbone, batch = build(name), make_batch()
    state = backbone.begin(**batch)
    kept = state.select(torch.tensor([2, 1]))
    assert (kept.length, kept.lengths.tolist()) == (12, [9, 3])
    assert state.select(torch.tensor([], dtype=torch.long), 0).batch_size == 0
    for wrong in (8, 13):
        with pytest.raises(ValueError, match=r"longest kept row, 9, and T = 12"):
            state.select(torch.tensor([2, 1]), wrong)


def test_masks_are_left_out_where_none_is_needed() -> None:
    ragged, full = make_batch(), make_batch((5, 5))
    for name in ("bert", "mpnet", "modernbert"):
        backbone = build(name)
        state = backbone.begin(**ragged)
        assert all(mask is not None for mask in state.masks.values())
        assert all(mask is None for mask in backbone.begin(**make_batch((4, 4))).masks.values())
        assert all(mask is None for mask in state.select(torch.tensor([1]), 3).masks.values()), name
    assert build("bert", "eager").begin(**full).masks == {None: None}
    assert build("llama").begin(**ragged).masks == {None: None}
    assert build("llama", "eager").begin(**full).masks[None] is not None
    sliding = build("qwen2-sliding").begin(**ragged)
    assert sliding.masks[None] is None
    assert sliding.masks[3] is not None
    assert sliding.select(torch.tensor([1]), 3).masks == {None: None, 3: None}


@pytest.mark.parametrize("reach", [None, 0, 2])
@pytest.mark.parametrize("eager", [False, True])
def test_no_query_is_left_without_a_key(reach: int | None, eager: bool) -> None:
    # Some attention kernels give NaN for a query that sees nothing, and NaN spreads from padding to real tokens.
    attention_mask = make_batch((6, 0, 3))["attention_mask"]
    mask = attention_mask_for(
        attention_mask.shape[1],
        attention_mask.bool(),
        device=attention_mask.device,
        causal=False,
        reach=reach,
        form="interface",
        eager=eager,
        dtype=torch.float32,
    )
    assert mask is not None
    visible = ((mask == 0) if eager else mask).expand(3, 1, 6, 6)
    assert visible.any(-1).all()
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    expected = attention_mask[2].bool() & (distance <= (6 if reach is None else reach))
    assert torch.equal(visible[2, 0, :3], expected[:3])


@every_variant
def test_an_empty_row_harms_nobody(name: str, attention: str) -> None:
    backbone, batch = build(name, attention), make_batch((6, 0, 4))
    expected = backbone.hidden_states(batch["input_ids"][[0, 2]], batch["attention_mask"][[0, 2]])[-1]
    state = backbone.hidden_states(**batch)[-1]
    assert torch.isfinite(state).all()
    assert difference(state[[0, 2]], expected, batch["attention_mask"][[0, 2]]) < TOLERANCE


def with_dropout(name: str) -> SteppedBackbone:
    backbone = build(name, "eager")
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    return backbone.train()


@every_family
def test_dropout_falls_where_the_library_has_it(name: str) -> None:
    backbone, batch = with_dropout(name), make_batch((8, 8))
    torch.manual_seed(1)
    expected = backbone.model(**batch).last_hidden_state
    torch.manual_seed(1)
    ours = run_to(backbone, backbone.num_layers, backbone.begin(**batch))
    # Dropout at one half makes states, and with them rounding errors, larger.
    assert difference(backbone.hidden(backbone.num_layers, ours), expected, batch["attention_mask"]) < 10 * TOLERANCE
    if any(isinstance(module, torch.nn.Dropout) for module in backbone.modules()):
        others = run_to(backbone, backbone.num_layers, backbone.begin(**batch))
        assert difference(others.hidden, ours.hidden, batch["attention_mask"]) > 1e-2


@every_family
def test_gradients_reach_the_embeddings(name: str) -> None:
    backbone = with_dropout(name)
    state = run_to(backbone, 2, backbone.begin(**make_batch())).select(torch.tensor([0, 2]), 12)
    last = run_to(backbone, backbone.num_layers, state, first=3)
    # Weighted: the plain sum of a normalised state is constant.
    backbone.hidden(backbone.num_layers, last).mul(torch.linspace(-1, 1, 32)).sum().backward()
    gradient = backbone.model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 1e-4


@every_variant
def test_bf16_autocast(name: str, attention: str) -> None:
    backbone, batch = build(name, attention), make_batch()
    expected = backbone.hidden_states(**batch)[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = run_to(backbone, 2, backbone.begin(**batch)).select(torch.arange(len(LENGTHS)), max(LENGTHS))
        output = backbone.hidden(backbone.num_layers, run_to(backbone, backbone.num_layers, state, first=3))
        if backbone.family == "DeBERTa":  # the library's own forward fails under autocast; ours runs it in float32
            assert difference(output, expected, batch["attention_mask"]) < TOLERANCE
            return
        theirs = backbone.model(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    error = (output.float() - expected)[real].abs().mean()
    library_error = (theirs.float() - expected)[real].abs().mean()
    assert 1e-5 < error < 2 * library_error + 1e-3


@every_family
def test_bf16_weights(name: str) -> None:
    backbone = build(name).to(torch.bfloat16)
    state = run_to(backbone, backbone.num_layers, backbone.begin(**make_batch()))
    assert state.hidden.dtype == torch.bfloat16
    assert torch.isfinite(state.hidden).all()


@every_family
def test_facts(name: str) -> None:
    backbone = build(name)
    config = CONFIGS[name]
    assert (backbone.num_layers, backbone.hidden_size) == (config.num_hidden_layers, 32)
    assert config.model_type in SUPPORTED[backbone.family]
    assert backbone.is_decoder == (name in PRE_NORM - {"modernbert"})
    assert {key.split(".")[0] for key in backbone.state_dict()} == {"model"}
    for wrong in (0, backbone.num_layers + 1):
        with pytest.raises(ValueError, match=rf"1\.\.{backbone.num_layers}, not {wrong}"):
            backbone.step(wrong, backbone.begin(**make_batch()))


def test_attention_may_be_changed_later() -> None:
    backbone = build("llama", "sdpa")
    backbone.model.set_attn_implementation("eager")
    assert deviation(backbone, **make_batch()) < TOLERANCE
    assert backbone.begin(**make_batch()).masks[None] is not None


def test_a_head_is_left_aside() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).eval()
    assert step_backbone(model).model is model.model


def test_deviation_needs_eval_mode() -> None:
    with pytest.raises(ValueError, match=r"eval\(\)"):
        deviation(build("bert").train(), **make_batch())


def test_left_padding_and_wrong_shapes_are_refused() -> None:
    backbone, batch = build("bert"), make_batch()
    with pytest.raises(ValueError, match="padded on the right"):
        backbone.begin(batch["input_ids"], batch["attention_mask"].flip(1))
    with pytest.raises(ValueError, match=r"\[5, 12\] and \[5, 11\]"):
        backbone.begin(batch["input_ids"], batch["attention_mask"][:, 1:])
    assert backbone.begin(batch["input_ids"]).lengths.tolist() == [12] * 5


def test_unknown_family() -> None:
    config = T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ModelError) as caught:
        step_backbone(AutoModel.from_config(config))
    message = str(caught.value)
    assert "'t5'" in message
    assert "register_family" in message
    assert "docs/backbones.md" in message
    assert all(kind in message for kinds in SUPPORTED.values() for kind in kinds)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(**_BERT, is_decoder=True), "is_decoder=false"),
        (AlbertConfig(**_BERT, embedding_size=16, inner_group_num=2), "inner_group_num=2"),
        (
            Qwen2Config(**_ROTARY, layer_types=["full_attention", "chunked_attention", "full_attention"]),
            "chunked_attention",
        ),
    ],
    ids=["causal-bert", "albert-inner-groups", "chunked-layers"],
)
def test_configurations_that_are_not_exact_are_refused(config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"cannot be run layer by layer: .*{reason}"):
        step_backbone(AutoModel.from_config(config))


def test_other_attention_implementations_are_refused() -> None:
    model = AutoModel.from_config(copy.deepcopy(CONFIGS["bert"]))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match=r"'flash_attention_2'.*Accepted: sdpa, eager"):
        step_backbone(model)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backbones, "_factories", dict(backbones._factories))
    yield


@pytest.mark.usefixtures("own_registry")
def test_registered_family_is_used_and_named() -> None:
    made: list[Any] = []

    def factory(model: Any) -> SteppedBackbone:
        made.append(model)
        return backbones.bert_like.BERT.build(model)

    register_family("bert", factory)
    model = AutoModel.from_config(copy.deepcopy(CONFIGS["bert"]))
    assert step_backbone(model).model is model
    assert made == [model]


@pytest.mark.usefixtures("own_registry")
def test_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "docs/backbones.md", "exec"), {})
    assert "differs by at most" in capsys.readouterr().out
    # Every built-in type is in the table of the page.
    assert not [kind for kinds in SUPPORTED.values() for kind in kinds if f"`{kind}`" not in text]
