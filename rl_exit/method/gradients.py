"""Losses whose gradient is the policy gradient of whole trajectories (Eq. 5), and their importance weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rl_exit.method.distribution import log_exit_distribution


def folded_weights(exit_layer: Tensor, weight: Tensor, num_layers: int) -> tuple[Tensor, Tensor]:
    """Fold K trajectories of an instance into one weight per (layer, action).

    ``sum_k w_k log P(exit at e_k) = sum_l leave[l] log pi_l + stay[l] log(1 - pi_l)``, so one policy pass serves any K.

    Args:
        exit_layer: [B, K] integer, 1..L.
        weight: [B, K], e.g. advantages.
        num_layers: L.

    Returns:
        (leave [B, L-1], stay [B, L-1]).
    """
    total = torch.zeros((weight.shape[0], num_layers), dtype=weight.dtype, device=weight.device)
    total.scatter_add_(1, exit_layer.long() - 1, weight)
    leave = total[:, :-1]
    # Trajectories that pass layer l are those that leave later.
    stay = total.sum(1, keepdim=True) - total.cumsum(1)[:, :-1]
    return leave, stay


def policy_gradient_loss(exit_logits: Tensor, exit_layer: Tensor, weight: Tensor) -> Tensor:
    """``-(1/BK) sum w log P(exit at e)``; with advantages as weights its gradient is the policy gradient (Eq. 5).

    Args:
        exit_logits: [B, L-1].
        exit_layer: [B, K].
        weight: [B, K].
    """
    leave, stay = folded_weights(exit_layer, weight, exit_logits.shape[1] + 1)
    total = (leave * F.logsigmoid(exit_logits) + stay * F.logsigmoid(-exit_logits)).sum()
    return -total / exit_layer.numel()


def importance_weights(exit_logits: Tensor, exit_layer: Tensor, log_prob: Tensor) -> Tensor:
    """P_pi(trajectory) / P_behaviour(trajectory), [B, K], detached.

    With epsilon-greedy exploration the trajectories are not drawn from pi itself; this weight keeps the gradient that
    of pi. Since exploration keeps at least 1-epsilon of pi, no weight exceeds (1-epsilon)^-(L-1).
    """
    with torch.no_grad():
        log_pi = log_exit_distribution(exit_logits).gather(1, exit_layer.long() - 1)
        return (log_pi - log_prob).exp()
