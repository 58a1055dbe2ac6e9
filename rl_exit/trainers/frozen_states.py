"""Pooled states of a training set under a frozen backbone: computed once, read by every epoch that keeps it.

Such an epoch costs the exits alone. Where the states do not fit into memory, the caller runs the backbone every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rl_exit.data.batching import length_sorted_batches
from rl_exit.data.instances import Instances

MOST_BYTES = 1 << 30
BATCH_SIZE = 64


def frozen_states(
    model: nn.Module, instances: Instances, autocast: Callable[[], Any], device: torch.device | None
) -> Tensor | None:
    """Run the backbone over all instances, without gradient.

    Batches are cut by length alone, so the states are the same to the bit whenever they are computed.

    Args:
        model: With ``all_exits`` and ``exits``; its backbone in evaluation mode.
        instances: N instances.
        autocast: Gives the precision's context.
        device: Where the model is; default: CPU.

    Returns:
        float32 [N, L, H] on the CPU; None where that would take more than 1 GiB.
    """
    exits: Any = model.exits
    if 4 * len(instances) * exits.num_layers * exits.hidden_size > MOST_BYTES:
        return None
    states = torch.empty(len(instances), exits.num_layers, exits.hidden_size)
    for rows in length_sorted_batches(instances.lengths, BATCH_SIZE):
        batch = {name: value.to(device or "cpu") for name, value in instances.batch(rows).items()}
        with torch.no_grad(), autocast():
            states[torch.from_numpy(rows)] = model.all_exits(**batch).states.float().cpu()  # type: ignore[operator]
    return states
