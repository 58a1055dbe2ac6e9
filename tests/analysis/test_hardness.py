from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rl_exit.analysis.hardness import average_ranks, forgetting, spearman


def test_ties_share_the_mean_of_their_ranks() -> None:
    assert average_ranks([3.0, 1.0, 3.0, 2.0, 3.0]).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(1, 7, 200)  # tied, as memorized layers are
    y = x + rng.normal(0, 3, 200)
    found = spearman(x, y)
    assert found is not None
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert found.low < found.value < found.high
    other = spearman(x, np.where(np.arange(200) == 0, y + 9, y))
    assert other is not None and other.value != pytest.approx(found.value, abs=1e-12)


def test_a_worked_example() -> None:
    # Ranks 1 2 3 4 and 2 1 4 3: differences -1 1 -1 1, so rho = 1 - 6*4 / (4*15) = 0.6.
    found = spearman([1, 2, 3, 4], [20, 10, 40, 30])
    assert found is not None and found.value == pytest.approx(0.6)


def test_the_interval_covers_what_is_true_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(0)
    true, covered = 0.5, 0
    linear = 2 * np.sin(np.pi * true / 6)  # Pearson's for which Spearman's is 0.5
    for _ in range(400):
        x = rng.standard_normal(80)
        found = spearman(x, linear * x + np.sqrt(1 - linear**2) * rng.standard_normal(80))
        assert found is not None
        covered += found.low <= true <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_ends_and_cases_without_a_correlation() -> None:
    assert spearman(range(5), range(5)) == (1.0, 1.0, 1.0)
    assert spearman(range(5), [1, 1, 1, 1, 1]) is None
    assert spearman([1, 2, 3], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="two finite"):
        spearman([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="two finite"):
        spearman([1.0, float("nan")], [1, 2])


def test_forgetting_by_hand() -> None:
    visits = {  # id -> right at epochs 1..5
        7: (1, 0, 1, 0, 1),  # forgotten twice
        3: (0, 0, 1, 1, 1),  # learnt once, never forgotten
        9: (0, 0, 0, 0, 0),  # never learnt
        4: (1, 1, 1, 1, 0),  # forgotten at the end
    }
    rows = [(who, epoch, right) for who, flags in visits.items() for epoch, right in enumerate(flags, 1)]
    ids, epochs, correct = (np.array(column) for column in zip(*rows, strict=True))
    shuffled = np.random.default_rng(0).permutation(len(ids))
    for order in (np.arange(len(ids)), shuffled):
        found = forgetting(ids[order], epochs[order], correct[order].astype(bool))
        assert found.ids.tolist() == [3, 4, 7, 9] and found.visits == 5
        assert found.events.tolist() == [0, 1, 2, 0]
        assert found.learnt.tolist() == [True, True, True, False]
        assert found.hardness().tolist() == [0, 1, 2, 3]  # never learnt is harder than any that was


def test_the_last_visit_of_one_instance_is_not_before_the_first_of_the_next() -> None:
    found = forgetting([1, 1, 2, 2], [1, 2, 1, 2], [True, True, False, False])
    assert found.events.tolist() == [0, 0]


def test_bad_records_of_forgetting() -> None:
    with pytest.raises(ValueError, match="twice in one epoch"):
        forgetting([1, 1], [1, 1], [True, False])
    with pytest.raises(ValueError, match="V > 0"):
        forgetting([], [], [])
