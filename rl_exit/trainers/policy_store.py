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

from rl_exit.config import PolicyConfig
from rl_exit.data.instances import Instances
from rl_exit.envs.state_store import StateStore, StateStoreWriter
from rl_exit.measurement import losses_of
from rl_exit.models.answer_heads import FittedAnswers, fit_answer_heads
from rl_exit.models.answers import Inputs, all_answer_figures, input_size, policy_input
from rl_exit.progress import Progress

Answers = npt.NDArray[np.float32]

BLOCK = 4096


def stored_policy_input(
    store: StateStore, inputs: Inputs, rows: npt.NDArray[np.int64], answers: Answers | None = None
) -> Tensor:
    """What the policy reads of some instances, [n, L, D], from what the store holds of them.

    Args:
        store: States and logits.
        inputs: What the policy reads.
        rows: [n].
        answers: [N, L, C], what the policy answers on every instance of the store; None: what the exits say.
    """
    states = None if inputs == "answers" else torch.from_numpy(store.states(rows))
    said = store.records(rows).logits if answers is None else answers[rows]
    figures = None if inputs == "state" else all_answer_figures(torch.from_numpy(said))
    return policy_input(inputs, states, figures)


def answer_ids(run: Path, config: PolicyConfig) -> npt.NDArray[np.int64] | None:
    """Ids of the instances that a run's own answers are fitted to; None: all that its policy learns on."""
    path = run / "data" / "held.arrow"
    return Instances.open(path).ids if config.answer_on == "held" and path.is_file() else None


def fit_answers(
    store: StateStore, seed: int, ids: npt.NDArray[np.int64] | None = None, progress: Progress | None = None
) -> FittedAnswers:
    """Answer heads on the instances of a store (:func:`rl_exit.models.answer_heads.fit_answer_heads`).

    Args:
        store: What the policy learns on, N instances.
        seed: Of the fit.
        ids: Those of them that heads are fitted to, if not all (:func:`answer_ids`).
        progress: Told the passes done.

    Returns:
        Answers for all N: none from heads that were fitted to the instance.
    """
    every, logits, labels = np.arange(store.num_instances), np.array(store.logits), np.array(store.labels)
    rows = every if ids is None else every[np.isin(store.ids, ids)]
    fitted = fit_answer_heads(
        lambda some: store.states(rows[some]), logits[rows], labels[rows], store.hidden_size, seed, progress=progress
    )
    answers = np.empty_like(fitted.answers, shape=logits.shape)
    answers[rows] = fitted.answers
    others = np.setdiff1d(every, rows)
    with torch.inference_mode():
        for start in range(0, len(others), BLOCK):
            some = others[start : start + BLOCK]
            answers[some] = fitted.heads(torch.from_numpy(store.states(some)), torch.from_numpy(logits[some])).numpy()
    return fitted._replace(answers=answers)


@contextmanager
def policy_store(path: Path, inputs: Inputs, answers: Answers | None = None) -> Iterator[Path]:
    """Path of the store for the policy phase, for the time of the phase.

    Args:
        path: Folder of the state store; with ``inputs`` "state" and no answers it is what comes back.
        inputs: What the policy reads.
        answers: [N, L, C], what the policy answers, by which it is rewarded; None: what the exits say.

    Raises:
        UserError: No such store, no space on the device.
    """
    if inputs == "state" and answers is None:
        yield path
        return
    derived = path.with_name(f"{path.name}-{inputs}")
    try:
        derive(StateStore.open(path), inputs, derived, answers)
        yield derived
    finally:
        shutil.rmtree(derived, ignore_errors=True)


def derive(
    store: StateStore,
    inputs: Inputs,
    path: Path,
    answers: Answers | None = None,
    only: npt.NDArray[np.int64] | None = None,
) -> StateStore:
    """Write the store of the policy's input; labels are those of the state store, losses those of what it answers.

    Args:
        store: The state store.
        inputs: What the policy reads.
        path: Folder to write.
        answers: As in :func:`policy_store`.
        only: Rows that are written, ascending; None: all.
    """
    layout = store.layout
    wanted = np.arange(store.num_instances) if only is None else only
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
        for start in range(0, len(wanted), BLOCK):
            rows = wanted[start : start + BLOCK]
            records = store.records(rows)
            given = stored_policy_input(store, inputs, rows, answers).numpy()
            said = records.losses, records.correct, records.logits
            if answers is not None:
                own = answers[rows]
                said = losses_of(own, records.labels), own.argmax(-1) == records.labels[:, None], own
            writer.append(records.ids, records.labels, given, *said)
    return StateStore.open(path)
