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
from rl_exit.measurement import losses_of
from rl_exit.models.answer_pool import AnswerPool, fit_answer_pool
from rl_exit.models.answers import Inputs, all_answer_figures, input_size, policy_input

BLOCK = 4096


def stored_policy_input(
    store: StateStore, inputs: Inputs, rows: npt.NDArray[np.int64], pool: AnswerPool | None = None
) -> Tensor:
    """What the policy reads of some instances, [n, L, D], from what the store holds of them; ``pool``: of the model."""
    states = None if inputs == "answers" else torch.from_numpy(store.states(rows))
    figures = None if inputs == "state" else all_answer_figures(stored_answers(store, rows, pool))
    return policy_input(inputs, states, figures)


def stored_answers(store: StateStore, rows: npt.NDArray[np.int64], pool: AnswerPool | None) -> Tensor:
    """What the policy answers at every layer, logits [n, L, C]; ``pool`` None: what the exits say."""
    logits = torch.from_numpy(store.records(rows).logits)
    return logits if pool is None else pool(logits)


def fitted_pool(store: StateStore, ids: npt.NDArray[np.int64] | None) -> AnswerPool:
    """The weights of a model's answers.

    Args:
        store: What the policy learns on.
        ids: Those of its instances that the exits were not fitted to; None: all.
    """
    every = np.arange(store.num_instances)
    rows = every if ids is None else every[np.isin(store.ids, ids)]
    records = store.records(rows)
    return fit_answer_pool(torch.from_numpy(records.logits), torch.from_numpy(np.array(records.labels)))


@contextmanager
def policy_store(path: Path, inputs: Inputs, pool: AnswerPool | None = None) -> Iterator[Path]:
    """Path of the store for the policy phase, for the time of the phase.

    Args:
        path: Folder of the state store; with ``inputs`` "state" and no pool it is the answer.
        inputs: What the policy reads.
        pool: What the policy answers, by which it is rewarded; None: what the exits say.

    Raises:
        UserError: No such store, no space on the device.
    """
    if inputs == "state" and pool is None:
        yield path
        return
    derived = path.with_name(f"{path.name}-{inputs}")
    try:
        derive(StateStore.open(path), inputs, derived, pool)
        yield derived
    finally:
        shutil.rmtree(derived, ignore_errors=True)


def derive(store: StateStore, inputs: Inputs, path: Path, pool: AnswerPool | None = None) -> StateStore:
    """Write the store of the policy's input; labels are those of the state store, losses those of what it answers."""
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
            given = stored_policy_input(store, inputs, rows, pool).numpy()
            said = records.losses, records.correct, records.logits
            if pool is not None:
                answers = pool(torch.from_numpy(records.logits)).numpy()
                said = losses_of(answers, records.labels), answers.argmax(-1) == records.labels[:, None], answers
            writer.append(records.ids, records.labels, given, *said)
    return StateStore.open(path)
