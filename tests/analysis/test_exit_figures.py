from __future__ import annotations

import numpy as np
import pytest

from rl_exit.analysis.exits import exit_figures

LOSSES = [[3.0, 1.0, 0.5], [2.0, 2.0, 1.0], [1.0, 0.0, 0.0], [4.0, 3.0, 2.5]]
CORRECT = [[0, 1, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]]


def test_by_hand() -> None:
    found = exit_figures(LOSSES, CORRECT, [2, 3, 2, 3])
    assert found.loss == (2.5, 1.5, 1.0)
    assert found.accuracy == (0.25, 0.5, 0.75)
    assert found.leaving == (0, 2, 2)
    assert found.loss_leaving == (None, 0.5, 1.75)
    assert found.accuracy_leaving == (None, 1.0, 0.5)
    assert (found.loss_at_exit, found.accuracy_at_exit) == (1.125, 0.75)
    assert found.to_dict()["loss_leaving"] == [None, 0.5, 1.75]


def test_groups_add_up() -> None:
    rng = np.random.default_rng(0)
    losses, correct, left = rng.random((60, 5)), rng.random((60, 5)) < 0.5, rng.integers(1, 6, 60)
    found = exit_figures(losses, correct, left)
    assert sum(found.leaving) == 60
    total = sum(n * value for n, value in zip(found.leaving, found.loss_leaving, strict=True) if value is not None)
    assert total / 60 == pytest.approx(found.loss_at_exit)
    assert found.loss_at_exit == pytest.approx(np.mean([losses[i, layer - 1] for i, layer in enumerate(left)]))


@pytest.mark.parametrize("layers", [[0, 1, 1, 1], [1, 1, 1, 4], [1, 1]])
def test_layers_that_do_not_fit(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="exit"):
        exit_figures(LOSSES, CORRECT, layers)
