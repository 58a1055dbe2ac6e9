"""State copying and generation as the words of the method say them: no cache, no batch, layers run as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rl_exit.criteria import Criterion
from rl_exit.models.causal import EarlyExitCausalModel

Shown = dict[tuple[int, int], Tensor]


def show(model: EarlyExitCausalModel, ids: Sequence[int], exit_layers: Sequence[int], upto: int) -> Shown:
    """What tokens 0..upto-1 show as input of layer l + 1, by (token, l), each having left where it is said."""
    shown: Shown = {}
    for t in range(upto):
        own = begin(model, ids, t)
        shown[t, 0] = own
        for layer in range(1, model.num_layers + 1):
            if layer <= exit_layers[t]:
                own = through(model, ids, t, layer, shown, own)
            shown[t, layer] = own
    return shown


def begin(model: EarlyExitCausalModel, ids: Sequence[int], t: int) -> Tensor:
    return model.backbone.begin(torch.tensor([ids[: t + 1]])).hidden[:, t]


def through(model: EarlyExitCausalModel, ids: Sequence[int], t: int, layer: int, shown: Shown, own: Tensor) -> Tensor:
    """Output of a layer for token t, whose own input is `own`, [1, H]."""
    inputs = torch.stack([*(shown[j, layer - 1] for j in range(t)), own], 1)
    state = model.backbone.begin(torch.tensor([ids[: t + 1]]))
    return model.backbone.step(layer, state.with_hidden(inputs)).hidden[:, t]


def copied_states(model: EarlyExitCausalModel, ids: Sequence[int], exit_layers: Sequence[int]) -> Tensor:
    """[T, H]: the state of every token at the exit where it leaves."""
    shown = show(model, ids, exit_layers, len(ids))
    return torch.cat(
        [
            model.exit_state(model.exit_layers.index(exit_layers[t]) + 1, shown[t, model.num_layers])
            for t in range(len(ids))
        ]
    )


@torch.no_grad()
def generate(
    model: EarlyExitCausalModel,
    prompt: Sequence[int],
    criterion: Criterion,
    new_tokens: int,
    ends: Sequence[int] = (),
) -> tuple[list[int], list[int]]:
    """Greedy tokens and the layer of each, one prompt; everything is computed again for every token."""
    ids, exits, layers = list(prompt), [model.num_layers] * len(prompt), [model.num_layers]
    shown = show(model, ids, exits, len(ids))
    last = model.exit_state(model.num_exits, shown[len(ids) - 1, model.num_layers])
    ids.append(int(model.head(last).argmax()))
    while len(layers) < new_tokens and ids[-1] not in ends:
        t = len(ids) - 1
        shown = show(model, ids, exits, t)
        own = begin(model, ids, t)
        carry = criterion.start(1, own.device)
        for layer in range(1, model.num_layers + 1):
            own = through(model, ids, t, layer, shown, own)
            number = model.exit_of_layer[layer]
            if number == model.num_exits:
                break
            if number:
                view = model.view(number, own, torch.tensor([len(layers) / new_tokens]))
                if bool(criterion.leave(number, view, carry)):
                    break
        layers.append(layer)
        exits.append(layer)
        ids.append(int(model.head(model.exit_state(number, own)).argmax()))
    return ids[len(prompt) :], layers
