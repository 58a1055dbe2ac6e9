"""What a finished run says of dev and test: predictions of every exit and the scores of every criterion.

A run has two sets of exits: those of its finished model (``final``) and those after initialisation (``initial``). For
each, one pass of the model fills a state store, learned criteria are fitted (on the instances that the run's policy was
trained on, so that none has better data), and every criterion is asked once. All of it is kept, so that a second
comparison reads a few small files::

    RUN/compare/<set>/evidence.json          what it was made from
    RUN/compare/<set>/<split>.safetensors    ids, labels, predictions, score.<criterion>, answers.<criterion>
    RUN/compare/<set>/criteria/              learned criteria
    RUN/compare/<set>/store-<split>/         states and logits, where the run keeps none that fit
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from rl_exit.comparison.evidence import CONSISTENTEE, FINAL, INITIAL, ExitSet, Scores, SeedRun, Split
from rl_exit.criteria import CRITERIA, LEARNED, Criterion, StoredSplit, criterion, load_criterion, save_criterion
from rl_exit.criteria.fitting import fit_criterion
from rl_exit.criteria.learned import learned_words
from rl_exit.criteria.stored import scores_from_store
from rl_exit.data.instances import Instances
from rl_exit.deployment import costs_of
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import RunError
from rl_exit.files import atomic_file, read_json, write_json
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.progress import Display
from rl_exit.seeding import derive_seed
from rl_exit.trainers.run_directory import RunDirectory
from rl_exit.trainers.store_evaluation import answers_of, deciding_logits
from rl_exit.trainers.store_phase import build_store, model_fingerprint

FORMAT = 3
FIT_INSTANCES = 20_000  # Learned criteria are fitted on so many training instances at most.
# Fitted on dev, as published: it needs data that the exits were not trained on.
ON_DEV = ("right_tool",)
_ANY_VALUE: dict[str, Any] = {"threshold": 0.5, "patience": 1, "depth": 1}


def run_evidence(
    run: RunDirectory, split: str, words: Sequence[str], display: Display, by_time: bool = False
) -> SeedRun:
    """Read what is kept of a run, and compute what is missing.

    Args:
        run: A finished run.
        split: ``test`` or ``dev``: what is measured.
        words: Criteria.
        display: Where progress is shown.
        by_time: Layers cost their measured time on this machine (:func:`rl_exit.deployment.costs_of`).

    Returns:
        One exit set, ``final``, where the best round is that of the initial exits; else also ``initial``.

    Raises:
        RunError: The run's model or data is missing or damaged.
    """
    splits = ["dev"] if split == "dev" else [split, "dev"]
    final = _Exits(run, FINAL, run.path / "model", run.path / "model")
    first = run.path / "rounds" / "1" / "model"
    initial = _Exits(run, INITIAL, run.path / "init" / "model", first if first.is_dir() else None)
    sets = [final] if final.fingerprint == initial.fingerprint else [final, initial]
    found = {}
    for exits in sets:
        if exits.fingerprint == initial.fingerprint:
            exits.trained_along = run.path / "init" / "model" / "criteria"
        found[exits.name] = exits.read(splits, words, display)
    if by_time:
        costs = _measured_costs(run, split, display)
        found = {
            name: replace(one, split=_at(one.split, costs), dev=_at(one.dev, costs)) for name, one in found.items()
        }
    return SeedRun(run.config.seed, str(run.path), found, final.rule)


def _measured_costs(run: RunDirectory, split: str, display: Display) -> npt.NDArray[np.float64]:
    """Time of leaving at each layer in units of a layer, at the run's batch size and a usual length, [L]."""
    folder = run.path / "model"
    costs = costs_of(EarlyExitModel.from_pretrained(folder).eval(), folder, display)
    length = int(np.median(Instances.open(run.instances(split)).lengths))
    return costs.in_layers(run.config.inference.batch_size, length)


def _at(split: Any, costs: npt.NDArray[np.float64]) -> Any:
    return None if split is None else replace(split, costs=costs)


def own_threshold(word: str, cut: float) -> float:
    """The threshold on a criterion's own scale that leaves wherever the turned score exceeds a cut."""
    kind: Any = CRITERIA[word]
    return float(kind.threshold_above(cut))


class _Exits:
    """One set of exits of a run, and what is kept of it."""

    def __init__(self, run: RunDirectory, name: str, model: Path, policy: Path | None) -> None:
        self.run = run
        self.name = name
        self.model_folder = model
        self.policy_folder = policy
        self.trained_along: Path | None = None
        self.folder = run.path / "compare" / name
        if not (model / "model.safetensors").is_file():
            raise RunError(f"{model}: no model here; finish the run with --resume, or repeat it")
        self._models: dict[Path, EarlyExitModel] = {}
        self.fingerprint = self._known_fingerprint()

    def read(self, splits: Sequence[str], words: Sequence[str], display: Display) -> ExitSet:
        """Labels, predictions and scores; the first split is what is measured."""
        usable = [word for word in words if word != CONSISTENTEE or self._has_policy()]
        arrays = {split: self._arrays(split, usable, display) for split in splits}
        made = {name: _split(found, self.num_classes) for name, found in arrays.items()}
        dev = "dev" if len(splits) > 1 else None
        scores = {
            word: Scores(
                arrays[splits[0]][f"score.{word}"],
                arrays[dev][f"score.{word}"] if dev else None,
                lambda cut, word=word: own_threshold(word, cut),  # type: ignore[misc]
                arrays[splits[0]].get(f"answers.{word}"),
                arrays[dev].get(f"answers.{word}") if dev else None,
            )
            for word in usable
        }
        return ExitSet(self.name, made[splits[0]], made[dev] if dev else None, scores)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(read_json(self.run.path / "data" / "task.json")["label_names"])

    def _known_fingerprint(self) -> str:
        """The fingerprint of the model, from what is kept if the model's files are the same."""
        stamp = {
            "format": FORMAT,
            "model": _stamp(self.model_folder / "model.safetensors"),
            "policy": _stamp(self.policy_folder / "model.safetensors") if self.policy_folder else None,
            **({} if self.rule == "learned" else {"rule": self.rule}),
        }
        known = self.folder / "evidence.json"
        if known.is_file():
            tree = read_json(known)
            if tree.get("stamp") == stamp:
                return str(tree["fingerprint"])
        found = model_fingerprint(self._model(self.model_folder))
        # Stores and fits check themselves; scores do not.
        shutil.rmtree(self.folder, ignore_errors=True)
        write_json(known, {"stamp": stamp, "fingerprint": found})
        return found

    @property
    def rule(self) -> str:
        """By what the policy's model decides: ``learned`` heads, or ``confidence``."""
        found = read_json(self.policy_folder / "config.json").get("policy_rule") if self.policy_folder else None
        return str(found or "learned")

    def _has_policy(self) -> bool:
        """Whether a policy was trained on these exits."""
        if self.policy_folder is None or self.policy_folder == self.model_folder:
            return self.policy_folder is not None
        if (self.folder / "dev.safetensors").is_file() and f"score.{CONSISTENTEE}" in _names(self.folder):
            return True
        return model_fingerprint(self._model(self.policy_folder)) == self.fingerprint

    def _arrays(self, split: str, words: Sequence[str], display: Display) -> dict[str, npt.NDArray[Any]]:
        """Kept arrays of a split, missing scores added."""
        path = self.folder / f"{split}.safetensors"
        kept: dict[str, npt.NDArray[Any]] = dict(load_file(path)) if path.is_file() else {}
        missing = [word for word in words if f"score.{word}" not in kept]
        if kept and not missing:
            return kept
        store = self._store(split, display)
        stored = _stored(store)
        if not kept:
            predictions = np.argmax(store.logits, axis=-1).astype(np.int64)
            kept = {"ids": np.array(store.ids), "labels": np.array(store.labels), "predictions": predictions}
        self._fit([word for word in missing if word in LEARNED], display)
        title = f"{self.run.path.name}: criteria on {split}, {self.name} exits"
        with display.step(title, len(missing)) as progress:
            for done, word in enumerate(missing):
                progress.update(done, word)
                asked = stored
                if word == CONSISTENTEE:
                    assert self.policy_folder is not None  # usable words only
                    model = self._model(self.policy_folder)
                    answers = answers_of(store, model.answer_heads)
                    asked = replace(stored, exit_logits=deciding_logits(store, model, answers))
                    if answers is not None:
                        kept[f"answers.{word}"] = answers.argmax(-1).astype(np.int64)
                kept[f"score.{word}"] = scores_from_store(self._criterion(word), asked)
        with atomic_file(path) as beside:
            save_file({name: np.ascontiguousarray(array) for name, array in kept.items()}, beside)
        return kept

    def _fit(self, words: Sequence[str], display: Display) -> None:
        """Fit the learned criteria that neither came with the exits nor were fitted before."""
        todo = [word for word in words if self._learned_in(word) is None]
        if not todo:
            return
        train = self._store("train", display) if set(todo) - set(ON_DEV) else None
        dev = self._store("dev", display)
        with display.step(f"{self.run.path.name}: fitting criteria, {self.name} exits", len(todo)) as progress:
            for done, word in enumerate(todo):
                progress.update(done, word)
                split = _stored(dev if word in ON_DEV or train is None else train)
                if split.num_instances > FIT_INSTANCES:
                    split = split.select(self._drawn(split.num_instances))
                fitted = fit_criterion(
                    word, split, derive_seed(self.run.config.seed, "criteria", word), **any_value(word)
                )
                save_criterion(fitted, self.folder / "criteria")

    def _criterion(self, word: str) -> Criterion:
        """A criterion at any threshold: its scores do not depend on it."""
        if word not in LEARNED:
            return criterion(word, **any_value(word))
        folder = self._learned_in(word)
        assert folder is not None  # fitted before
        return load_criterion(folder, word, **any_value(word))

    def _learned_in(self, word: str) -> Path | None:
        """Folder of what a criterion learned along with the exits, or on them."""
        folders = (self.trained_along, self.folder / "criteria")
        return next((folder for folder in folders if folder is not None and word in learned_words(folder)), None)

    def _drawn(self, count: int) -> npt.NDArray[np.int64]:
        """Rows that learned criteria are fitted on, ascending."""
        rng = np.random.default_rng(derive_seed(self.run.config.seed, "criteria", "rows"))
        return np.sort(rng.choice(count, FIT_INSTANCES, replace=False))

    def _store(self, split: str, display: Display) -> StateStore:
        """A store of these exits: one the run keeps, one made before, or a new one."""
        instances = Instances.open(self._instances(split))
        kept = sorted((self.run.path / "rounds").glob(f"*/store-{split}"))
        found = self._fitting_store(kept, instances)
        if found is not None:
            return found
        if split == "train" and len(instances) > FIT_INSTANCES:
            instances = instances.take(self._drawn(len(instances)))
        own = self.folder / f"store-{split}"
        found = self._fitting_store([own], instances)
        if found is not None:
            return found
        settings = self.run.config.store
        model = self._model(self.model_folder)
        with display.step(f"{self.run.path.name}: states of {split}, {self.name} exits", len(instances)) as progress:
            return build_store(
                model, instances, own, settings.dtype, settings.shard_size, settings.batch_size, progress
            )

    def _instances(self, split: str) -> Path:
        """File of a split; for training, the instances that the run's policy was trained on."""
        policy, data = self.run.config.policy, self.run.path / "data"
        if split == "train" and policy.holdout and (data / f"{policy.instances}.arrow").is_file():
            return data / f"{policy.instances}.arrow"
        return data / f"{split}.arrow"

    def _fitting_store(self, folders: Iterable[Path], instances: Instances) -> StateStore | None:
        """The first store of this model and these instances."""
        for folder in folders:
            if (folder / "store.json").is_file():
                store = StateStore.open(folder)
                if (store.model_fingerprint, store.instances_fingerprint) == (self.fingerprint, instances.fingerprint):
                    return store
        return None

    def _model(self, folder: Path) -> EarlyExitModel:
        if folder not in self._models:
            self._models[folder] = EarlyExitModel.from_pretrained(folder).eval()
        return self._models[folder]


def any_value(word: str) -> dict[str, Any]:
    """Any value for the parameters that a criterion cannot be made without."""
    needed = inspect.signature(CRITERIA[word]).parameters.values()
    return {p.name: _ANY_VALUE[p.name] for p in needed if p.name in _ANY_VALUE and p.default is p.empty}


def _stored(store: StateStore) -> StoredSplit:
    return StoredSplit(store.labels, store.logits, store.losses, store.correct, store.states)


def _split(arrays: dict[str, npt.NDArray[Any]], num_classes: int) -> Split:
    return Split(arrays["ids"], arrays["labels"], arrays["predictions"], num_classes)


def _names(folder: Path) -> list[str]:
    return list(load_file(folder / "dev.safetensors"))


def _stamp(path: Path) -> list[int] | None:
    """Size and time of a file; None where it is missing."""
    if not path.is_file():
        return None
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]
