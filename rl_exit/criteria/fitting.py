"""Fitting the learned criteria on frozen exits: stored states, logits and labels, no backbone pass.

The exits should not have been trained on the instances of the fit: on their own training set they are right more often
than they will be, and every learned criterion inherits that optimism.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from rl_exit.criteria.base import Criterion
from rl_exit.criteria.head_losses import agreement_loss, certainty_loss, consistency_loss, gate_loss, ponder_loss
from rl_exit.criteria.heads import learned_head, make_head
from rl_exit.criteria.learned import LEARNED, Learned
from rl_exit.criteria.registry import criterion, load_criterion, save_criterion
from rl_exit.criteria.stored import StoredSplit
from rl_exit.errors import ConfigError, RunError, nearest

__all__ = ["FitSettings", "fit_criterion", "load_criterion", "save_criterion"]

_SAMPLE = 4096  # Instances that the scale of the states is taken from.


@dataclass(frozen=True)
class FitSettings:
    """How heads are fitted; AdamW with a learning rate that falls to 0 along a line.

    Attributes:
        epochs: Passes over the instances.
        batch_size: Instances per update.
        lr: Learning rate at the start, for states of unit scale.
        weight_decay: Of AdamW.
        max_instances: A sample of so many is used where there are more.
        ponder_weight: beta of PonderNet (``palbert``).
        ponder_prior: lambda_p of PonderNet.
        gate_price: c of JEI-DNN (``jei``): nats that running all L layers costs.
    """

    epochs: int = 10
    batch_size: int = 256
    lr: float = 3e-3
    weight_decay: float = 1e-2
    max_instances: int = 20000
    ponder_weight: float = 0.5
    ponder_prior: float = 0.1
    gate_price: float = 0.5


HeadLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def fit_criterion(
    word: str, split: StoredSplit, seed: int = 0, settings: FitSettings | None = None, **params: Any
) -> Criterion:
    """Fit a learned criterion; the same arguments give the same tensors.

    Args:
        word: One of ``LEARNED``.
        split: N instances; needs states, except for ``right_tool`` and ``beem``.
        seed: Decides first weights and batches; torch's generator is left as it was.
        settings: Of the fit; default :class:`FitSettings`.
        **params: Of the criterion, e.g. ``threshold=0.8``.

    Returns:
        The criterion, with what it learned in ``learned``.

    Raises:
        ConfigError: The criterion learns nothing, or a parameter is not accepted.
        RunError: The fit diverged.
        ValueError: No instances, or no states where they are needed.
    """
    if word not in LEARNED:
        raise ConfigError(f"criterion '{word}' is not fitted; accepted: {', '.join(LEARNED)}.{nearest(word, LEARNED)}")
    if split.num_instances == 0:
        raise ValueError("fit_criterion needs at least one instance")
    how = settings or FitSettings()
    if word == "right_tool":
        learned = _bare(word, split, {"temperature": fit_temperatures(split.logits[:, :-1], split.labels)}, seed)
    elif word == "beem":
        accuracy = split.correct[:, :-1].mean(axis=0, dtype=np.float64).astype(np.float32)
        learned = _bare(word, split, {"weight": torch.from_numpy(accuracy)}, seed)
        params.setdefault("threshold", 1.0)
    else:
        learned = _fit_head(word, split, seed, how)
    return criterion(word, learned=learned, **params)


def fit_temperatures(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Tensor:
    """Temperature of each exit that minimises its cross-entropy (Guo et al. 2017), by LBFGS on ln T.

    Args:
        logits: [N, L-1, C].
        labels: [N].

    Returns:
        [L-1], within 0.01..100 (where every answer is right, the best temperature is 0).
    """
    given = torch.from_numpy(np.array(logits)).double()
    target = torch.from_numpy(np.array(labels))
    found = []
    for layer in range(given.shape[1]):
        log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

        def closure(
            column: Tensor = given[:, layer], log_t: Tensor = log_t, optimiser: torch.optim.LBFGS = optimiser
        ) -> Tensor:
            optimiser.zero_grad()
            loss = F.cross_entropy(column / log_t.exp(), target)
            loss.backward()
            return loss

        optimiser.step(closure)
        found.append(log_t.detach().exp().clamp(0.01, 100.0))
    return torch.stack(found).float()


def _fit_head(word: str, split: StoredSplit, seed: int, how: FitSettings) -> Learned:
    rng = np.random.default_rng(seed)
    rows = rng.permutation(split.num_instances)[: how.max_instances]
    mean, scale = _scale(split.states_of(np.sort(rows[:_SAMPLE])))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = make_head(word, split.num_layers, len(mean), split.num_classes)
    loss_of = _loss(word, how)
    optimiser = torch.optim.AdamW(head.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    updates = how.epochs * -(-len(rows) // how.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=max(updates, 1))
    history = []
    for _ in range(how.epochs):
        order, total = rng.permutation(rows), 0.0
        for start in range(0, len(order), how.batch_size):
            batch = np.sort(order[start : start + how.batch_size])
            states = (split.states_of(batch) - mean) / scale
            logits, losses = (torch.from_numpy(np.array(a[batch])) for a in (split.logits, split.losses))
            labels = torch.from_numpy(np.array(split.labels[batch]))
            loss = loss_of(head(states, logits), logits, losses, labels)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        history.append(total / len(order))
    if not np.isfinite(history).all():
        raise RunError(f"fitting criterion '{word}' diverged (loss {history}); are the stored states finite?")
    head.absorb(mean, scale)
    notes: dict[str, object] = {"fitted_on": len(rows), "seed": seed, "loss_by_epoch": history}
    return learned_head(word, head, split.num_layers, len(mean), split.num_classes, notes=notes)


def _loss(word: str, how: FitSettings) -> HeadLoss:
    """Loss of a head: (log-odds [B, L-1], logits [B, L, C], CE [B, L], labels [B]) -> scalar."""
    losses: dict[str, HeadLoss] = {
        "lte": lambda odds, logits, ce, labels: certainty_loss(odds, logits, labels),
        "calm_meta": lambda odds, logits, ce, labels: consistency_loss(odds, logits),
        "cat": lambda odds, logits, ce, labels: agreement_loss(odds, logits),
        "palbert": lambda odds, logits, ce, labels: ponder_loss(odds, ce, how.ponder_weight, how.ponder_prior),
        "jei": lambda odds, logits, ce, labels: gate_loss(odds, ce, how.gate_price),
    }
    return losses[word]


def _scale(states: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [H] over instances and layers; a component that never changes has scale 1."""
    flat = states.reshape(-1, states.shape[-1])
    mean, scale = flat.mean(0), flat.std(0, correction=0)
    return mean, torch.where(scale > 1e-6, scale, 1.0)


def _bare(word: str, split: StoredSplit, tensors: dict[str, Tensor], seed: int) -> Learned:
    """Learned without a head; the width of the states does not matter and is 0."""
    notes = {"fitted_on": split.num_instances, "seed": seed}
    return Learned(word, split.num_layers, 0, split.num_classes, tensors, notes=notes)
