"""Keys and values of every layer, allocated once, with what tokens that left early owe to the layers above.

A token that left at layer e presents its state of layer e to every deeper layer. Nobody reads those keys and values
until a later token of the same row comes to that layer, so the state is kept (`shown`) and the layer's keys and values
of all tokens that owe them are computed then, in the one product that the layer makes of the current tokens anyway: its
weights are read once, and a layer that no later token reaches is never paid for. Per layer and row, the tokens that owe
nothing are a prefix; its length is `filled`.

Shapes: B rows, C positions, H hidden size, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Cache:
    """The cache of one generation.

    Attributes:
        keys: For each layer [B, key heads, C, D]; a head's keys side by side, which attention reads twice as fast.
        values: The same.
        shown: State at which each token left, [B, C, H]; holds only tokens that left early.
        filled: For each layer and row, how many leading positions hold their keys and values.

    Args:
        num_layers: L.
        rows: B.
        capacity: C, positions of a row: its prompt and all it may generate.
        key_heads: Heads of keys and values.
        head_size: D.
        like: A tensor [..., H] of the states' type, on the device.
    """

    def __init__(self, num_layers: int, rows: int, capacity: int, key_heads: int, head_size: int, like: Tensor) -> None:
        shape = (rows, key_heads, capacity, head_size)
        # Zeros: what is masked out of attention must be finite still.
        self.keys = [like.new_zeros(shape) for _ in range(num_layers)]
        self.values = [like.new_zeros(shape) for _ in range(num_layers)]
        self.shown = like.new_zeros((rows, capacity, like.shape[-1]))
        self.filled = [[0] * rows for _ in range(num_layers)]

    def owed(self, index: int, rows: Sequence[int], starts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Tokens before `starts` whose keys and values a layer lacks.

        Args:
            index: The layer's, from 0.
            rows: Some rows.
            starts: For each, the position from which the layer is about to run.

        Returns:
            Their rows and positions.
        """
        filled = self.filled[index]
        owing: list[int] = []
        positions: list[int] = []
        for row, start in zip(rows, starts, strict=True):
            if filled[row] < start:
                owing += [row] * (start - filled[row])
                positions += range(filled[row], start)
        return owing, positions

    def write(self, index: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep keys and values [N, key heads, D] of tokens at (rows, positions), each int64 [N]."""
        self.keys[index][rows, :, positions] = key
        self.values[index][rows, :, positions] = value

    def mark(self, index: int, rows: Sequence[int], ends: Sequence[int]) -> None:
        """Note that a layer holds all positions before `ends`."""
        for row, end in zip(rows, ends, strict=True):
            self.filled[index][row] = end

    def cut(self, row: int, length: int) -> None:
        """Forget what lies behind the first `length` positions of a row, whose keys and values must be there."""
        for filled in self.filled:
            filled[row] = length

    def show(self, rows: Tensor, positions: Tensor, states: Tensor) -> None:
        """Keep the states [N, H] at which tokens left; each row's filled lengths tell to whom they are owed."""
        self.shown[rows, positions] = states


def index_tensor(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Row or position numbers as int64, where the cache is."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)
