"""Exits of a decoder: each a small norm (and, if asked, a low-rank adapter) before the model's own head.

The head over the vocabulary is the largest matrix of a small decoder, so exits share it: what an exit adds is a norm,
and ``2 r H`` weights where it has an adapter of rank r. Pure torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rl_exit.errors import ModelError


def exit_layers(num_layers: int, every: int) -> tuple[int, ...]:
    """Layers with an exit: every k-th, and always the last.

    Args:
        num_layers: L.
        every: k, from 1 (an exit at every layer) to L - 1, so that there are two exits.

    Returns:
        Increasing layer numbers in 1..L; the last is L.

    Raises:
        ModelError: k is out of range.
    """
    if isinstance(every, bool) or not isinstance(every, int) or not 1 <= every < num_layers:
        raise ModelError(f"exit_every = {every!r}; accepted for {num_layers} layers: 1 to {num_layers - 1}")
    found = list(range(every, num_layers + 1, every))
    return tuple(found if found[-1] == num_layers else [*found, num_layers])


class TokenExits(nn.Module):
    """What stands between a layer's hidden state and the shared head, for exits 1..E-1; exit E uses the final norm.

    Exit e is ``s + (s A_e) B_e`` with ``s = norm_e(h)``; without adapters ``s`` alone. Norms begin as copies of the
    model's final norm and B as zero, so that at first every exit reads its layer as the model reads its last
    (nostalgebraist's logit lens). A is drawn from ``N(0, 1/H)`` by torch's default generator.

    Args:
        norm: The model's final norm; copied, not kept.
        num_exits: E >= 2.
        hidden_size: H.
        rank: r of the adapters; 0: none.
    """

    def __init__(self, norm: nn.Module, num_exits: int, hidden_size: int, rank: int = 0) -> None:
        super().__init__()
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= hidden_size:
            raise ModelError(f"exit_rank = {rank!r}; accepted: a whole number from 0 (no adapter) to {hidden_size}")
        self.num_exits = num_exits
        self.rank = rank
        self.norms = nn.ModuleList(copy.deepcopy(norm) for _ in range(num_exits - 1))
        if rank:
            drawn = torch.empty(num_exits - 1, hidden_size, rank).normal_(0.0, 1.0 / math.sqrt(hidden_size))
            self.down = nn.Parameter(drawn)
            self.up = nn.Parameter(torch.zeros(num_exits - 1, rank, hidden_size))

    def at(self, number: int, hidden: Tensor) -> Tensor:
        """What exit ``number`` (1..E-1) gives to head and policy: [..., H] from a layer's output [..., H]."""
        state = self.norms[number - 1](hidden)
        if not self.rank:
            return state
        return state + (state @ self.down[number - 1]) @ self.up[number - 1]


def leaving_exits(exit_of_layer: Sequence[int], exit_layer: Tensor) -> Tensor:
    """Numbers of exits from the layers at which they stand.

    Args:
        exit_of_layer: Of each layer 0..L the number of its exit; 0 where there is none.
        exit_layer: Layers, any shape.

    Raises:
        ValueError: A layer without exit.
    """
    table = torch.tensor(exit_of_layer, device=exit_layer.device)
    inside = exit_layer.clamp(0, len(exit_of_layer) - 1)
    numbers = table[inside]
    if bool((numbers == 0).any()) or not bool((inside == exit_layer).all()):
        layers = [layer for layer, number in enumerate(exit_of_layer) if number]
        raise ValueError(f"exit_layer holds layers without exit; exits stand at {layers}")
    return numbers
