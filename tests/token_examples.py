"""Tokenised examples of random tokens."""

from __future__ import annotations

import numpy as np
from causal_models import ragged

from rl_exit.data.instances import Instances


def examples(lengths: list[int], starts: list[int]) -> Instances:
    ids, _ = ragged(lengths, seed=2)
    tokens = np.concatenate([ids[row, :length].numpy() for row, length in enumerate(lengths)]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    numbers = np.arange(len(lengths), dtype=np.int64) * 10
    return Instances(numbers, np.array(starts, dtype=np.int64), tokens, offsets, None, 0)
