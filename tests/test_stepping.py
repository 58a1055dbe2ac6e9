"""Groups of rows: split, joined, advanced in any order, they answer as alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from rl_exit import EarlyExitModel, pooling
from rl_exit.criteria import ConsistentEE, Fixed, criterion
from rl_exit.pooling import DepthPool, part_of, run_pooled
from rl_exit.stepping import Survivors, advance, enter, join


@pytest.fixture(scope="module")
def model(tiny_backbone: Path) -> EarlyExitModel:
    return EarlyExitModel.from_backbone(
        str(tiny_backbone), ("a", "b", "c"), pooling="mean", policy_inputs="answers", policy_shared=True
    ).eval()


def batch_of(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(4, 20, mask.shape, generator=generator) * mask, "attention_mask": mask}


def finish(model: EarlyExitModel, group: Survivors, rule) -> dict[int, torch.Tensor]:
    answers = {}
    while True:
        step = advance(model, group, rule)
        if step.left is not None:
            answers |= dict(zip(step.left.rows.tolist(), step.left.logits, strict=True))
        if step.inside is None:
            return answers
        group = step.inside


@pytest.mark.parametrize("rule", [ConsistentEE(1.0), criterion("pabee", patience=3), criterion("pcee", threshold=0.0)])
@torch.inference_mode()
def test_joined_and_split_groups_answer_as_alone(model, rule):
    """Two requests of different length meet after layer 1 and part again after layer 2, with all that is remembered."""
    batches = [batch_of(3, 9, seed=1), batch_of(6, 2, 4, seed=2)]
    expected = finish(model, enter(model, batches[0], rule), rule) | finish(
        model, enter(model, batches[1], rule, torch.tensor([2, 3, 4])), rule
    )
    one = advance(model, enter(model, batches[0], rule), rule).inside
    two = advance(model, enter(model, batches[1], rule, torch.tensor([2, 3, 4])), rule).inside
    assert one is not None and two is not None
    both = advance(model, join([two, one]), rule).inside
    assert both is not None and both.rows.tolist() == [2, 3, 4, 0, 1]
    first, rest = both.split(2)
    assert (len(first), len(rest)) == (2, 3)
    for wrong in (0, 5):
        with pytest.raises(ValueError, match="some on either side"):
            both.split(wrong)
    found = finish(model, rest, rule) | finish(model, first, rule)
    assert found.keys() == expected.keys() == set(range(5))
    for row, logits in expected.items():
        torch.testing.assert_close(found[row], logits, atol=1e-5, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 1e-3, "rows must be told apart"


@torch.inference_mode()
def test_who_left_is_named(model):
    step = advance(model, enter(model, batch_of(3, 4), Fixed(1), torch.tensor([7, 9])), Fixed(1))
    assert step.inside is None and step.left is not None
    assert (step.left.layer, step.left.rows.tolist(), tuple(step.left.logits.shape)) == (1, [7, 9], (2, 3))


@torch.inference_mode()
def test_what_cannot_be_joined_is_refused(model):
    rule = criterion("pabee", patience=2)
    start = enter(model, batch_of(3, 4), rule)
    later = advance(model, enter(model, batch_of(3, 4), rule), rule).inside
    other = advance(model, enter(model, batch_of(3, 4), Fixed(3)), Fixed(3)).inside
    assert later is not None and other is not None
    for groups, told in (([], "same layer"), ([start, later], "same layer"), ([later, other], "one criterion")):
        with pytest.raises(ValueError, match=told):
            join(groups)


@torch.inference_mode()
def test_the_pool_is_first_come_first_served(model):
    pool, rule = DepthPool(model.num_layers), Fixed(3)
    for number in (0, 10, 20):
        pool.put(enter(model, batch_of(3, 4, seed=number), rule, torch.tensor([number, number + 1])))
    assert (len(pool), pool.waiting(0), pool.ready(7), pool.ready(6), pool.shallowest()) == (6, 6, None, 0, 0)
    assert pool.take(0, 3).rows.tolist() == [0, 1, 10]
    assert pool.take(0, 3).rows.tolist() == [11, 20, 21]
    assert pool.shallowest() is None
    with pytest.raises(ValueError, match="nobody waits"):
        pool.take(0, 1)


@torch.inference_mode()
def test_the_pool_knows_how_many_tokens_wait(model):
    """A group counts with its own padding; what is left of a group that was split, with that of its rows."""
    pool, rule = DepthPool(model.num_layers), Fixed(3)
    pool.put(enter(model, batch_of(9, 2, 4), rule))
    pool.put(enter(model, batch_of(3, 3), rule))
    assert (pool.ready(99, 33), pool.ready(99, 34)) == (0, None)
    assert pool.take(0, 1).longest == 9
    assert (pool.ready(99, 2 * 4 + 6), pool.ready(99, 2 * 4 + 7)) == (0, None)
    assert pool.take(0, 3).rows.tolist() == [1, 2, 0]
    assert (len(pool), pool.ready(99, 3), pool.ready(99, 4)) == (1, 0, None)
    pool.take(0, 1)
    assert pool.ready(99, 1) is None


@torch.inference_mode()
def test_the_pool_cuts_what_has_too_many_tokens(model):
    """Into even parts; and adds no group that would make it too many, with the padding of both."""
    pool, rule = DepthPool(model.num_layers), Fixed(3)
    for number, lengths in ((0, [5] * 7), (10, [4, 6]), (20, [9])):
        pool.put(enter(model, batch_of(*lengths), rule, np.arange(number, number + len(lengths))))
    assert pool.take(0, 99, 34).rows.tolist() == [0, 1, 2, 3], "35 tokens in two even parts"
    assert pool.take(0, 99, 20).rows.tolist() == [4, 5, 6], "the next is of 6 tokens, and four of those are 24"
    assert pool.take(0, 2, 99).rows.tolist() == [10, 11]
    assert pool.take(0, 99, 3).rows.tolist() == [20], "a row is never cut"
    assert len(pool) == 0 and pool.ready(99, 1) is None
    assert [part_of(7, 5, most) for most in (None, 35, 34, 5, 1)] == [7, 7, 4, 1, 1]
    assert part_of(5, 5, 13) == 2 and part_of(3, 0, 13) == 3


@torch.inference_mode()
def test_a_batch_of_too_many_tokens_is_answered_in_parts(model, monkeypatch):
    rule, ran = criterion("entropy", threshold=0.9), []
    plain_step = model.backbone.step

    def step(layer, state):
        ran.append(state.hidden.shape)
        return plain_step(layer, state)

    monkeypatch.setattr(model.backbone, "step", step)
    lengths = [9, 12, 9, 3, 5, 1, 7]

    def answers():
        ran.clear()
        arrivals = iter([partial(enter, model, batch_of(*lengths), rule)])
        left = [each for each in run_pooled(model, arrivals, rule, 8) if each is not None]
        rows = np.concatenate([each.rows for each in left])
        layers = np.concatenate([np.full(len(each.rows), each.layer) for each in left])
        return torch.cat([each.logits for each in left])[np.argsort(rows)], layers[np.argsort(rows)].tolist()

    whole, layers = answers()
    assert ran[0][0] == len(lengths)
    monkeypatch.setattr(pooling, "ENOUGH_TOKENS", 10)
    monkeypatch.setattr(pooling, "MOST_TOKENS", 30)
    parts, same = answers()
    assert same == layers and max(rows * tokens for rows, tokens, _ in ran) <= 30
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_memories_of_any_kind_follow_their_rows(model):
    """Whole groups beside parts of groups, in types that numpy knows and that it does not."""
    memories = {"a": torch.arange(5.0)[:, None], "b": torch.arange(5), "c": torch.arange(5, dtype=torch.bfloat16)}
    whole = enter(model, batch_of(3, 4, 2, 5, 1), Fixed(3), [5, 6, 7, 8, 9])
    whole = replace(whole, carry=memories)
    first, rest = whole.split(2)
    joined = join([rest, whole, first])
    order = [2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert joined.rows.tolist() == [5 + row for row in order]
    for key, memory in memories.items():
        assert joined.carry[key].dtype == memory.dtype and joined.carry[key].flatten().tolist() == order
