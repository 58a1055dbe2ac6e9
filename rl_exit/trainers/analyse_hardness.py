"""Table 1 for a run: the memorized layer against loss and forgetting events, on training instances and on dev."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_exit.analysis import Correlation, forgetting, spearman
from rl_exit.data.instances import Instances
from rl_exit.envs.state_store import StateStore
from rl_exit.measurement import losses_of
from rl_exit.method.rewards import memorized_layer
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.progress import Display
from rl_exit.seeding import derive_seed
from rl_exit.trainers.forgetting import read_visits
from rl_exit.trainers.kept_logits import kept_logits

MOST_INSTANCES = 10_000  # Where the store does not hold the training set, so many of it, drawn at random.


@dataclass(frozen=True)
class Answered:
    """What the finished model's exits make of some instances: ids [N], losses [N, L] in nats, correct [N, L]."""

    ids: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float32]
    correct: npt.NDArray[np.bool_]


def hardness(
    path: Path, display: Display, train: StateStore, dev: StateStore, model: EarlyExitModel, seed: int
) -> dict[str, Any]:
    """Correlations on ``train`` (what the exits were fitted to, with forgetting) and ``dev``.

    Args:
        path: Run directory.
        display: Where progress is shown.
        train: The store that the policy learnt on; read here where it is of the whole training set.
        dev: The store of dev.
        model: The finished model.
        seed: Of the run; decides which instances are drawn from a large training set.
    """
    instances = Instances.open(path / "data" / "train.arrow")
    if train.instances_fingerprint == instances.fingerprint:
        fitted = Answered(np.asarray(train.ids), np.asarray(train.losses), np.asarray(train.correct))
    else:
        fitted = _answered(path, display, instances, model, seed)
    held = Answered(np.asarray(dev.ids), np.asarray(dev.losses), np.asarray(dev.correct))
    found = correlations(fitted)
    found |= against_forgetting(fitted, path / "init" / "forgetting.arrow")
    return {"train": found, "dev": correlations(held)}


def _answered(path: Path, display: Display, instances: Instances, model: EarlyExitModel, seed: int) -> Answered:
    if len(instances) > MOST_INSTANCES:
        rng = np.random.default_rng(derive_seed(seed, "analysis", "train"))
        instances = instances.take(np.sort(rng.choice(len(instances), MOST_INSTANCES, replace=False)))
    file = path / "analysis" / "final-train.safetensors"
    logits = kept_logits(file, model, instances, display, "finished exits on the training set")
    labels = np.array(instances.labels)
    return Answered(np.array(instances.ids), losses_of(logits, labels), logits.argmax(-1) == labels[:, None])


def correlations(found: Answered) -> dict[str, Any]:
    """Memorized layer against loss, and the mean loss of each memorized layer's instances."""
    memorized, losses = memorized_layer(found.correct), found.losses.astype(np.float64)
    groups = [memorized == layer for layer in range(1, losses.shape[1] + 1)]
    return {
        "num_instances": len(losses),
        "loss": _correlation(spearman(memorized, losses[:, -1])),
        "mean_loss": _correlation(spearman(memorized, losses.mean(1))),
        "forgetting": None,
        "forgetting_note": None,
        "by_memorized": {
            "count": [int(group.sum()) for group in groups],
            "loss": [_mean(losses[group, -1]) for group in groups],
        },
        "forgotten": None,
    }


def against_forgetting(found: Answered, file: Path) -> dict[str, Any]:
    """Memorized layer against forgetting events; ``forgetting_note`` says why there is none.

    Args:
        found: The instances.
        file: Record of the initialisation's visits.

    Raises:
        RunError: The record is damaged.
    """
    if not file.is_file():
        return {"forgetting_note": "the run has no init/forgetting.arrow, since an earlier version trained it"}
    visits = read_visits(file)
    if not visits.num_rows:
        return {"forgetting_note": "the initialisation had no epochs"}
    record = forgetting(*(visits[name].to_numpy() for name in ("id", "epoch", "correct")))
    place = np.minimum(np.searchsorted(record.ids, found.ids), len(record.ids) - 1)
    known = record.ids[place] == found.ids
    if not known.any():
        return {"forgetting_note": "init/forgetting.arrow is of other instances"}
    events, memorized = record.hardness()[place[known]], memorized_layer(found.correct)[known]
    layers = range(1, found.losses.shape[1] + 1)
    return {
        "forgetting": {
            "spearman": _correlation(spearman(memorized, events)),
            "num_instances": int(known.sum()),
            "epochs": record.visits,
            "mean_events": float(record.events[place[known]].mean()),
            "never_learnt": int((~record.learnt[place[known]]).sum()),
        },
        "forgotten": [_mean(events[memorized == layer] > 0) for layer in layers],
    }


def _correlation(found: Correlation | None) -> dict[str, Any] | None:
    return None if found is None else {"value": found.value, "interval": [found.low, found.high]}


def _mean(values: npt.NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None
