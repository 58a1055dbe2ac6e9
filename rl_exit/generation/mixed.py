"""Rows of one step under different criteria: requests of different wishes that share their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl_exit.criteria import Fixed
from rl_exit.criteria.base import Carry, Criterion, LayerView

if TYPE_CHECKING:
    from rl_exit.models.causal import EarlyExitCausalModel


class Mixed:
    """Asks each row's own criterion. Every criterion sees its rows alone and keeps its memory of them under its number.

    Args:
        model: The model, for what the policy and the exits say of some rows.
        rules: Of each row of the step, [S].
    """

    name = "mixed"

    def __init__(self, model: EarlyExitCausalModel, rules: Sequence[Criterion]) -> None:
        self._model = model
        self._rules = list({id(rule): rule for rule in rules}.values())
        numbers = {id(rule): number for number, rule in enumerate(self._rules)}
        self._of_row = [numbers[id(rule)] for rule in rules]

    def start(self, batch_size: int, device: torch.device) -> Carry:
        """See :meth:`rl_exit.criteria.base.Criterion.start`."""
        which = torch.tensor(self._of_row, device=device)
        carry: Carry = {"which": which}
        for number, rule in enumerate(self._rules):
            rows = (which == number).nonzero()[:, 0]
            self._keep(carry, number, rows, rule.start(len(rows), device))
        return carry

    def leave(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Criterion.leave`."""
        which = carry["which"]
        leaves = view.everyone(False)
        for number, rule in enumerate(self._rules):
            rows = (which == number).nonzero()[:, 0]
            if not len(rows):
                continue
            mark = f"{number}."
            own = {key.removeprefix(mark): value[rows] for key, value in carry.items() if key.startswith(mark)}
            leaves[rows] = rule.leave(layer, self._part(view, rows), own)
            self._keep(carry, number, rows, own)
        return leaves

    def _part(self, view: LayerView, rows: Tensor) -> LayerView:
        """What one criterion sees: its rows. Logits are computed for them only."""
        model = self._model
        part = LayerView(
            view.layer,
            view.num_layers,
            len(rows),
            view.device,
            state=lambda: view.state[rows],
            logits=lambda: model.head(part.state),
            exit_logit=lambda carry: model.exit_logit(part, carry),
            progress=None if view.progress is None else view.progress[rows],
        )
        return part

    @staticmethod
    def _keep(carry: Carry, number: int, rows: Tensor, own: Carry) -> None:
        count = len(carry["which"])
        for key, value in own.items():
            whole = value.new_zeros((count, *value.shape[1:]))
            whole[rows] = value
            carry[f"{number}.{key}"] = whole


def mixed(model: EarlyExitCausalModel, rules: Sequence[Criterion | None]) -> Criterion | None:
    """One criterion for rows that each have their own; None stands for full depth, and is returned where all are."""
    if all(rule is rules[0] for rule in rules):
        return rules[0]
    full = Fixed(model.num_exits)
    return Mixed(model, [full if rule is None else rule for rule in rules])
