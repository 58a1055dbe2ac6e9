"""Exit classifiers: one linear layer on the pooled state of each layer 1..L (Eq. 1). Pure torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ExitHeads(nn.Module):
    """Exit l is ``dropout -> Linear(H, C)`` on the pooled state h[i, l]; weights of all exits are stacked, [L, H, C].

    Initialised as ``nn.Linear`` does (uniform within ``1/sqrt(H)``), from torch's default generator.

    Args:
        num_layers: L >= 1.
        hidden_size: H.
        num_classes: C >= 2.
        dropout: In [0, 1), on the state, in training mode only.
    """

    def __init__(self, num_layers: int, hidden_size: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        if num_layers < 1 or hidden_size < 1 or num_classes < 2 or not 0.0 <= dropout <= 1.0:
            raise ValueError(
                f"ExitHeads: num_layers={num_layers}, hidden_size={hidden_size}, num_classes={num_classes}, "
                f"dropout={dropout}; accepted: at least 1, 1, 2, and dropout within 0..1"
            )
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.dropout = nn.Dropout(dropout)
        self.weight = nn.Parameter(torch.empty(num_layers, hidden_size, num_classes))
        self.bias = nn.Parameter(torch.empty(num_layers, num_classes))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's default generator."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        self.weight.uniform_(-bound, bound)
        self.bias.uniform_(-bound, bound)

    def forward(self, states: Tensor) -> Tensor:
        """Logits of every exit.

        Args:
            states: [B, L, H].

        Returns:
            [B, L, C].

        Raises:
            ValueError: The shape does not fit.
        """
        if states.dim() != 3 or states.shape[1:] != (self.num_layers, self.hidden_size):
            raise ValueError(
                f"ExitHeads: states of shape {tuple(states.shape)}; "
                f"accepted: [B, {self.num_layers}, {self.hidden_size}]"
            )
        inputs = self.dropout(states.to(self.weight.dtype)).transpose(0, 1)
        return torch.baddbmm(self.bias.unsqueeze(1), inputs, self.weight).transpose(0, 1)

    def at(self, layer: int, state: Tensor) -> Tensor:
        """Logits of one exit.

        Args:
            layer: 1..L.
            state: [B, H].

        Returns:
            [B, C].

        Raises:
            ValueError: The layer is outside 1..L.
        """
        if not 1 <= layer <= self.num_layers:
            raise ValueError(f"ExitHeads: layer {layer}; accepted: 1..{self.num_layers}")
        inputs = state.to(self.weight.dtype)
        if self.training:
            inputs = self.dropout(inputs)
        return torch.addmm(self.bias[layer - 1], inputs, self.weight[layer - 1])


def pool(hidden: Tensor, attention_mask: Tensor, how: str) -> Tensor:
    """Pooled state of a layer: what its exit classifier and its policy head read.

    Args:
        hidden: [B, T, H].
        attention_mask: [B, T], 1 at real tokens, which are on the left.
        how: ``"cls"``: first token; ``"mean"``: mean of the real tokens; ``"last"``: last real token.

    Returns:
        [B, H].

    Raises:
        ValueError: Unknown pooling.
    """
    if how == "cls":
        return hidden[:, 0]
    count = attention_mask.sum(1)
    if how == "mean":
        # A row without tokens gives 0, not a division by 0.
        weight = attention_mask / count.clamp_min(1).unsqueeze(1)
        return torch.bmm(weight.to(hidden.dtype).unsqueeze(1), hidden).squeeze(1)
    if how == "last":
        last = (count - 1).clamp_min(0)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    raise ValueError(f"pooling '{how}' is unknown; accepted: cls, mean, last")
