"""What the policy answers when an instance leaves: its own word, not the exit's.

The exits are trained together with the backbone, by a sum in which the lowest weigh least (Eq. 2), and stop where the
backbone stops: below, much of what their states tell is left unread. Once the backbone is frozen, the policy's own
heads read it: a small correction on the exit's logits,

    a_l = scale_l z_l + GELU(h_l U_l + u_l) V_l + v_l    (1 <= l < L),    a_L = z_L

fitted by cross-entropy on the instances that the policy learns on. The last exit, where leaving is forced, answers as
it does without a policy: never leaving early is full depth itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl_exit.progress import Progress

Answer = Literal["exit", "own"]
ANSWERS: tuple[Answer, ...] = ("exit", "own")
StatesOf = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.floating]]

WIDTH = 128
FOLDS = 4
EPOCHS = 8
BATCH = 128
LR = 2e-3
WEIGHT_DECAY = 0.3
DROPOUT = 0.2
_BLOCK = 4096
FITTING_PASSES = (FOLDS + 1) * EPOCHS


class AnswerHeads(nn.Module):
    """The heads above; fresh ones answer what the exits do. Their weights are buffers: no objective trains them along.

    Args:
        num_layers: L >= 2.
        hidden_size: H.
        num_classes: C >= 2.
        width: W.
    """

    scale: Tensor
    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor

    def __init__(self, num_layers: int, hidden_size: int, num_classes: int, width: int = WIDTH) -> None:
        super().__init__()
        if num_layers < 2 or hidden_size < 1 or num_classes < 2 or width < 1:
            raise ValueError(
                f"AnswerHeads: num_layers={num_layers}, hidden_size={hidden_size}, num_classes={num_classes}, "
                f"width={width}; accepted: at least 2, 1, 2, 1"
            )
        self.num_layers = num_layers
        heads = num_layers - 1
        self.register_buffer("scale", torch.ones(heads))
        self.register_buffer("weight_in", torch.zeros(heads, hidden_size, width))
        self.register_buffer("bias_in", torch.zeros(heads, width))
        self.register_buffer("weight_out", torch.zeros(heads, width, num_classes))
        self.register_buffer("bias_out", torch.zeros(heads, num_classes))

    def forward(self, states: Tensor, logits: Tensor) -> Tensor:
        """Answers of every layer.

        Args:
            states: [B, L, H], pooled.
            logits: [B, L, C], of the exits.

        Returns:
            float32 [B, L, C], logits of the answers.
        """
        layers = range(1, self.num_layers + 1)
        return torch.stack([self.at(layer, states[:, layer - 1], logits[:, layer - 1]) for layer in layers], 1)

    def at(self, layer: int, state: Tensor, logits: Tensor) -> Tensor:
        """Answer of one layer.

        Args:
            layer: l, 1..L.
            state: [B, H].
            logits: [B, C] of exit l.

        Returns:
            float32 [B, C].
        """
        z = logits.float()
        if layer == self.num_layers:
            return z
        i = layer - 1
        hidden = F.gelu(state.float() @ self.weight_in[i] + self.bias_in[i])
        return self.scale[i] * z + hidden @ self.weight_out[i] + self.bias_out[i]


class FittedAnswers(NamedTuple):
    """Outcome of a fit.

    Attributes:
        heads: Fitted on all instances.
        answers: float32 [N, L, C], what heads fitted on the other folds answer: as on new instances.
        better: [L-1], whether the heads of a layer are better than its exit there; the others are left as the exit.
    """

    heads: AnswerHeads
    answers: npt.NDArray[np.float32]
    better: tuple[bool, ...]


def fit_answer_heads(
    states: StatesOf,
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    hidden_size: int,
    seed: int,
    epochs: int = EPOCHS,
    width: int = WIDTH,
    progress: Progress | None = None,
) -> FittedAnswers:
    """Fit heads on all instances, and, by cross-fitting, what they would answer were each instance new.

    A policy must not learn from answers of heads that know the instance: it would leave too early.

    Args:
        states: Gives the states [n, L, H] of rows [n]; random access, a batch at a time.
        logits: [N, L, C] of the exits.
        labels: [N].
        hidden_size: H.
        seed: Decides folds, order, dropout and initial weights.
        epochs: Passes in each fit.
        width: W.
        progress: Told the passes done, of ``(FOLDS + 1) * epochs`` (:data:`FITTING_PASSES`).

    Returns:
        The heads; with fewer instances than folds, fresh ones.
    """
    count, layers, _ = logits.shape
    every = np.arange(count)
    answers = np.array(logits, dtype=np.float32)
    fresh = AnswerHeads(layers, hidden_size, logits.shape[2], width)
    if count < 2 * FOLDS:
        return FittedAnswers(fresh, answers, (False,) * (layers - 1))
    work = _Fit(states, torch.tensor(answers), torch.tensor(labels), hidden_size, width, epochs, progress)
    order = np.random.default_rng(seed).permutation(count)
    for fold in range(FOLDS):
        out = np.sort(order[fold::FOLDS])
        answers[out] = work.answers(work.fit(np.setdiff1d(every, out), seed + 1 + fold), out)
    better = tuple(_loss(answers[:, layer], labels) < _loss(logits[:, layer], labels) for layer in range(layers - 1))
    heads = work.fit(every, seed)
    for layer, keep in enumerate(better):
        if not keep:
            answers[:, layer] = logits[:, layer]
            for name, value in heads.named_buffers():
                value[layer] = getattr(fresh, name)[layer]
    return FittedAnswers(heads, answers, better)


class _Fit:
    """Fits on parts of the same instances."""

    def __init__(
        self,
        states: StatesOf,
        logits: Tensor,
        labels: Tensor,
        hidden_size: int,
        width: int,
        epochs: int,
        progress: Progress | None,
    ) -> None:
        self.progress, self.passes = progress, 0
        self.states = states
        self.logits = logits
        self.labels = labels.long()
        self.hidden_size = hidden_size
        self.width = width
        self.epochs = epochs

    def fit(self, rows: npt.NDArray[np.int64], seed: int) -> AnswerHeads:
        """Heads of some instances."""
        layers, classes = self.logits.shape[1:]
        mean, spread = self._moments(rows)
        generator = torch.Generator().manual_seed(seed)
        shape = (layers - 1, self.hidden_size, self.width)
        weight_in = torch.randn(shape, generator=generator) / self.hidden_size**0.5
        free = {
            "weight_in": weight_in.requires_grad_(),
            "bias_in": torch.zeros(layers - 1, self.width, requires_grad=True),
            "weight_out": torch.zeros(layers - 1, self.width, classes, requires_grad=True),
            "bias_out": torch.zeros(layers - 1, classes, requires_grad=True),
        }
        scale = torch.ones(layers - 1, requires_grad=True)
        groups = [
            {"params": list(free.values()), "weight_decay": WEIGHT_DECAY},
            {"params": [scale], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=LR)
        updates, done = self.epochs * -(-len(rows) // BATCH), 0
        for _ in range(self.epochs):
            order = torch.randperm(len(rows), generator=generator).numpy()
            for start in range(0, len(rows), BATCH):
                for group in optimizer.param_groups:
                    group["lr"] = LR * (1.0 - done / updates)
                some = np.sort(rows[order[start : start + BATCH]])
                given = (self._read(some) - mean) / spread
                kept = [
                    torch.rand(size, generator=generator) >= DROPOUT
                    for size in (given.shape, (*given.shape[:2], self.width))
                ]
                hidden = torch.bmm(_dropped(given, kept[0]).transpose(0, 1), free["weight_in"])
                hidden = _dropped(F.gelu(hidden + free["bias_in"][:, None]), kept[1].transpose(0, 1))
                said = torch.bmm(hidden, free["weight_out"]) + free["bias_out"][:, None]
                said = said + scale[:, None, None] * self.logits[some, :-1].transpose(0, 1)
                # The sum over layers: each has weights of its own.
                loss = F.cross_entropy(said.reshape(-1, classes), self.labels[some].repeat(layers - 1)) * (layers - 1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
            self.passes += 1
            if self.progress is not None:
                self.progress.update(self.passes)
        heads = AnswerHeads(layers, self.hidden_size, classes, self.width)
        # The standardisation goes into the first weights.
        with torch.no_grad():
            inner = free["weight_in"] / spread[..., None]
            found = free | {"scale": scale, "weight_in": inner}
            found["bias_in"] = free["bias_in"] - torch.bmm(mean[:, None], inner)[:, 0]
            for name, value in found.items():
                getattr(heads, name).copy_(value)
        return heads

    @torch.no_grad()
    def answers(self, heads: AnswerHeads, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """What heads answer for some instances, [n, L, C]."""
        parts = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
        return np.concatenate([heads(_tensor(self.states(part)), self.logits[part]).numpy() for part in parts])

    def _read(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """States of layers 1..L-1, [n, L-1, H]."""
        return _tensor(self.states(rows))[:, :-1]

    def _moments(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the states of every layer, [L-1, H] each."""
        total = squares = torch.zeros(())
        for start in range(0, len(rows), _BLOCK):
            part = self._read(rows[start : start + _BLOCK]).double()
            total, squares = total + part.sum(0), squares + part.square().sum(0)
        mean = total / len(rows)
        spread = (squares / len(rows) - mean.square()).clamp_min(0.0).sqrt()
        return mean.float(), spread.float() + 1e-6


def _dropped(values: Tensor, kept: Tensor) -> Tensor:
    return values * kept / (1.0 - DROPOUT)


def _tensor(states: npt.NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.array(states, dtype=np.float32))


def _loss(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    return float(F.cross_entropy(torch.tensor(logits), torch.tensor(labels).long()))
