"""Instances kept from the exits for the policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rl_exit.config import load_config
from rl_exit.data.instances import Instances
from rl_exit.errors import UserError
from rl_exit.progress import Silent
from rl_exit.trainers.alternation import initialise
from rl_exit.trainers.hold_out import hold_out


def test_parts_are_disjoint_whole_and_of_the_seed():
    fitted, held = hold_out(101, 0.1, 7)
    assert len(held) == 10 and sorted([*fitted, *held]) == list(range(101))
    assert all((np.diff(part) > 0).all() for part in (fitted, held))
    assert np.array_equal(held, hold_out(101, 0.1, 7)[1]) and not np.array_equal(held, hold_out(101, 0.1, 8)[1])


@pytest.mark.parametrize(("count", "share", "sizes"), [(2, 0.01, (1, 1)), (2, 0.9, (1, 1)), (10, 0.9, (1, 9))])
def test_neither_part_is_empty(count: int, share: float, sizes: tuple[int, int]):
    assert tuple(map(len, hold_out(count, share, 0))) == sizes


def test_one_instance_cannot_be_shared():
    with pytest.raises(UserError, match=r"policy\.holdout = 0\.1"):
        hold_out(1, 0.1, 0)


@pytest.mark.parametrize("learns_on", ["held", "all"])
def test_the_exits_never_see_what_is_held(tiny_run: list[str], learns_on: str):
    words = [*tiny_run, "policy.holdout=0.25", f"policy.instances={learns_on}", "init.epochs=0"]
    config = load_config(None, words)
    initialise(config, Silent())
    data = Path(config.run_dir) / "data"
    fitted, held, dev = (Instances.open(data / f"{name}.arrow") for name in ("train", "held", "dev"))
    assert len(held) == round(0.25 * (len(held) + len(fitted))) and len(dev)
    assert not set(fitted.ids.tolist()) & set(held.ids.tolist())
    assert (data / "all.arrow").is_file() == (learns_on == "all")
    if learns_on == "all":
        assert set(Instances.open(data / "all.arrow").ids.tolist()) == {*fitted.ids.tolist(), *held.ids.tolist()}
