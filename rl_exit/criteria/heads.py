"""Heads of the learned criteria: small modules on states and logits, trained with the model or on frozen exits.

Every head answers for all layers 1..L-1 at once (``forward``, for training) and for one layer (``at``, for the
engine); both give log-odds, so that losses are taken with logits. ``make_head`` makes one by the criterion's word, its
``state_dict`` is what :mod:`rl_exit.criteria.learned` keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rl_exit.criteria.learned import Learned
from rl_exit.errors import RunError

POOLED = 32
GATE_WIDTH = 32
HALTING_WIDTH = 64


class Head(nn.Module):
    """Base: what all heads offer."""

    def forward(self, states: Tensor, logits: Tensor) -> Tensor:
        """Log-odds at layers 1..L-1.

        Args:
            states: [B, L, H].
            logits: [B, L, C], of the exits; no gradient flows into them.

        Returns:
            [B, L-1].
        """
        given, seen = logits.detach().float(), states.float()
        past: list[Tensor] = []
        columns = []
        for layer in range(1, states.shape[1]):
            previous = seen[:, layer - 2] if layer > 1 else None
            columns.append(self.at(layer, seen[:, layer - 1], given[:, layer - 1], previous, past))
            past.append(given[:, layer - 1])
        return torch.stack(columns, 1)

    def at(self, layer: int, state: Tensor, logits: Tensor, previous: Tensor | None, past: Sequence[Tensor]) -> Tensor:
        """Log-odds at one layer.

        Args:
            layer: 1..L-1.
            state: [B, H] of this layer.
            logits: [B, C] of this layer's exit.
            previous: State [B, H] of the layer before, None at layer 1.
            past: Logits [B, C] of the exits 1..layer-1.

        Returns:
            [B].
        """
        raise NotImplementedError

    def absorb(self, mean: Tensor, scale: Tensor) -> None:
        """Make the head, trained on ``(state - mean) / scale``, give the same answers on the states themselves.

        Args:
            mean: [H].
            scale: [H], positive.
        """
        raise NotImplementedError


class CertaintyHead(Head):
    """One linear layer shared by all exits: BERxiT's learning-to-exit module (Xin et al. 2021) and CALM's early-exit
    classifier (Schuster et al. 2022), which differ in what they are trained to predict.

    Args:
        hidden_size: H.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)

    def at(self, layer: int, state: Tensor, logits: Tensor, previous: Tensor | None, past: Sequence[Tensor]) -> Tensor:
        """See :meth:`Head.at`; reads the state alone."""
        return self.linear(state).squeeze(-1)

    def absorb(self, mean: Tensor, scale: Tensor) -> None:
        """See :meth:`Head.absorb`."""
        _absorb(self.linear, mean, scale)


class AgreementHead(Head):
    """CAT's meta classifier (Schuster et al. 2021), shared by all exits: will the last layer say the same?

    Reads: one-hot argmax [C], pooled state (32, tanh), largest probability, margin to the second, the probabilities
    that layers l-1, ..., 2 gave to the class predicted now (0 where there is none; layer 1 is left out, as published),
    and l/L.

    Args:
        num_layers: L.
        hidden_size: H.
        num_classes: C.
    """

    def __init__(self, num_layers: int, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.history = max(num_layers - 3, 0)
        self.pool = nn.Linear(hidden_size, POOLED)
        self.hidden = nn.Linear(num_classes + POOLED + 3 + self.history, POOLED)
        self.out = nn.Linear(POOLED, 1)

    def at(self, layer: int, state: Tensor, logits: Tensor, previous: Tensor | None, past: Sequence[Tensor]) -> Tensor:
        """See :meth:`Head.at`; reads the state, the logits and the past logits."""
        p = logits.softmax(-1)
        best = p.topk(2, dim=-1)
        chosen = best.indices[:, :1]
        earlier = [one.softmax(-1).gather(1, chosen) for one in reversed(past[1:])]
        history = torch.cat(earlier, 1) if earlier else p.new_zeros((len(p), 0))
        features = [
            torch.zeros_like(p).scatter(1, chosen, 1.0),
            torch.tanh(self.pool(state)),
            best.values[:, :1],
            best.values[:, :1] - best.values[:, 1:],
            nn.functional.pad(history, (0, self.history - history.shape[1])),
            p.new_full((len(p), 1), layer / self.num_layers),
        ]
        return self.out(torch.tanh(self.hidden(torch.cat(features, 1)))).squeeze(-1)

    def absorb(self, mean: Tensor, scale: Tensor) -> None:
        """See :meth:`Head.absorb`."""
        _absorb(self.pool, mean, scale)


class HaltingHead(Head):
    """PALBERT's lambda layer (Balagansky & Gavrilov 2022), shared by all exits: ``MLP[h_l; h_{l-1}]``, h_0 = 0.

    Published with an embedding of the layer's number added to its input; here each layer has a bias in the first
    linear layer, of which that embedding is a special case. Starts at lambda = 0.1, the prior's.

    Args:
        num_layers: L.
        hidden_size: H.
        width: W, of the hidden layer (tanh).
    """

    def __init__(self, num_layers: int, hidden_size: int, width: int = HALTING_WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(2 * hidden_size, width)
        self.layer = nn.Parameter(torch.zeros(num_layers - 1, width))
        self.out = nn.Linear(width, 1)
        nn.init.constant_(self.out.bias, math.log(0.1 / 0.9))

    def at(self, layer: int, state: Tensor, logits: Tensor, previous: Tensor | None, past: Sequence[Tensor]) -> Tensor:
        """See :meth:`Head.at`; reads this state and the one before. The log-odds of lambda."""
        before = torch.zeros_like(state) if previous is None else previous
        hidden = torch.tanh(self.first(torch.cat([state, before], -1)) + self.layer[layer - 1])
        return self.out(hidden).squeeze(-1)

    @torch.no_grad()
    def absorb(self, mean: Tensor, scale: Tensor) -> None:
        """See :meth:`Head.absorb`; h_0 = 0 is not scaled, so layer 1 is given back what the bias takes for it."""
        _absorb(self.first, torch.cat([mean, mean]), torch.cat([scale, scale]))
        self.layer[0] += self.first.weight[:, len(mean) :] @ mean


class GateHeads(Head):
    """JEI-DNN's gates (Regol, Chataoui & Coates 2024), one per layer: ``Linear(H + 4, 32) -> ReLU -> Linear(32, 1)``.

    Reads the state and four measures of uncertainty (:func:`uncertainty`). The published gate reads random projections
    of the state instead, which its first linear layer contains as a special case.

    Args:
        num_layers: L.
        hidden_size: H.
    """

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(hidden_size + 4, GATE_WIDTH) for _ in range(num_layers - 1))
        self.out = nn.ModuleList(nn.Linear(GATE_WIDTH, 1) for _ in range(num_layers - 1))

    def at(self, layer: int, state: Tensor, logits: Tensor, previous: Tensor | None, past: Sequence[Tensor]) -> Tensor:
        """See :meth:`Head.at`; reads the state and the logits."""
        hidden = torch.relu(self.first[layer - 1](torch.cat([state, uncertainty(logits)], -1)))
        return self.out[layer - 1](hidden).squeeze(-1)

    def absorb(self, mean: Tensor, scale: Tensor) -> None:
        """See :meth:`Head.absorb`."""
        for linear in self.first:
            assert isinstance(linear, nn.Linear)
            _absorb(linear, torch.cat([mean, mean.new_zeros(4)]), torch.cat([scale, scale.new_ones(4)]))


@torch.no_grad()
def _absorb(linear: nn.Linear, mean: Tensor, scale: Tensor) -> None:
    linear.weight.div_(scale)
    linear.bias.sub_(linear.weight @ mean)


def uncertainty(logits: Tensor) -> Tensor:
    """Largest probability, entropy (nats), margin, and the entropy of the squared, renormalised probabilities.

    Args:
        logits: [..., C].

    Returns:
        [..., 4].
    """
    p = logits.softmax(-1)
    top = p.topk(2, dim=-1).values
    # softmax(2 z) is p^2 renormalised.
    return torch.stack([top[..., 0], entropy(logits), top[..., 0] - top[..., 1], entropy(2.0 * logits)], -1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of ``softmax(logits)``, nats; a probability of 0 adds nothing. [..., C] -> [...]."""
    log_p = logits.log_softmax(-1)
    # exp(-inf) * -inf would be NaN.
    return -(log_p.exp() * log_p.clamp_min(-1e30)).sum(-1)


def make_head(word: str, num_layers: int, hidden_size: int, num_classes: int) -> Head:
    """A fresh head of a learned criterion, drawn from torch's default generator.

    Args:
        word: ``lte``, ``calm_meta``, ``cat``, ``palbert`` or ``jei``.
        num_layers: L >= 2.
        hidden_size: H.
        num_classes: C >= 2.

    Raises:
        ValueError: No criterion with a head.
    """
    if word in ("lte", "calm_meta"):
        return CertaintyHead(hidden_size)
    if word == "cat":
        return AgreementHead(num_layers, hidden_size, num_classes)
    if word == "palbert":
        return HaltingHead(num_layers, hidden_size)
    if word == "jei":
        return GateHeads(num_layers, hidden_size)
    raise ValueError(f"criterion '{word}' has no head; accepted: lte, calm_meta, cat, palbert, jei")


def head_of(learned: Learned) -> Head:
    """The head that learned tensors belong to, in evaluation mode, without gradients; torch's generator is untouched.

    Raises:
        RunError: The tensors are not those of that head.
    """
    with torch.random.fork_rng(devices=[]):
        head = make_head(learned.word, learned.num_layers, learned.hidden_size, learned.num_classes)
    try:
        head.load_state_dict(dict(learned.tensors))
    except RuntimeError as error:
        raise RunError(f"criterion '{learned.word}': the tensors do not fit: {error}") from None
    return head.eval().requires_grad_(False)


def learned_head(
    word: str,
    head: Head,
    num_layers: int,
    hidden_size: int,
    num_classes: int,
    params: dict[str, object] | None = None,
    notes: dict[str, object] | None = None,
) -> Learned:
    """What a trained head has learned, ready for :func:`rl_exit.criteria.learned.write_learned`."""
    return Learned(word, num_layers, hidden_size, num_classes, head.state_dict(), params or {}, notes or {})
