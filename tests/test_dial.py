"""The dial: one policy, every price; the engine agrees with the store, and more speed never means more layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl_exit.criteria import StoredSplit
from rl_exit.dial import Dial, DialSettings, dial_exits, load_dial, save_dial, train_dial
from rl_exit.errors import ModelError

LAYERS = 5
HOW = DialSettings(epochs=30)
SPEEDS = (0.05, 0.35, 0.65, 1.0)


def split_of(count: int, seed: int) -> StoredSplit:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    ease = rng.normal(0, 1.5, (count, 1)) + np.linspace(0.3, 2.5, LAYERS)
    logits = rng.normal(0, 1, (count, LAYERS, 3))
    logits[np.arange(count), :, labels] += ease
    return StoredSplit.from_logits(labels, logits)


@pytest.fixture(scope="module")
def trained():
    return train_dial(split_of(2000, 0), HOW)


def outcome(heads, split, speed):
    left = dial_exits(heads, split, speed).numpy()
    return left.mean(), split.correct[np.arange(len(left)), left - 1].mean()


def test_speed_moves_along_the_curve(trained):
    split = split_of(2000, 1)
    found = [outcome(trained, split, speed) for speed in SPEEDS]
    layers = [layer for layer, _ in found]
    assert layers == sorted(layers, reverse=True) and layers[0] - layers[-1] > 1.0
    assert outcome(trained, split, 0.0)[0] == LAYERS


@pytest.mark.slow
def test_it_keeps_up_with_policies_for_one_price(trained):
    """Return at the price itself, in right answers: what is lost by serving all prices is under a point."""
    train, split = split_of(2000, 0), split_of(4000, 1)
    for speed in (0.35, 0.65):
        price = HOW.low * (HOW.high / HOW.low) ** speed
        dial, alone = (
            right - price * layers
            for layers, right in (
                outcome(trained, split, speed),
                outcome(train_dial(train, HOW, fixed_speed=speed), split, speed),
            )
        )
        assert dial > alone - 0.01
        hasty = outcome(trained, split, 1.0)
        assert hasty[1] - price * hasty[0] < dial - 0.01, "the place on the dial must matter"


def test_training_is_deterministic_and_leaves_the_generator(trained):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    short = DialSettings(epochs=1)
    one, two = (train_dial(split_of(300, 0), short, seed=3) for _ in range(2))
    assert torch.rand(1) == expected
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    other = train_dial(split_of(300, 0), short, seed=4)
    assert not torch.equal(one.weight_in, other.weight_in)


def test_saved_and_read_again(trained, tmp_path):
    with pytest.raises(ModelError, match="has no dial"):
        load_dial(tmp_path, LAYERS, 0.5)
    save_dial(tmp_path, trained, 3, {"seed": 0})
    again = load_dial(tmp_path, LAYERS, 0.5)
    assert isinstance(again, Dial) and again.speed == 0.5
    split = split_of(200, 2)
    assert torch.equal(dial_exits(again.heads, split, 0.5), dial_exits(trained, split, 0.5))
    with pytest.raises(ModelError, match=f"accepted here: format 1 for {LAYERS + 1}"):
        load_dial(tmp_path, LAYERS + 1, 0.5)
    (tmp_path / "dial.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot be read as a dial"):
        load_dial(tmp_path, LAYERS, 0.5)
