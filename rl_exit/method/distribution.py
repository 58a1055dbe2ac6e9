"""Exit distribution of a policy, P(exit at l) = pi_l prod_{j<l}(1 - pi_j) with pi_L = 1, and the exact return."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def log_exit_distribution(exit_logits: Tensor) -> Tensor:
    """Log-probability of leaving at each layer.

    Args:
        exit_logits: [..., L-1], log-odds of Exit at layers 1..L-1 (``pi = sigmoid``).

    Returns:
        [..., L]; the last entry is the log-probability of never choosing Exit. Sums to 1 after ``exp``.
    """
    stay = F.logsigmoid(-exit_logits).cumsum(-1)
    before = F.pad(stay, (1, 0))
    return before + F.pad(F.logsigmoid(exit_logits), (0, 1))


def exit_distribution(pi: Tensor) -> Tensor:
    """P(exit at l) from exit probabilities.

    Args:
        pi: [..., L-1], probability of Exit at layers 1..L-1.

    Returns:
        [..., L], rows sum to 1 (pi_L = 1).
    """
    reach = F.pad((1.0 - pi).cumprod(-1), (1, 0), value=1.0)
    return reach * F.pad(pi, (0, 1), value=1.0)


def expected_return(exit_logits: Tensor, reward: Tensor) -> Tensor:
    """Exact return ``J_i = sum_l P(l) R[i, l]``, differentiable in the policy: the gradient without variance.

    Args:
        exit_logits: [B, L-1].
        reward: [B, L].

    Returns:
        [B].
    """
    return (log_exit_distribution(exit_logits).exp() * reward).sum(-1)


def threshold_exit(pi: Tensor, threshold: float = 0.5) -> Tensor:
    """Layer of the first ``pi > threshold``, otherwise L (inference rule).

    Args:
        pi: [..., L-1].
        threshold: In [0, 1].

    Returns:
        [...] int64 in 1..L.
    """
    leave = F.pad(pi > threshold, (0, 1), value=True)
    return leave.to(torch.int8).argmax(-1) + 1


def action_entropy(exit_logits: Tensor) -> Tensor:
    """Entropy of the actions on the way, nats: summed over the layers as often as they are reached, mean over B.

    As a bonus of weight tau it keeps pi graded: at its optimum the log-odds of Exit are the advantage over tau. How
    often layers are reached gets no gradient.

    Args:
        exit_logits: [B, L-1].

    Returns:
        Scalar.
    """
    pi = exit_logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(exit_logits, pi, reduction="none")
    reached = F.pad((1.0 - pi).cumprod(-1)[..., :-1], (1, 0), value=1.0).detach()
    return (entropy * reached).sum(-1).mean()
