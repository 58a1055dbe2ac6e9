"""Continuous batching of decoders: each text is that of generate for its prompt alone, whatever comes and goes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from causal_models import VOCABULARY, early_exit
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rl_exit.criteria import ConsistentEE, Criterion, Fixed, criterion
from rl_exit.generation.sampling import Settings
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.serving.decoding import ContinuousBatch, Order, Writing

CAPACITY = 40
MODELS = ("llama", "qwen2-window", "gpt2")
POLICY = ConsistentEE(0.5)
RULES: tuple[Criterion | None, ...] = (
    None,
    POLICY,
    POLICY,
    ConsistentEE(0.3),
    Fixed(2),
    criterion("calm_softmax", threshold=0.1),
    criterion("calm_saturation", threshold=0.55),
    criterion("pabee", patience=1),
)


def worded(name: str, seed: int = 0) -> EarlyExitCausalModel:
    """A tiny decoder with a tokenizer of one word a token."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, VOCABULARY))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = early_exit(name, seed)
    made.generation_config.eos_token_id = None  # only the tests say what ends a text
    made.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return made


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> EarlyExitCausalModel:
    return worded(request.param, 2)


def alone(model: EarlyExitCausalModel, order: Order) -> tuple[list[int], list[int]]:
    """The slow twin: tokens and exit layers of the prompt by itself."""
    words = {key: value for key, value in vars(order.settings).items() if key not in ("eos_token_ids", "stop_strings")}
    out = model.generate(
        torch.tensor([list(order.prompt)]),
        criterion=Fixed(model.num_exits) if order.rule is None else order.rule,
        eos_token_id=list(order.settings.eos_token_ids) or None,
        return_dict_in_generate=True,
        **{**words, **({"stop_strings": list(order.settings.stop_strings)} if order.settings.stop_strings else {})},
    )
    return out.sequences[0, len(order.prompt) :].tolist(), out.exit_layers[0].tolist()


def orders_of(rng: random.Random, count: int) -> list[Order]:
    made = []
    for number in range(count):
        draw = rng.random() < 0.5
        words: dict[str, Any] = {"do_sample": True, "seed": rng.randrange(1000), "top_k": rng.choice([0, 5])}
        if rng.random() < 0.2:
            words["repetition_penalty"] = 1.3
        made.append(
            Order(
                number,
                [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 12))],
                Settings(
                    max_new_tokens=rng.randint(1, 16),
                    eos_token_ids=(2, 17, 30) if rng.random() < 0.7 else (),
                    stop_strings=(f" w{rng.randrange(4, VOCABULARY)}",) if rng.random() < 0.3 else (),
                    **(words if draw else {}),
                ),
                rng.choice(RULES),
            )
        )
    return made


def written(batch: ContinuousBatch, found: dict[int, list[tuple[int, int]]]) -> list[Writing]:
    """One turn; returns those that ended."""
    ended = []
    for writing, event in batch.turn():
        found.setdefault(writing.order.number, []).append((event.token, event.exit_layer))
        if event.finish is not None:
            ended.append(writing)
    return ended


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9), rows=st.integers(1, 5))
def test_each_text_is_that_of_its_prompt_alone(model: EarlyExitCausalModel, seed: int, count: int, rows: int) -> None:
    """Random arrivals between turns, prompts in pieces, texts dropped midway, rows used again."""
    rng = random.Random(seed)
    orders = orders_of(rng, count)
    batch = ContinuousBatch(model, rows, CAPACITY, prompt_tokens=rng.randint(1, 20))
    found: dict[int, list[tuple[int, int]]] = {}
    open_texts: list[Writing] = []
    dropped: set[int] = set()
    coming = list(orders)
    while coming or len(batch):
        while coming and rng.random() < 0.4:
            open_texts.append(batch.add(coming.pop(0)))
        ended = written(batch, found)
        open_texts = [one for one in open_texts if one not in ended]
        if open_texts and rng.random() < 0.05:
            gone = open_texts.pop(rng.randrange(len(open_texts)))
            batch.drop(gone)
            dropped.add(gone.order.number)
    assert batch.inside == batch.waiting == 0
    for order in orders:
        pairs = list(zip(*alone(model, order), strict=True))
        if order.number in dropped:
            pairs = pairs[: len(found.get(order.number, []))]
        assert found.get(order.number, []) == pairs


def test_rows_share_steps_and_leave_at_different_layers(model: EarlyExitCausalModel) -> None:
    """Without this the comparison above would show little."""
    batch = ContinuousBatch(model, 4, CAPACITY)
    for number in range(4):
        batch.add(Order(number, [5 + number, 6, 7], Settings(max_new_tokens=12), RULES[1 + number]))
    found: dict[int, list[tuple[int, int]]] = {}
    while len(batch):
        written(batch, found)
    assert batch.counts.steps == 11 and batch.counts.tokens == 48, "one step a token for all four"
    assert batch.counts.layers < batch.counts.row_layers, "layers ran on several rows"
    assert len({layer for pairs in found.values() for _, layer in pairs}) >= 3


def test_a_text_goes_on_where_another_replica_was(model: EarlyExitCausalModel) -> None:
    rng = random.Random(5)
    for order in orders_of(rng, 6):
        tokens, layers = alone(model, order)
        for at in (0, 1, len(tokens) // 2, max(len(tokens) - 1, 0)):
            batch = ContinuousBatch(model, 2, CAPACITY)
            batch.add(replace(order, given=tokens[:at]))
            found: dict[int, list[tuple[int, int]]] = {}
            while len(batch):
                written(batch, found)
            assert found[order.number] == list(zip(tokens, layers, strict=True))


def test_what_was_given_is_kept(model: EarlyExitCausalModel) -> None:
    """The client has these tokens, so the text must go on from them, and not from what would be chosen here."""
    batch = ContinuousBatch(model, 1, CAPACITY)
    tokens, _ = alone(model, Order(0, [5, 6, 7], Settings(max_new_tokens=6), POLICY))
    other = [(token + 1) % VOCABULARY for token in tokens[:2]]
    batch.add(Order(0, [5, 6, 7], Settings(max_new_tokens=6), POLICY, given=other))
    found: dict[int, list[tuple[int, int]]] = {}
    while len(batch):
        written(batch, found)
    assert [token for token, _ in found[0]][:2] == other


def test_a_long_prompt_does_not_hold_up_others(model: EarlyExitCausalModel) -> None:
    batch = ContinuousBatch(model, 2, CAPACITY, prompt_tokens=4)
    batch.add(Order(0, [5], Settings(max_new_tokens=12), POLICY))
    batch.turn()
    batch.add(Order(1, list(range(4, 24)), Settings(max_new_tokens=2), POLICY))
    numbers: list[Sequence[int]] = [[writing.order.number for writing, _ in batch.turn()] for _ in range(5)]
    assert numbers == [[0], [0], [0], [0], [1, 0]], "a piece of the prompt in each turn, and a token of the other text"


def test_what_fails_in_one_text_ends_that_one_alone(model: EarlyExitCausalModel) -> None:
    batch = ContinuousBatch(model, 3, CAPACITY)
    orders = [
        Order(number, [5 + number], Settings(max_new_tokens=4, do_sample=True, seed=1), None) for number in (0, 1)
    ]
    fine, broken = (batch.add(order) for order in orders)
    waiting = [batch.add(replace(orders[0], number=number)) for number in (2, 3)]

    def fails(*_: Any) -> torch.Tensor:
        raise ValueError("not drawn")

    assert broken.choose is not None
    found: list[tuple[Writing, Any]] = []
    while len(batch):
        found += batch.turn()
        broken.choose.chain = fails  # type: ignore[assignment]
    told = {one: [event for writing, event in found if writing is one] for one in (fine, broken, *waiting)}
    assert isinstance(told[broken].pop(), ValueError) and len(told[broken]) == 1
    assert [len(told[one]) for one in (fine, *waiting)] == [4, 4, 4]
    assert [event.token for event in told[fine]] == alone(model, orders[0])[0]
    assert batch.counts.tokens == 13


def test_what_does_not_fit_is_refused(model: EarlyExitCausalModel) -> None:
    batch = ContinuousBatch(model, 1, 8)
    with pytest.raises(ValueError, match="do not fit"):
        batch.add(Order(0, [5] * 5, Settings(max_new_tokens=4), None))
    with pytest.raises(ValueError, match="lossless"):
        batch.add(Order(0, [5], Settings(max_new_tokens=4, lossless=True), None))
