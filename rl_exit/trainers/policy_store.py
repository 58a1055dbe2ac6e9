"""The store that the policy phase reads: the policy's own input in place of the hidden states.

A policy that reads the exits' answers needs 12 numbers at a layer where the state has hundreds, so its phase runs on a
store that is as much smaller. It is derived from the state store, block by block, and removed after the phase.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rl_exit.envs.state_store import StateStore, StateStoreWriter
from rl_exit.models.answers import Inputs, all_answer_figures, input_size, policy_input

BLOCK = 4096


def stored_policy_input(store: StateStore, inputs: Inputs, rows: npt.NDArray[np.int64]) -> Tensor:
    """What the policy reads of some instances, [n, L, D], from what the store holds of them."""
    states = None if inputs == "answers" else torch.from_numpy(store.states(rows))
    figures = None if inputs == "state" else all_answer_figures(torch.from_numpy(store.records(rows).logits))
    return policy_input(inputs, states, figures)


@contextmanager
def policy_store(path: Path, inputs: Inputs) -> Iterator[Path]:
    """Path of the store for the policy phase, for the time of the phase.

    Args:
        path: Folder of the state store; with ``inputs`` "state" it is the answer.
        inputs: What the policy reads.

    Raises:
        UserError: No such store, no space on the device.
    """
    if inputs == "state":
        yield path
        return
    derived = path.with_name(f"{path.name}-{inputs}")
    try:
        derive(StateStore.open(path), inputs, derived)
        yield derived
    finally:
        shutil.rmtree(derived, ignore_errors=True)


def derive(store: StateStore, inputs: Inputs, path: Path) -> StateStore:
    """Write the store of the policy's input; losses, labels and the rest are as in the state store."""
    layout = store.layout
    with StateStoreWriter(
        path,
        store.num_layers,
        input_size(inputs, store.hidden_size),
        store.num_classes,
        layout.dtype,
        max(shard.rows for shard in store.shards),
        instances=store.instances_fingerprint,
        model=store.model_fingerprint,
    ) as writer:
        for start in range(0, store.num_instances, BLOCK):
            rows = np.arange(start, min(start + BLOCK, store.num_instances))
            records = store.records(rows)
            given = stored_policy_input(store, inputs, rows).numpy()
            writer.append(records.ids, records.labels, given, records.losses, records.correct, records.logits)
    return StateStore.open(path)
