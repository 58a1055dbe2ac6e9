"""Exit policy (Eq. 5): one two-layer MLP per layer 1..L-1 on the pooled state that the exit classifier reads.

Pure torch, so that sampling workers need nothing else. The weights of all layers are stacked, ``[L-1, H, W]``: one
optimizer entry, one tensor to ship to a worker, and one batched product for whole blocks of states.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

States = Tensor | npt.NDArray[np.floating]


class PolicyHeads(nn.Module):
    """Log-odds of Exit at layers 1..L-1; no head at L, where exit is forced.

    Head l is ``Linear(H, W) -> tanh -> Linear(W, 1)``. States of pretrained encoders differ in scale by orders of
    magnitude between families (a mean-pooled MiniLM state has components near 0.3, a pre-norm decoder's can exceed
    30), therefore the input is divided by its root mean square: no parameters, and the same initialisation is sound for
    any backbone. ``tanh`` keeps the log-odds bounded by the output weights, so a single outlier cannot saturate a head.

    Initialisation: first weights ``N(0, 1/H)`` (unit pre-activations for RMS-1 input), output weights ``N(0, 0.01/W)``,
    so that pi depends on the state only weakly, and output biases ``logit(1 / (L - l + 1))``. This hazard makes the
    exit layer uniform over 1..L: every layer is tried equally often by the first trajectories. Randomness comes from
    torch's default generator.

    Shared heads have one pair of weight matrices for all layers, with biases of each layer's own: where what is read
    means the same at every layer (:mod:`rl_exit.models.answers`), every layer then learns from all of them.

    Args:
        num_layers: L >= 2.
        hidden_size: H.
        width: W, hidden width of each MLP.
        shared: Whether all layers share their weight matrices.
    """

    def __init__(self, num_layers: int, hidden_size: int, width: int, shared: bool = False) -> None:
        super().__init__()
        if num_layers < 2 or hidden_size < 1 or width < 1:
            raise ValueError(
                f"PolicyHeads: num_layers={num_layers}, hidden_size={hidden_size}, width={width}; "
                "accepted: at least 2, 1, 1"
            )
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.width = width
        self.shared = shared
        heads = num_layers - 1
        sets = 1 if shared else heads
        self.weight_in = nn.Parameter(torch.empty(sets, hidden_size, width))
        self.bias_in = nn.Parameter(torch.empty(heads, width))
        self.weight_out = nn.Parameter(torch.empty(sets, width))
        self.bias_out = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's default generator."""
        self.weight_in.normal_(0.0, 1.0 / math.sqrt(self.hidden_size))
        self.bias_in.zero_()
        self.weight_out.normal_(0.0, 0.1 / math.sqrt(self.width))
        # logit(1/(L-l+1)) = -ln(L-l): hazards 1/L, 1/(L-1), ..., 1/2 give every exit layer the probability 1/L.
        remaining = torch.arange(self.num_layers - 1, 0, -1, dtype=self.bias_out.dtype, device=self.bias_out.device)
        self.bias_out.copy_(-remaining.log())

    def forward(self, states: States) -> Tensor:
        """Exit logits of all layers from stored states.

        Args:
            states: [B, L, H] or [B, L-1, H]; a tensor, or an array (a read-only one, as a memory map gives, is fine: it
                is never written to). Layer L is not read.

        Returns:
            [B, L-1] float32 (the parameters' dtype); ``pi = sigmoid``.

        Raises:
            ValueError: The shape does not fit.
        """
        block = self._tensor(states)
        heads = self.num_layers - 1
        if block.dim() != 3 or block.shape[1] not in (heads, self.num_layers) or block.shape[2] != self.hidden_size:
            raise ValueError(
                f"PolicyHeads: states of shape {tuple(block.shape)}; "
                f"accepted: [B, {self.num_layers} or {heads}, {self.hidden_size}]"
            )
        # Layer first, as a view: the batched product reads it in place (measured faster than one product per layer).
        inputs = block[:, :heads].transpose(0, 1)
        # The RMS division commutes with the product, so it is applied to width W and not to width H.
        weight_in, weight_out = (
            weight.expand(heads, *weight.shape[1:]) for weight in (self.weight_in, self.weight_out)
        )
        scaled = torch.bmm(inputs, weight_in) * inverse_rms(inputs).unsqueeze(-1)
        hidden = torch.tanh(scaled + self.bias_in.unsqueeze(1))
        return (torch.bmm(hidden, weight_out.unsqueeze(-1)).squeeze(-1) + self.bias_out.unsqueeze(1)).t()

    def at(self, layer: int, state: States) -> Tensor:
        """Exit logit of one layer.

        Args:
            layer: 1..L-1.
            state: [B, H].

        Returns:
            [B].

        Raises:
            ValueError: The layer is outside 1..L-1 (at L exit is forced).
        """
        if not 1 <= layer < self.num_layers:
            raise ValueError(f"PolicyHeads: layer {layer}; accepted: 1..{self.num_layers - 1}")
        inputs = self._tensor(state)
        index = layer - 1
        which = 0 if self.shared else index
        hidden = torch.tanh(inputs @ self.weight_in[which] * inverse_rms(inputs).unsqueeze(-1) + self.bias_in[index])
        return hidden @ self.weight_out[which] + self.bias_out[index]

    def _tensor(self, states: States) -> Tensor:
        if isinstance(states, np.ndarray):
            states = _from_numpy(states)
        return states.to(device=self.weight_in.device, dtype=self.weight_in.dtype)


def inverse_rms(states: Tensor) -> Tensor:
    """1 / root mean square over the last dimension, [...]; a zero state gives a finite value."""
    norm = torch.linalg.vector_norm(states, dim=-1)
    return math.sqrt(states.shape[-1]) / norm.clamp_min(1e-6)


def _from_numpy(array: npt.NDArray[np.floating]) -> Tensor:
    if not array.flags.writeable:
        # torch warns about read-only memory; a view through the buffer's address is safe because nothing writes to it,
        # but torch offers none without the warning, so the block (already gathered, a few MB) is copied.
        array = array.copy()
    return torch.from_numpy(array)
