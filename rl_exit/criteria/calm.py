"""CALM's three measures (Schuster et al. 2022): softmax margin, state saturation, learned consistency.

Its threshold falls along the way, ``lambda_t = clip(0.9 lambda + 0.1 exp(-decay t / N), 0, 1)``. In the paper t counts
the generated tokens and N is the most there may be; so it is where a decoder generates (``LayerView.progress``). A
classifier gives one answer, and what can fall is the threshold from layer to layer: t = l - 1, N = L there. With decay
0 the threshold is ``0.9 lambda + 0.1`` everywhere.

The score is the largest lambda in [0, 1] at which a row would still leave, so that one pass serves every lambda.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rl_exit.criteria.base import Carry, LayerView, Scored, checked_number
from rl_exit.criteria.with_head import HeadScored


@dataclass(frozen=True)
class CALMSoftmax(Scored):
    """Leave where ``top1 - top2 >= lambda_t``, the margin of the two largest probabilities.

    Attributes:
        threshold: lambda in [0, 1].
        decay: 0 or more; the paper's tau is 4.
    """

    threshold: float
    decay: float = 4.0
    name = "calm_softmax"
    comparison = ">="

    def __post_init__(self) -> None:
        _check(self.name, self.threshold, self.decay)

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`."""
        top = view.logits.float().softmax(-1).topk(2, dim=-1).values
        return largest_lambda(top[:, 0] - top[:, 1], along(view), self.decay)


@dataclass(frozen=True)
class CALMSaturation(Scored):
    """Leave where ``cos(h_l, h_{l-1}) >= lambda_t``: the state has come to rest. Not before layer 2.

    Attributes:
        threshold: lambda in [0, 1].
        decay: 0 or more; the paper's tau is 4.
    """

    threshold: float
    decay: float = 4.0
    name = "calm_saturation"
    comparison = ">="

    def __post_init__(self) -> None:
        _check(self.name, self.threshold, self.decay)

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`."""
        before, carry["state"] = carry.get("state"), view.state.float()
        if before is None:
            return torch.full((view.batch_size,), -math.inf, device=view.device)
        alike = F.cosine_similarity(carry["state"], before, dim=-1)
        return largest_lambda(alike, along(view), self.decay)


@dataclass(frozen=True)
class CALMMeta(HeadScored):
    """Leave where the learned probability that the last layer says the same reaches ``lambda_t``.

    Attributes:
        learned: A linear layer with a sigmoid on the state.
        threshold: lambda in [0, 1].
        decay: 0 or more; the paper's tau is 4.
    """

    decay: float = 4.0
    name = "calm_meta"
    comparison = ">="

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.name, self.threshold, self.decay)

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`."""
        sure = self.log_odds(layer, view, carry).sigmoid()
        return largest_lambda(sure, along(view), self.decay)


def along(view: LayerView) -> Tensor | float:
    """t / N: the share of the generation that is done, or of the layers where nothing is generated."""
    return (view.layer - 1) / view.num_layers if view.progress is None else view.progress.double()


def decayed_threshold(value: float, share: float, decay: float) -> float:
    """lambda_t at t / N = share."""
    return min(max(0.9 * value + 0.1 * math.exp(-decay * share), 0.0), 1.0)


def largest_lambda(confidence: Tensor, share: Tensor | float, decay: float) -> Tensor:
    """The largest lambda in [0, 1] with ``confidence >= lambda_t``; ``-inf`` where there is none.

    Args:
        confidence: float32 [B].
        share: t / N, a number or float64 [B].
        decay: As the criteria's.

    Returns:
        float32 [B].
    """
    fallen = 0.1 * (torch.exp(-decay * share) if isinstance(share, Tensor) else math.exp(-decay * share))
    # In float64, so that a confidence that equals lambda_t up to its own rounding gives back lambda.
    value = (confidence.double() - fallen) / 0.9
    value = torch.where(confidence >= 1.0, 1.0, value)
    return torch.where(value < 0.0, -math.inf, value.clamp_max(1.0)).float()


def _check(word: str, threshold: float, decay: float) -> None:
    checked_number(word, "threshold", threshold, (0.0, 1.0))
    checked_number(word, "decay", decay, (0.0, math.inf))
