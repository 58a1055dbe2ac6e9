"""A saved model made ready for use: profiled, calibrated, pruned; what is found is kept in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from rl_exit.config import RunConfig, load_config
from rl_exit.costs import CostModel, read_costs, write_costs
from rl_exit.criteria import LEARNED, Criterion, StoredSplit, load_criterion
from rl_exit.criteria.learned import learned_words
from rl_exit.data.instances import Instances
from rl_exit.data.tasks import TextSplit, load_labelled, tokenise
from rl_exit.dial import DialSettings, dial_exits, save_dial, train_dial
from rl_exit.errors import ConfigError, DataError, RunError
from rl_exit.files import read_json, write_json, write_text
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.models.policy import PolicyHeads
from rl_exit.models.prune import pruned
from rl_exit.operating import Clocked, OperatingPoint, gather, point_by_loss, point_by_speed
from rl_exit.profiling import profile, surroundings
from rl_exit.progress import Display

SPEEDS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
"""Where a dial is compared with policies for one price."""
# Criteria that learn nothing and have a threshold of natural range: what `--criterion all` tries beside the policy.
PLAIN = ("max_probability", "entropy", "calm_softmax", "pabee")
_ANY: dict[str, dict[str, Any]] = {"pabee": {"patience": 1}, "consistentee": {}}
_READ_STATES = ("lte", "calm_meta", "calm_saturation", "cat", "palbert", "jei")


def model_folder(target: Path) -> Path:
    """The folder of a model or of a run's model.

    Raises:
        RunError: A run that has none yet, or no folder.
    """
    inside = target / "model"
    folder = inside if (inside / "config.json").is_file() else target
    if not (folder / "config.json").is_file():
        what = "this run has no model yet; finish it with --resume" if folder.is_dir() else "no such model folder"
        raise RunError(f"{target}: {what}")
    return folder


def costs_of(
    model: EarlyExitModel, folder: Path, display: Display, sizes: Sequence[int] = (), again: bool = False
) -> CostModel:
    """Measured times of a model on this machine: those kept beside it, where they are of this machine; else measured.

    Args:
        model: The model.
        folder: Its folder.
        display: Where progress is shown.
        sizes: Batch sizes to measure at; default: those of :func:`rl_exit.profiling.profile`.
        again: Measure anew.
    """
    known = None if again else read_costs(folder)
    here = surroundings(model)
    if known is not None and all(known.where.get(key) == here[key] for key in ("device", "cpu", "threads", "dtype")):
        return known
    with display.step("profile", 6) as progress:
        costs = profile(model, **({"batch_sizes": sizes} if sizes else {}), progress=progress)  # type: ignore[arg-type]
    write_costs(folder, costs)
    return costs


def calibration_texts(folder: Path, data: Path | None, labelled: bool) -> tuple[TextSplit, str]:
    """Texts to calibrate on, and where they come from in words.

    Args:
        folder: The model's folder; ``training.yaml`` in it names the columns.
        data: A file; None: the dev split that the model was chosen on.
        labelled: Whether labels are needed.

    Raises:
        DataError: No such file, or unusable.
    """
    from rl_exit.data.tasks import load_task

    config = _trained(folder)
    names = _names(folder)
    if data is not None:
        return load_labelled(str(data), config.task, names, labelled), str(data)
    if not (folder / "training.yaml").is_file():
        raise DataError(f"{folder}: the model does not say what it was trained on; name texts with --data FILE")
    task = load_task(config.task, config.seed)
    if list(task.label_names) != names:
        raise DataError(f"{folder}: its training data has other classes by now; name texts with --data FILE")
    return task.splits["dev"], f"dev of {task.name}"


def rules_of(folder: Path, words: Sequence[str]) -> list[Criterion]:
    """Criteria by their words; ``all``: the policy, those that learn nothing, and those learned in the folder.

    Raises:
        UserError: Unknown, or not learned yet.
    """
    wanted = list(words) or ["consistentee"]
    if "all" in wanted:
        learned = learned_words(folder / "criteria")
        wanted = ["consistentee", *PLAIN, *learned]
    return [_rule(folder, word) for word in dict.fromkeys(wanted)]


def calibrate(
    target: Path,
    display: Display,
    *,
    speedup: float | None = None,
    max_loss: float | None = None,
    confidence: float = 0.95,
    data: Path | None = None,
    words: Sequence[str] = (),
    name: str | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Choose an operating point and save it with the model.

    Args:
        target: Model folder or run directory.
        display: Where progress is shown.
        speedup: Times as fast as full depth; or
        max_loss: points of accuracy that may be lost.
        confidence: Of the bound on the loss.
        data: File of calibration texts; None: the dev split.
        words: Criteria to choose from; none: the policy.
        name: Of the point; default: ``fast`` for a speed, ``safe`` for a loss.
        batch_size: Texts that will run together.

    Returns:
        The point as it is saved, with ``name``.

    Raises:
        UserError: See :mod:`rl_exit.operating`.
    """
    if (speedup is None) == (max_loss is None):
        raise ConfigError("give either --speedup or --max-loss")
    folder = model_folder(target)
    rules = rules_of(folder, words)
    texts, origin = calibration_texts(folder, data, labelled=max_loss is not None or len(rules) > 1)
    model = EarlyExitModel.from_pretrained(folder)
    costs = costs_of(model, folder, display)
    instances = tokenise(texts, model.tokenizer, model.config.max_tokens)
    states = any(rule.name in _READ_STATES for rule in rules)
    with display.step("every exit", len(instances)) as progress:
        labelled = max_loss is not None or len(rules) > 1 or data is None
        evidence = gather(model, instances, labelled, states, progress)
    if speedup is not None:
        point = point_by_speed(rules, evidence, costs, speedup, batch_size, Clocked(model, instances, batch_size))
    else:
        assert max_loss is not None
        point = point_by_loss(rules, evidence, costs, max_loss / 100.0, confidence, batch_size)
    chosen = name or ("fast" if speedup is not None else "safe")
    saved = save_point(folder, chosen, point, origin, len(instances))
    return {"name": chosen, **saved}


def save_point(folder: Path, name: str, point: OperatingPoint, origin: str, count: int) -> dict[str, Any]:
    """Write a point into the model's config.json; one of the same name is replaced.

    Returns:
        What was written.
    """
    if not name or not name.isidentifier():
        raise ConfigError(f"--name {name!r}: letters, digits and underscores are accepted, e.g. fast")
    path = folder / "config.json"
    tree = read_json(path)
    entry = {**point.to_dict(), "data": origin, "texts": count, "date": date.today().isoformat()}
    tree["operating_points"] = {**(tree.get("operating_points") or {}), name: entry}
    write_json(path, tree)
    return entry


def make_dial(
    target: Path, display: Display, data: Path | None = None, settings: DialSettings | None = None, seed: int = 0
) -> dict[str, Any]:
    """Train a dial (:mod:`rl_exit.dial`), compare it with policies for single prices, and save it with the model.

    Args:
        target: Model folder or run directory.
        display: Where progress is shown.
        data: File of texts that the exits were not trained on; None: those that the run held out for its policy.
        settings: Of the training.
        seed: Of the training.

    Returns:
        ``curve``: for each speed the mean exit layer and accuracy on dev of the dial and of a policy trained for that
        price alone; ``trained_on``: how many texts.

    Raises:
        UserError: No such data.
    """
    how = settings or DialSettings()
    folder = model_folder(target)
    model = EarlyExitModel.from_pretrained(folder)
    if data is None:
        held = target / "data" / "held.arrow"
        if not held.is_file():
            raise DataError(
                f"{target}: no texts were held out from its exits (policy.holdout) for a dial to learn on; name some "
                "with --data FILE"
            )
        instances = Instances.open(held)
    else:
        split, _ = calibration_texts(folder, data, labelled=True)
        instances = tokenise(split, model.tokenizer, model.config.max_tokens)
    dev, origin = calibration_texts(folder, None, labelled=True)
    measured = tokenise(dev, model.tokenizer, model.config.max_tokens)
    with display.step("every exit", len(instances) + len(measured)) as progress:
        train = gather(model, instances, progress=progress).split
        test = gather(model, measured).split
    curve = []
    with display.step("dial", 1 + len(SPEEDS)) as progress:
        heads = train_dial(train, how, seed)
        progress.update(1)
        for number, speed in enumerate(SPEEDS):
            alone = train_dial(train, how, seed, fixed_speed=speed)
            curve.append(
                {"speed": speed, "alpha": how.low * (how.high / how.low) ** speed}
                | {"dial": _outcome(heads, test, speed), "alone": _outcome(alone, test, speed)}
            )
            progress.update(2 + number)
    full = float(test.correct[:, -1].mean())
    found = {"trained_on": len(instances), "measured_on": f"{len(measured)} texts, {origin}", "full_depth": full}
    save_dial(folder, heads, model.config.num_labels, {**found, "curve": curve, "settings": asdict(how), "seed": seed})
    return {**found, "curve": curve}


def _outcome(heads: PolicyHeads, split: StoredSplit, speed: float) -> dict[str, float]:
    left = dial_exits(heads, split, speed).numpy()
    right = split.correct[np.arange(len(left)), left - 1]
    return {"mean_exit_layer": float(left.mean()), "accuracy": float(right.mean())}


def prune_model(folder: Path, out: Path, depth: int) -> tuple[int, int]:
    """Write a copy of a model cut to a depth (:func:`rl_exit.models.prune.pruned`).

    Returns:
        Weights before and after.

    Raises:
        UserError: Depth out of range, or a folder that is there already.
    """
    if out.exists():
        raise ConfigError(f"{out}: is there already; name a new folder")
    model = EarlyExitModel.from_pretrained(folder)
    small = pruned(model, depth)
    small.save_pretrained(out)
    if (folder / "training.yaml").is_file():
        write_text(out / "training.yaml", (folder / "training.yaml").read_text(encoding="utf-8"))
    return model.num_parameters(), small.num_parameters()


def _rule(folder: Path, word: str) -> Criterion:
    params = _ANY.get(word, {} if word in LEARNED else {"threshold": 0.5})
    return load_criterion(folder / "criteria", word, **params)


def _trained(folder: Path) -> RunConfig:
    file = folder / "training.yaml"
    return load_config(file) if file.is_file() else load_config(None, ["task.name=local"])


def _names(folder: Path) -> list[str]:
    names = read_json(folder / "config.json").get("id2label") or {}
    return [str(names[str(number)]) for number in range(len(names))]
