"""What the exits have answered so far, as figures for the policy: one hidden state does not show whether exits agree.

Nothing depends on the number or the names of the classes, so the figures mean the same for any task. They are computed
layer by layer from the logits and a memory of the layers below, in the engine as over stored logits: the same function
serves both.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Memory = dict[str, Tensor]
"""One row per instance still inside: ``answers_last`` and ``answers_sum`` (probabilities), ``answers_votes`` (how many
layers answered each class), all [B, C]; ``answers_run`` (layers since the answer last changed) and
``answers_entropy`` (one layer below), [B]."""

Inputs = Literal["state", "answers", "both"]
INPUTS: tuple[Inputs, ...] = ("state", "answers", "both")

NAMES = (
    "log_odds",
    "margin",
    "entropy",
    "log_entropy",
    "same_as_before",
    "share_of_layers",
    "probability_before",
    "mean_probability",
    "entropy_before",
    "change",
    "run",
    "one",
)
NUM_ANSWERS = len(NAMES)


def answer_figures(layer: int, num_layers: int, logits: Tensor, memory: Memory) -> Tensor:
    """Figures of one layer; called for layers 1, 2, ... in turn.

    ``p_l = softmax(z_l)``, ``y_l`` its argmax. The figures, each of the order of 1: a third of the log-odds of
    ``y_l`` (cut at 10); ``p_l``'s lead over the second class; entropy over ln C, and a third of its logarithm; whether
    ``y_l = y_{l-1}``; the share of layers below that answered ``y_l``; the probability of ``y_l`` one layer below, and
    its mean over all layers below; the entropy one layer below; the total variation between ``p_l`` and ``p_{l-1}``;
    for how many layers the answer has been ``y_l``, over L; and 1, by which the scale of the others survives the
    policy's division by the root mean square. At layer 1 what looks back is 0.

    Args:
        layer: l, 1..L.
        num_layers: L.
        logits: [B, C] of exit l.
        memory: What earlier calls left (empty at layer 1); replaced by that of this layer.

    Returns:
        float32 [B, NUM_ANSWERS].
    """
    z = logits.float()
    p = z.softmax(-1)
    two, order = p.topk(2, -1)
    best, answer = two[:, 0], order[:, :1]
    # From what the other classes weigh against the answer: no digits are left of 1 - p where p is nearly 1.
    apart = z - z.gather(1, answer)
    rest = apart.exp().scatter(1, answer, 0.0).sum(-1)
    uncertainty = (rest.log1p() - (p * apart.clamp_min(-100.0)).sum(-1)) / math.log(p.shape[-1])
    zero = torch.zeros_like(best)
    if layer == 1:
        same = share = before = mean = entropy_before = change = run = zero
        votes, total = torch.zeros_like(p), torch.zeros_like(p)
    else:
        last, total, votes = memory["answers_last"], memory["answers_sum"], memory["answers_votes"]
        same = (last.argmax(-1) == answer[:, 0]).float()
        share = votes.gather(1, answer)[:, 0] / (layer - 1)
        before = last.gather(1, answer)[:, 0]
        mean = total.gather(1, answer)[:, 0] / (layer - 1)
        entropy_before = memory["answers_entropy"]
        change = 0.5 * (p - last).abs().sum(-1)
        run = same * (memory["answers_run"] + 1.0)
    memory["answers_last"] = p
    memory["answers_sum"] = total + p
    memory["answers_votes"] = votes.scatter_add(1, answer, torch.ones_like(two[:, :1]))
    memory["answers_run"] = run
    memory["answers_entropy"] = uncertainty
    figures = (
        -rest.clamp_min(1e-30).log().clamp(-10.0, 10.0) / 3.0,
        best - two[:, 1],
        uncertainty,
        uncertainty.clamp_min(1e-6).log() / 3.0,
        same,
        share,
        before,
        mean,
        entropy_before,
        change,
        run / num_layers,
        torch.ones_like(best),
    )
    return torch.stack(figures, -1)


def all_answer_figures(logits: Tensor) -> Tensor:
    """Figures of every layer at once.

    Args:
        logits: [B, L, C].

    Returns:
        float32 [B, L, NUM_ANSWERS].
    """
    memory: Memory = {}
    layers = logits.shape[1]
    return torch.stack([answer_figures(i + 1, layers, logits[:, i], memory) for i in range(layers)], 1)


def confidence_log_odds(logits: Tensor) -> Tensor:
    """Log-odds of the likeliest class: their sigmoid is its probability, and they keep their order where that is 1.

    Args:
        logits: [..., C].

    Returns:
        float32 [...].
    """
    z = logits.float()
    best, answer = z.max(-1, keepdim=True)
    return (best - z.scatter(-1, answer, -math.inf).logsumexp(-1, keepdim=True))[..., 0]


def input_size(inputs: Inputs, hidden_size: int) -> int:
    """Numbers that the policy reads at a layer: H, NUM_ANSWERS, or both."""
    return {"state": hidden_size, "answers": NUM_ANSWERS, "both": hidden_size + NUM_ANSWERS}[inputs]


def policy_input(inputs: Inputs, states: Tensor | None, figures: Tensor | None) -> Tensor:
    """What the policy reads.

    For ``both`` the state is divided by its root mean square and the figures are scaled to weigh as much as it does.

    Args:
        inputs: ``"state"``, ``"answers"`` or ``"both"``.
        states: [..., H]; not read for ``answers``.
        figures: [..., NUM_ANSWERS]; not read for ``state``.

    Returns:
        [..., input_size].
    """
    if inputs == "state":
        assert states is not None
        return states
    assert figures is not None
    if inputs == "answers":
        return figures
    assert states is not None
    hidden = states.float()
    size = hidden.shape[-1]
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).clamp_min(1e-6)
    return torch.cat([hidden * (math.sqrt(size) / norm), figures * math.sqrt(size / NUM_ANSWERS)], -1)


def every_policy_input(inputs: Inputs, states: Tensor, logits: Tensor) -> Tensor:
    """What the policy reads at every layer.

    Args:
        inputs: ``"state"``, ``"answers"`` or ``"both"``.
        states: [B, L, H].
        logits: [B, L, C].

    Returns:
        [B, L, input_size].
    """
    return policy_input(inputs, states, None if inputs == "state" else all_answer_figures(logits))
