"""A phase of an objective on a model: one forward call for data-parallel wrappers, and the exits it must not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.objectives import Phase
from rl_exit.trainers.token_instances import token_instances


class PhaseModule(nn.Module):
    """The model with the loss of a phase, so that data-parallel wrappers see one forward call.

    Args:
        model: With ``all_exits``, ``backbone`` and ``exits``.
        heads: Those of the objective.
        phase: The phase.
    """

    def __init__(self, model: nn.Module, heads: nn.Module, phase: Phase) -> None:
        super().__init__()
        self.model = model
        self.heads = heads
        self._loss = phase.loss
        self._leaves = phase.leaves
        self._last_is_kept = phase.exits in ("early", "none")

    def forward(self, batch: Mapping[str, Tensor] | Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss, CE of the last exit, whether the last exit is right [B]); the last two detached.

        Args:
            batch: What the model takes, or states [B, L, H] of a frozen backbone.
            labels: [B]; of a decoder's examples, how many tokens are the prompt's.
            step: Updates done in the phase.
        """
        row: Tensor | None = None
        rows = len(labels)
        if isinstance(self.model, EarlyExitCausalModel) and not isinstance(batch, Tensor):
            states, logits, labels, row = token_instances(self.model, batch, labels, self._leaves)
        elif isinstance(batch, Tensor):
            states, logits = batch, self.model.exits(batch).float()  # type: ignore[operator]
        else:
            states, logits = self.model.all_exits(**batch)  # type: ignore[operator]
            logits = logits.float()
        if self._last_is_kept:
            exits: Any = self.model.exits
            clean = F.linear(states[:, -1].to(exits.weight.dtype), exits.weight[-1].t(), exits.bias[-1])
            logits = torch.cat([logits[:, :-1], clean[:, None].float()], 1)
        with torch.autocast(states.device.type, enabled=False):
            loss = self._loss(states, logits, labels, step)
        last = logits[:, -1].detach()
        right = last.argmax(-1) == labels
        if row is not None:  # a response is right where all its tokens are
            wrong = torch.zeros(rows, device=row.device).index_add_(0, row, (~right).float())
            right = wrong == 0
        return loss, F.cross_entropy(last, labels), right


@contextmanager
def kept_exits(model: nn.Module, phase: Phase) -> Iterator[None]:
    """Put back, after the block, the exits that a phase does not train.

    Exits of all layers share two tensors, so the optimiser sees those too: their gradient is zero, but weight decay
    would shrink them.
    """
    kept = {"last": slice(None, -1), "early": slice(-1, None)}.get(phase.exits)
    if kept is None:
        yield
        return
    exits: Any = model.exits
    before = [(parameter, parameter.detach()[kept].clone()) for parameter in (exits.weight, exits.bias)]
    yield
    with torch.no_grad():
        for parameter, values in before:
            parameter[kept] = values
