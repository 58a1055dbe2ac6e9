"""What the policy answers when an instance leaves: what all exits passed so far say, not the last of them alone.

The exits below have been computed anyway, so their evidence costs nothing. With ``z_l``, the logits of exit l, it is

    a_1 = own_1 z_1 + bias_1,    a_l = own_l z_l + below_l a_{l-1} + bias_l  (1 < l < L),    a_L = z_L

with two numbers and C biases a layer, fitted by cross-entropy on instances that the exits were not fitted to. The last
exit, where leaving is forced, answers as it does without a policy, so never leaving early is full depth itself. One
function serves the engine, layer by layer, and stored logits.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Answer = Literal["exit", "pooled"]
ANSWERS: tuple[Answer, ...] = ("exit", "pooled")
Memory = dict[str, Tensor]
"""One row per instance still inside: ``answer_below`` [B, C], what was answered one layer below."""

RIDGE = 1e-3  # Pull towards the exit's own answer, against cross-entropy in nats: few instances change little.
_ITERATIONS = 200


class AnswerPool(nn.Module):
    """The weights above; before :func:`fit_answer_pool` every layer answers what its exit does.

    They are buffers: no objective trains them along with the exits.

    Args:
        num_layers: L >= 2.
        num_classes: C >= 2.
    """

    own: Tensor
    below: Tensor
    bias: Tensor

    def __init__(self, num_layers: int, num_classes: int) -> None:
        super().__init__()
        if num_layers < 2 or num_classes < 2:
            raise ValueError(f"AnswerPool: num_layers={num_layers}, num_classes={num_classes}; accepted: at least 2, 2")
        self.num_layers = num_layers
        self.register_buffer("own", torch.ones(num_layers - 1))
        self.register_buffer("below", torch.zeros(num_layers - 1))
        self.register_buffer("bias", torch.zeros(num_layers - 1, num_classes))

    def forward(self, logits: Tensor) -> Tensor:
        """Answers of every layer.

        Args:
            logits: [B, L, C], of the exits.

        Returns:
            float32 [B, L, C], logits of the answers.
        """
        memory: Memory = {}
        return torch.stack([self.at(layer, logits[:, layer - 1], memory) for layer in range(1, self.num_layers + 1)], 1)

    def at(self, layer: int, logits: Tensor, memory: Memory) -> Tensor:
        """Answer of one layer; called for layers 1, 2, ... in turn.

        Args:
            layer: l, 1..L.
            logits: [B, C] of exit l.
            memory: What earlier calls left (empty at layer 1); replaced by that of this layer.

        Returns:
            float32 [B, C].
        """
        z = logits.float()
        if layer == self.num_layers:
            return z
        said = self.own[layer - 1] * z + self.bias[layer - 1]
        if layer > 1:
            said = said + self.below[layer - 1] * memory["answer_below"]
        memory["answer_below"] = said
        return said


def fit_answer_pool(logits: Tensor, labels: Tensor, ridge: float = RIDGE) -> AnswerPool:
    """Weights with the least cross-entropy, mean over instances and layers 1..L-1, plus ridge.

    Args:
        logits: [N, L, C] of exits that were fitted to other instances.
        labels: int64 [N].
        ridge: Weight of the squared distance from the exit's own answer.

    Returns:
        The fitted pool; equal inputs give equal weights.
    """
    _, layers, classes = logits.shape
    given, truth = logits.double(), labels.long().repeat_interleave(layers - 1)
    pool = AnswerPool(layers, classes).double()
    names = ("own", "below", "bias")
    free = {name: getattr(pool, name).clone().requires_grad_() for name in names}
    start = {name: value.detach().clone() for name, value in free.items()}
    optimizer = torch.optim.LBFGS(
        free.values(), max_iter=_ITERATIONS, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        answers = _answers(given, free)
        away = torch.stack([(free[name] - start[name]).square().sum() for name in names]).sum()
        value = F.cross_entropy(answers.reshape(-1, classes), truth) + ridge * away
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    for name in names:
        getattr(pool, name).copy_(free[name].detach())
    return pool.float()


def _answers(logits: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """[N, L-1, C], differentiable in the weights."""
    found: list[Tensor] = []
    for index in range(logits.shape[1] - 1):
        said = weights["own"][index] * logits[:, index] + weights["bias"][index]
        if found:
            said = said + weights["below"][index] * found[-1]
        found.append(said)
    return torch.stack(found, 1)
