"""What the heads of the learned criteria are trained for; the same on frozen exits and together with the model.

``log_odds`` [B, L-1] are a head's answers (:class:`rl_exit.criteria.heads.Head`), at layers 1..L-1. Every loss is a
scalar, the mean over the batch; targets carry no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rl_exit.method.distribution import log_exit_distribution


def certainty_loss(log_odds: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """BERxiT's learning to exit: mean squared error of the certainty against "this exit is right".

    Args:
        log_odds: [B, L-1].
        logits: [B, L, C].
        labels: [B].
    """
    right = logits[:, :-1].argmax(-1) == labels[:, None]
    return F.mse_loss(log_odds.sigmoid(), right.to(log_odds.dtype))


def consistency_loss(log_odds: Tensor, logits: Tensor) -> Tensor:
    """CALM's early-exit classifier: cross-entropy (nats) against "this exit says what the last one says".

    Args:
        log_odds: [B, L-1].
        logits: [B, L, C].
    """
    return F.binary_cross_entropy_with_logits(log_odds, agreement(logits).to(log_odds.dtype))


def agreement_loss(log_odds: Tensor, logits: Tensor) -> Tensor:
    """CAT's meta classifier: as :func:`consistency_loss`, but agreeing and disagreeing rows of a layer weigh the same.

    The mean over the layers of the class-balanced cross-entropy (nats); a layer where all rows are of one kind counts
    their plain mean.

    Args:
        log_odds: [B, L-1].
        logits: [B, L, C].
    """
    same = agreement(logits)
    losses = F.binary_cross_entropy_with_logits(log_odds, same.to(log_odds.dtype), reduction="none")
    groups = torch.stack([same, ~same], 0)
    count = groups.sum(1)
    means = (losses * groups).sum(1) / count.clamp_min(1)
    return (means.sum(0) / (count > 0).sum(0)).mean()


def ponder_loss(log_odds: Tensor, losses: Tensor, weight: float = 0.5, prior: float = 0.1) -> Tensor:
    """PonderNet's loss as PALBERT uses it: ``sum_l P(l) CE_l + weight KL(geometric(prior) || P)``, nats.

    ``P(l) = lambda_l prod_{j<l} (1 - lambda_j)`` with ``lambda_L = 1``; the prior's last entry takes the rest too.

    Args:
        log_odds: [B, L-1], of lambda.
        losses: CE [B, L]; a gradient flows into them if they carry one.
        weight: beta; 0 or more.
        prior: lambda_p in (0, 1).
    """
    log_p = log_exit_distribution(log_odds)
    target = torch.full((1, log_odds.shape[1]), prior, dtype=log_p.dtype, device=log_p.device).logit()
    log_prior = log_exit_distribution(target)
    apart = (log_prior.exp() * (log_prior - log_p)).sum(-1)
    return ((log_p.exp() * losses).sum(-1) + weight * apart).mean()


def gate_loss(log_odds: Tensor, losses: Tensor, price: float) -> Tensor:
    """JEI-DNN's gates: cross-entropy (nats) against 1 from the cheapest exit on, 0 before it.

    The cheapest exit of a row is ``argmin_l CE_l + price l/L``, the first of equals.

    Args:
        log_odds: [B, L-1].
        losses: CE [B, L].
        price: c, nats that running all L layers costs.
    """
    layers = losses.shape[1]
    number = torch.arange(1, layers + 1, device=losses.device)
    best = (losses.detach() + price * number / layers).argmin(1) + 1
    target = (number[:-1] >= best[:, None]).to(log_odds.dtype)
    return F.binary_cross_entropy_with_logits(log_odds, target)


def agreement(logits: Tensor) -> Tensor:
    """Whether exits 1..L-1 say what exit L says: [B, L, C] -> bool [B, L-1]."""
    said = logits.argmax(-1)
    return said[:, :-1] == said[:, -1:]
