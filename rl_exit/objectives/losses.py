"""The closed forms that objectives are made of, on logits [B, L, C] and labels [B]; natural logarithms throughout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def exit_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every exit in nats: logits [B, L, C], labels [B] -> [B, L]."""
    count, layers, classes = logits.shape
    target = labels[:, None].expand(count, layers)
    return F.cross_entropy(logits.reshape(-1, classes), target.reshape(-1), reduction="none").view(count, layers)


def layer_weights(num_layers: int) -> Tensor:
    """``l / sum l`` (Eq. 2), [L]."""
    weight = torch.arange(1.0, num_layers + 1)
    return weight / weight.sum()


def distilled_losses(logits: Tensor, labels: Tensor, distillation: float, temperature: float) -> Tensor:
    """Cross-entropy mixed with distillation from the last exit (Hinton et al., 2015).

    ``(1 - d) CE_l + d T^2 KL(softmax(z_L / T) || softmax(z_l / T))`` for l < L, the last exit's answer taken as given;
    ``CE_L`` for the last exit, which has no teacher.

    Args:
        logits: [B, L, C].
        labels: [B].
        distillation: d in [0, 1].
        temperature: T > 0.

    Returns:
        [B, L], nats.
    """
    losses = exit_losses(logits, labels)
    if distillation == 0.0:
        return losses
    teacher = (logits[:, -1:].detach() / temperature).log_softmax(-1)
    student = (logits[:, :-1] / temperature).log_softmax(-1)
    apart = (teacher.exp() * (teacher - student)).sum(-1)
    mixed = (1.0 - distillation) * losses[:, :-1] + distillation * temperature**2 * apart
    return torch.cat([mixed, losses[:, -1:]], 1)


def imitation_losses(logits: Tensor) -> Tensor:
    """``KL(p_l || p_L)`` of the exits below L, the last exit's answer taken as given: [B, L, C] -> [B, L-1], nats.

    The pupil's probabilities weigh the terms, as in FastBERT (Liu et al., 2020).
    """
    log_p = logits[:, :-1].log_softmax(-1)
    return (log_p.exp() * (log_p - logits[:, -1:].detach().log_softmax(-1))).sum(-1)
