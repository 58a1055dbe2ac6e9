"""States of tokens as generation sees them: a whole text in one pass, under what the tokens before each show.

In generation a token that has left presents its state of that layer to all deeper layers
(:func:`rl_exit.models.causal.present`), and later tokens attend to what is presented. Training and evaluation know the
whole text, so they run it in one pass of *two streams* of T tokens each:

* the *shown* stream: a token's state as far as it goes, and from there its copy;
* the *full* stream: the token's own state at every layer. It attends to the shown stream of the tokens before it, and
  to itself.

A token decides by its own state, which does not depend on where it leaves. So one pass gives the states of all exits of
every token, whatever exits the tokens before it have taken: what policy phase, task step and evaluation read. Where no
token leaves, both streams are equal and one pass without them does.

Shapes: B rows, T positions, E exits, H hidden size, N chosen tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rl_exit.criteria.base import Carry, Criterion, LayerView
from rl_exit.models.backbones.state import StepState, Tables
from rl_exit.models.causal import EarlyExitCausalModel, present

HORIZON = 64
"""N of CALM's falling threshold, in tokens, where nothing else is said."""


@dataclass(frozen=True)
class DrawnByPolicy:
    """Each token leaves with the probability that the policy gives, drawn from torch's generator; no gradient."""

    name = "drawn"

    def start(self, batch_size: int, device: torch.device) -> Carry:
        """An empty carry."""
        return {}

    def leave(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.Criterion.leave`."""
        pi = view.exit_logit(carry).float().sigmoid()
        return torch.rand_like(pi) < pi


@dataclass(frozen=True)
class TokenPass:
    """A text under a rule.

    Attributes:
        states: [B, E, T, H], state of every token at every exit, whether or not it got there.
        exits: int64 [B, T], number of the exit at which each token leaves, 1..E.
    """

    states: Tensor
    exits: Tensor


@dataclass(frozen=True)
class TokenRows:
    """The tokens of a batch that are episodes: those whose pass predicts a token of the response.

    Attributes:
        row: int64 [N], row of the batch.
        position: int64 [N], position of the token whose pass it is.
        target: int64 [N], the token that follows, which is to be predicted.
    """

    row: Tensor
    position: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def of(self, states: Tensor) -> Tensor:
        """Their states [N, E, H] out of [B, E, T, H]."""
        return states[self.row, :, self.position]


def token_rows(input_ids: Tensor, attention_mask: Tensor, starts: Tensor) -> TokenRows:
    """The episodes of a batch, row by row; prompts are never scored.

    Args:
        input_ids: int64 [B, T].
        attention_mask: [B, T].
        starts: int64 [B], tokens of each prompt, at least 1.
    """
    position = torch.arange(input_ids.shape[1] - 1, device=input_ids.device)
    inside = (position >= starts[:, None] - 1) & (position < attention_mask.sum(1)[:, None] - 1)
    row, at = inside.nonzero(as_tuple=True)
    return TokenRows(row, at, input_ids[row, at + 1])


def may_leave(input_ids: Tensor, starts: Tensor) -> Tensor:
    """Which tokens may leave early, bool [B, T]: prefill runs the prompt at full depth, its last token included."""
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    return position >= starts[:, None]


def run_text(
    model: EarlyExitCausalModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    starts: Tensor,
    rule: Criterion | None = None,
    horizon: int = HORIZON,
) -> TokenPass:
    """Run texts whose tokens leave by a rule; differentiable, but for the rule's decisions.

    Args:
        model: The decoder.
        input_ids: int64 [B, T], padded on the right.
        attention_mask: [B, T].
        starts: int64 [B], tokens of each prompt, which run at full depth.
        rule: Who leaves; to it a token's exits are its layers. None: nobody.
        horizon: N of CALM's falling threshold, tokens.
    """
    if rule is None:
        return TokenPass(model.all_exits(input_ids, attention_mask), torch.full_like(input_ids, model.num_exits))
    state = _two_streams(model, input_ids, attention_mask)
    count, length = input_ids.shape
    inside = torch.ones_like(input_ids, dtype=torch.bool)
    free = may_leave(input_ids, starts)
    exits = torch.full_like(input_ids, model.num_exits)
    progress = (_times(input_ids, starts) / horizon).clamp_max(1.0)
    carry = rule.start(count * length, input_ids.device)
    found: list[Tensor] = []
    for layer in range(1, model.num_layers + 1):
        after = model.backbone.step(layer, state)
        shown, full = after.hidden.split(length, 1)
        shown = present(state.hidden[:, :length], shown, inside)
        if layer in model.exit_layers:
            number = len(found) + 1
            found.append(model.exit_state(number, full))
            if number < model.num_exits:
                leave = _leaving(model, number, found[-1], rule, carry, progress) & inside & free
                exits = torch.where(leave, number, exits)
                inside = inside & ~leave
        state = after.with_hidden(torch.cat([shown, full], 1))
    return TokenPass(torch.stack(found, 1), exits)


@torch.no_grad()
def _leaving(
    model: EarlyExitCausalModel, number: int, states: Tensor, rule: Criterion, carry: Carry, progress: Tensor
) -> Tensor:
    """Whom the rule lets go at an exit, bool [B, T]."""
    view = state_view(model, number, states.detach().flatten(0, 1), progress.flatten())
    return rule.leave(number, view, carry).view(states.shape[:2])


def _times(input_ids: Tensor, starts: Tensor) -> Tensor:
    """How many tokens of the response each pass comes after, [B, T]."""
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (position - starts[:, None] + 1).clamp_min(0)


def _two_streams(model: EarlyExitCausalModel, input_ids: Tensor, attention_mask: Tensor) -> StepState:
    """The batch after the embeddings, with both streams side by side, [B, 2T, H]."""
    state = model.backbone.begin(input_ids, attention_mask)
    eager = getattr(model.backbone.model.config, "_attn_implementation", None) == "eager"
    masks = {reach: _mask(state, reach, eager) for reach in state.masks}
    tables = Tables(
        by_token={name: torch.cat([table, table], 1) for name, table in state.tables.by_token.items()},
        fixed=state.tables.fixed,
    )
    return replace(state, hidden=torch.cat([state.hidden, state.hidden], 1), masks=masks, tables=tables)


def _mask(state: StepState, reach: int | None, eager: bool) -> Tensor:
    """Which keys each query sees, [1, 1, 2T, 2T].

    Both streams see the shown stream to their left; of the shown stream a token also sees itself there, of the full
    stream itself in the full stream. Padding on the right is seen by nobody to its left.
    """
    length: int = state.hidden.shape[1]
    position = torch.arange(length, device=state.hidden.device)
    distance = position[:, None] - position[None, :]
    near: Any = distance >= 0 if reach is None else (distance >= 0) & (distance <= reach)
    itself = distance == 0
    top = torch.cat([near, torch.zeros_like(near)], 1)
    bottom = torch.cat([near & ~itself, itself], 1)
    visible = torch.cat([top, bottom], 0)[None, None]
    if not eager:
        return visible
    kind = state.hidden.dtype
    return torch.zeros(visible.shape, dtype=kind, device=visible.device).masked_fill_(~visible, torch.finfo(kind).min)


def state_view(model: EarlyExitCausalModel, number: int, state: Tensor, progress: Tensor | None = None) -> LayerView:
    """What a criterion sees at exit ``number``, from the exit's states [B, H]; to it the exits are the layers."""
    view = LayerView(
        number,
        model.num_exits,
        len(state),
        state.device,
        state=lambda: state,
        logits=lambda: model.head(state),
        exit_logit=lambda carry: model.exit_logit(view, carry),
        progress=progress,
    )
    return view
