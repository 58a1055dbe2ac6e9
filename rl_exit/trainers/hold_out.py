"""Which instances the exits are fitted to, and which are kept for the policy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rl_exit.errors import UserError


def hold_out(count: int, share: float, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows to fit the exits to, and rows that are kept for the policy; each ascending, at least one of either.

    Raises:
        UserError: There are too few instances for both.
    """
    if count < 2:
        raise UserError(f"{count} training instance; policy.holdout = {share:g} needs two or more, or set it to 0")
    number = min(max(1, round(share * count)), count - 1)
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[number:]), np.sort(order[:number])
