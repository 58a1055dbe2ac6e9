"""Steps on rows of different batches and the engine that runs them: equal to each text alone, whatever runs with it."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_exit import EarlyExitModel
from rl_exit.criteria import Criterion, Fixed, criterion
from rl_exit.data.instances import Instances
from rl_exit.data.tasks import TextSplit, tokenise
from rl_exit.inference import run_batch
from rl_exit.serving.engine import PooledEngine, measure_rules
from rl_exit.serving.pool import PoolRules
from rl_exit.serving.steps import Passage, run_step

WORDS = ("cat", "dog", "horse", "saw", "drill", "the", "red", "near", "under", "my", "found")


@pytest.fixture(scope="module", params=["state-exit", "both-exit", "both-own", "state-exit-hook"])
def model(request: pytest.FixtureRequest, tiny_backbone: Path) -> EarlyExitModel:
    """With policy heads that are not all alike, so that texts leave at different layers."""
    inputs, answer, *hook = request.param.split("-")
    made = EarlyExitModel.from_backbone(
        str(tiny_backbone), ["a", "b", "c"], policy_inputs=inputs, policy_answer=answer, pooling="mean"
    )
    generator = torch.Generator().manual_seed(5)
    heads = [made.policy.weight_out, *made.exits.parameters()]
    heads += [] if made.answer_heads is None else list(made.answer_heads.parameters())
    with torch.no_grad():
        for weight in heads:
            weight.add_(torch.randn(weight.shape, generator=generator))
    if hook:  # a layer that runs as a module, and so end to end
        made.backbone.layer_modules()[1].register_forward_hook(lambda *given: None)
    return made


@pytest.fixture(scope="module")
def rules(model: EarlyExitModel) -> tuple[Criterion, ...]:
    """A threshold at which half of the texts leave at layer 1, two rules that remember, and one that reads nothing."""
    instances = instances_of(model, 30, 1)
    with torch.no_grad():
        every = model.all_exits(**instances.batch(range(30)))
        pi = model.exit_logits(every.states, every.logits)[:, 0].sigmoid()
    middle = criterion("consistentee", threshold=float(pi.median()))
    return (middle, criterion("pabee", patience=1), criterion("beem", threshold=0.2), Fixed(2))


def instances_of(model: EarlyExitModel, count: int, seed: int) -> Instances:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(count)]
    pairs = [rng.choice(WORDS) for _ in range(count)]
    split = TextSplit(np.arange(count), texts, pairs, np.zeros(count, dtype=np.int64))
    return tokenise(split, model.tokenizer, model.max_length)


def alone(model: EarlyExitModel, instances: Instances, rules: list[Criterion]) -> list[tuple[int, Tensor]]:
    """Each text by itself in the engine: the slow twin."""
    outs = [run_batch(model, instances.batch([row]), rule) for row, rule in enumerate(rules)]
    return [(int(out.exit_layer[0]), out.logits[0]) for out in outs]


def passages_of(instances: Instances, rules: list[Criterion]) -> list[Passage]:
    bounds = zip(instances.offsets[:-1], instances.offsets[1:], rules, strict=True)
    types = instances.token_types
    return [Passage(instances.tokens[a:b], None if types is None else types[a:b], rule) for a, b, rule in bounds]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12))
def test_any_order_of_steps_equals_each_text_alone(
    model: EarlyExitModel, rules: tuple[Criterion, ...], seed: int, count: int
) -> None:
    rng = random.Random(seed)
    instances = instances_of(model, count, seed)
    chosen_rules = [rng.choice(rules) for _ in range(count)]
    expected = alone(model, instances, chosen_rules)
    passages = passages_of(instances, chosen_rules)
    layer_of = dict.fromkeys(range(count), 1)  # the layer that each one waits for
    found: dict[int, tuple[int, Tensor]] = {}
    while layer_of:
        layer = rng.choice(list(layer_of.values()))
        there = [row for row, at in layer_of.items() if at == layer]
        rng.shuffle(there)
        chosen = there[: rng.randint(1, len(there))]
        outcome = run_step(model, layer, [passages[row] for row in chosen], instances.pad_token_id)
        for position, logits in zip(outcome.left, outcome.logits, strict=True):
            found[chosen[position]] = (layer, logits)
            del layer_of[chosen[position]]
        for position in outcome.stay:
            layer_of[chosen[position]] = layer + 1
    for row in range(count):
        assert found[row][0] == expected[row][0]
        torch.testing.assert_close(found[row][1], expected[row][1], atol=1e-5, rtol=0)


def test_texts_leave_at_different_layers(model: EarlyExitModel, rules: tuple[Criterion, ...]) -> None:
    """Without this the comparison above would show little."""
    assert len({layer for layer, _ in alone(model, instances_of(model, 30, 1), [rules[0]] * 30)}) >= 2
    assert len({layer for layer, _ in alone(model, instances_of(model, 30, 1), [rules[1]] * 30)}) >= 2


def test_a_wrong_memory_would_be_seen(model: EarlyExitModel) -> None:
    instances = instances_of(model, 8, 0)
    passages = passages_of(instances, [Fixed(2)] * 8)
    run_step(model, 1, passages, instances.pad_token_id)
    passages[0].index, passages[1].index = passages[1].index, passages[0].index
    outcome = run_step(model, 2, passages, instances.pad_token_id)
    expected = alone(model, instances, [Fixed(2)] * 8)
    logits = dict(zip(outcome.left, outcome.logits, strict=True))
    assert not torch.allclose(logits[0], expected[0][1], atol=1e-5)


class FirstLeaves:
    """The first row of a batch leaves."""

    def start(self, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        return {"seen": torch.arange(batch_size, device=device)}

    def leave(self, layer: int, view: Any, carry: dict[str, Tensor]) -> Tensor:
        return torch.arange(len(view.logits)) == 0


def test_short_rows_do_not_keep_the_memory_of_a_long_one_that_has_left(model: EarlyExitModel) -> None:
    instances = instances_of(model, 30, 0)
    by_length = np.argsort(-instances.lengths)
    some = instances.take([int(by_length[0]), int(by_length[-1])])
    passages = passages_of(some, [FirstLeaves()] * 2)  # type: ignore[list-item]
    assert run_step(model, 1, passages, some.pad_token_id).left == [0]
    chunk = passages[1].chunk
    assert chunk is not None and chunk.state.hidden.shape[:2] == (1, int(some.lengths[1]))
    assert chunk.carry["seen"].tolist() == [1]


def test_steps_refuse_training_mode_and_nothing(model: EarlyExitModel) -> None:
    with pytest.raises(ValueError, match="evaluation mode"):
        run_step(model, 1, [], 0)


@pytest.fixture(params=[PoolRules(batch_size=4, deadline=0.001), PoolRules(batch_size=4, goal=0.02)])
def engine(model: EarlyExitModel, request: pytest.FixtureRequest) -> Any:
    made = PooledEngine(model, request.param)
    yield made
    made.close()


def test_requests_from_many_threads_are_all_answered(
    model: EarlyExitModel, rules: tuple[Criterion, ...], engine: PooledEngine
) -> None:
    answers: dict[int, list[Any]] = {}

    def ask(number: int) -> None:
        rng = random.Random(number)
        for turn in range(6):
            count = rng.randint(1, 5)
            instances = instances_of(model, count, 100 * number + turn)
            rule = rules[rng.randrange(len(rules))]
            for left, (layer, logits) in zip(
                engine.submit(instances, rule).result(30), alone(model, instances, [rule] * count), strict=True
            ):
                answers.setdefault(number, []).append(left.exit_layer == layer)
                torch.testing.assert_close(torch.as_tensor(left.logits), logits, atol=1e-5, rtol=0)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 6 and all(all(found) for found in answers.values())
    assert engine.counts.tokens >= engine.counts.real_tokens > 0
    assert engine.waiting() == [0, 0, 0]


def test_an_error_reaches_those_who_wait_and_nobody_else(model: EarlyExitModel, engine: PooledEngine) -> None:
    class Broken:
        name = "broken"

        def start(self, batch_size: int, device: torch.device) -> dict[str, Tensor]:
            return {}

        def leave(self, layer: int, view: Any, carry: Any) -> Tensor:
            raise ZeroDivisionError("by the rule")

    answer = engine.submit(instances_of(model, 2, 0), Broken())
    with pytest.raises(ZeroDivisionError, match="by the rule"):
        answer.result(10)
    assert len(engine.submit(instances_of(model, 3, 0), Fixed(1)).result(10)) == 3


def test_what_nobody_waits_for_is_dropped(model: EarlyExitModel, engine: PooledEngine) -> None:
    free = threading.Event()
    engine.call(lambda: free.wait(10))
    assert engine.submit(instances_of(model, 5, 0), Fixed(3)).cancel()
    free.set()
    assert len(engine.submit(instances_of(model, 1, 0), Fixed(1)).result(10)) == 1
    assert engine.counts.rows == 1


def test_closing_answers_what_is_inside_and_takes_no_more(model: EarlyExitModel) -> None:
    made = PooledEngine(model, PoolRules())
    answers = made.submit(instances_of(model, 30, 0), Fixed(3))
    made.close()
    assert len(answers.result(0)) == 30
    with pytest.raises(RuntimeError, match="closed"):
        made.submit(instances_of(model, 1, 0), Fixed(1))
    with pytest.raises(RuntimeError, match="closed"):
        made.call(lambda: None)


def test_a_late_request_that_is_given_up_leaves_the_pool(model: EarlyExitModel) -> None:
    engine = PooledEngine(model, PoolRules(goal=1e-6))
    free, began = threading.Event(), threading.Event()
    engine.call(lambda: (began.set(), free.wait(10)))
    assert began.wait(10)
    answers = [engine.submit(instances_of(model, 3, number), Fixed(3)) for number in range(5)]
    assert sum(engine.waiting()) == 15
    assert all(answer.cancel() for answer in answers[:4])
    free.set()
    assert len(answers[4].result(10)) == 3
    engine.close()
    assert engine.waiting() == [0, 0, 0] and engine.counts.rows == 9 and engine.counts.late == 5


def test_with_a_goal_requests_that_take_longer_are_counted(model: EarlyExitModel) -> None:
    now = iter(np.arange(0.0, 1e6))  # a second for each look at the clock
    engine = PooledEngine(model, PoolRules(goal=10.0), clock=lambda: float(next(now)))
    quick = engine.submit(instances_of(model, 1, 0), Fixed(1))
    quick.result(10)
    assert engine.counts.late == 0
    free = threading.Event()
    engine.call(lambda: (free.wait(10), [next(now) for _ in range(20)]))
    slow = engine.submit(instances_of(model, 2, 0), Fixed(3))
    free.set()
    slow.result(10)
    engine.close()
    assert engine.counts.late == 1, "a request, not its texts"


def test_the_rules_of_this_machine_are_measured(model: EarlyExitModel) -> None:
    rules = measure_rules(model, 8, 0.01)
    assert (rules.batch_size, rules.deadline, rules.goal) == (8, 0.01, float("inf"))
    assert measure_rules(model, 8, 0.0, goal=0.2).goal == 0.2
    assert 0 <= rules.overhead < 1e9 and rules.batch_tokens >= 1
    quick = [model.backbone.drops_padding(layer, model.backbone.begin(torch.ones(1, 1).long())) for layer in (1, 2, 3)]
    expected = (1024, 4096) if all(quick) else (256, float("inf"))
    assert quick[0] and (rules.packed_tokens, rules.packed_area) == expected
