"""Losses of the heads in closed form, on small tensors."""

from __future__ import annotations

import math

import pytest
import torch

from rl_exit.criteria.head_losses import (
    agreement,
    agreement_loss,
    certainty_loss,
    consistency_loss,
    gate_loss,
    ponder_loss,
)

# Three instances, three layers, two classes; what each exit says: 0 0 1 | 1 1 1 | 0 1 0.
LOGITS = torch.tensor(
    [[[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]]
)
LABELS = torch.tensor([0, 1, 1])
ODDS = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0], [-math.log(3), 0.0]])  # .5 .75 | .75 .5 | .25 .5


def test_certainty():
    # right: 1 1 | 1 1 | 0 1; squared errors .25 .0625 | .0625 .25 | .0625 .25
    assert certainty_loss(ODDS, LOGITS, LABELS).item() == pytest.approx((0.25 * 3 + 0.0625 * 3) / 6)
    assert certainty_loss(ODDS, LOGITS, 1 - LABELS).item() != pytest.approx((0.25 * 3 + 0.0625 * 3) / 6)


def test_agreement_and_consistency():
    assert agreement(LOGITS).tolist() == [[False, False], [True, True], [True, False]]
    # -ln of: .5 .25 | .75 .5 | .25 .5
    each = [-math.log(p) for p in (0.5, 0.25, 0.75, 0.5, 0.25, 0.5)]
    assert consistency_loss(ODDS, LOGITS).item() == pytest.approx(sum(each) / 6)


def test_agreement_is_balanced_within_each_layer():
    # layer 1: disagree -ln .5; agree mean(-ln .75, -ln .25). layer 2: disagree mean(-ln .25, -ln .5); agree -ln .5
    one = (-math.log(0.5) + (-math.log(0.75) - math.log(0.25)) / 2) / 2
    two = ((-math.log(0.25) - math.log(0.5)) / 2 - math.log(0.5)) / 2
    assert agreement_loss(ODDS, LOGITS).item() == pytest.approx((one + two) / 2)
    # A layer where all agree counts its plain mean.
    assert agreement_loss(ODDS[1:2], LOGITS[1:2]).item() == pytest.approx((-math.log(0.75) - math.log(0.5)) / 2)


def test_ponder():
    losses = torch.tensor([[1.0, 2.0, 4.0]])
    odds = torch.tensor([[0.0, math.log(3)]])  # lambda .5, .75: P = .5, .375, .125
    prior = [0.1, 0.09, 0.81]  # geometric, the last entry takes the rest
    apart = sum(q * math.log(q / p) for q, p in zip(prior, (0.5, 0.375, 0.125), strict=True))
    assert ponder_loss(odds, losses, 0.5, 0.1).item() == pytest.approx(0.5 + 0.75 + 0.5 + 0.5 * apart)
    assert ponder_loss(odds, losses, 0.0).item() == pytest.approx(1.75)
    at_prior = torch.full((1, 2), math.log(0.1 / 0.9))
    assert ponder_loss(at_prior, torch.zeros(1, 3), 1.0, 0.1).item() == pytest.approx(0.0, abs=1e-6)
    given = losses.clone().requires_grad_()
    ponder_loss(odds, given).backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad, torch.tensor([[0.5, 0.375, 0.125]])), "the exits learn by P(l)"


def test_gates():
    losses = torch.tensor([[0.2, 0.2, 0.2], [2.0, 0.5, 0.1], [2.0, 1.9, 0.1]])
    # CE + .3 l/3: .3 .4 .5 -> 1 | 2.1 .7 .4 -> 3 | -> 3; a price of .9: .5 .. -> 1 | 2.3 1.1 1.0 -> 3 | 3
    odds = torch.tensor([[0.0, math.log(3)]]).expand(3, 2)
    first = -math.log(0.5) - math.log(0.75)
    last = -math.log(0.5) - math.log(0.25)
    assert gate_loss(odds, losses, 0.3).item() == pytest.approx((first + 2 * last) / 6)
    # a price of 2.4: .8 each: 1.0 | 2.8 2.1 2.5 -> 2: target 0 1 | 2.8 3.5 2.5 -> 3
    middle = -math.log(0.5) - math.log(0.75)
    assert gate_loss(odds, losses, 2.4).item() == pytest.approx((first + middle + last) / 6)
    tie = torch.tensor([[0.9, 0.6, 0.3]])
    assert gate_loss(torch.tensor([[5.0, 5.0]]), tie, 0.9).item() < 0.1, "of equals the first"
