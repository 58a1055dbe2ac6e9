"""What a sweep consists of: its trials, their names, and the initialisations that they share. Reads no Ray.

A sweep is a folder of run directories::

    runs/<sweep>/<trial>/            one finished run per trial, for rl-exit compare
    runs/<sweep>/.init/<name>/       the shared initialisations: run directories that end after that step
    runs/<sweep>/.logs/<name>.log    what each wrote while it worked
    runs/<sweep>/sweep.json          settings, states and results
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rl_exit.config import RunConfig, describe_keys, load_config, parse_yaml
from rl_exit.errors import ConfigError, RunError, nearest
from rl_exit.trainers.run_directory import RunDirectory, changed_keys, flat

SHORT_KEYS = {"alpha": "reward.alpha"}
# Keys of the sweep itself, not of its trials.
OWN_KEYS = ("name", "output_dir", "storage_path", "cluster", "init.model")
INIT_FOLDER = ".init"
LONGEST_NAME = 120

# What the initialised model does not depend on, by section or key; whatever is not named here, it may depend on.
_LATER = (
    *("reward", "policy", "sampling", "learners", "store", "task_step", "placement", "alternation", "inference"),
    *("generation", "storage_path", "tracking"),
    *("recipe", "algorithm", "name", "output_dir", "cluster", "keep_rounds", "init.model", "model.policy_width"),
)
# Of those, the ones that it does depend on after all.
_EARLIER = ("policy.holdout", "task_step.num_workers", "task_step.use_gpu")


@dataclass(frozen=True)
class Initialisation:
    """A training that trials share.

    Attributes:
        name: Unique in the sweep.
        config: Of the run directory in which its data and init steps are done.
    """

    name: str
    config: RunConfig

    @property
    def label(self) -> str:
        """Its name where trials are named too."""
        return f"initialisation {self.name}"

    @property
    def model(self) -> Path:
        """Folder of the initialised model."""
        return self.config.run_dir / "init" / "model"


@dataclass(frozen=True)
class Trial:
    """One run of the sweep.

    Attributes:
        name: Of its run directory.
        settings: Swept key -> value; without the seed.
        config: Its whole configuration.
        initialisation: The one it starts from; None where the configuration gives ``init.model`` itself.
    """

    name: str
    settings: dict[str, Any]
    config: RunConfig
    initialisation: Initialisation | None

    @property
    def label(self) -> str:
        """Its name."""
        return self.name


@dataclass(frozen=True)
class SweepPlan:
    """A whole sweep.

    Attributes:
        folder: Where it is kept.
        over: Swept key -> values, in the order given.
        seeds: Seeds of each setting.
        trials: Settings in the order of ``over``, the last key fastest, then seeds.
        initialisations: What the trials start from.
    """

    folder: Path
    over: dict[str, tuple[Any, ...]]
    seeds: tuple[int, ...]
    trials: tuple[Trial, ...]
    initialisations: tuple[Initialisation, ...]


def plan_sweep(
    path: str | None, overrides: Sequence[str], over: Sequence[str], num_seeds: int = 1, output: Path | None = None
) -> SweepPlan:
    """Lay out a sweep.

    Args:
        path: Configuration file; None starts from the defaults.
        overrides: ``key=value`` words for all trials.
        over: ``key=value,value,...`` words; every combination of their values is a setting.
        num_seeds: Runs of each setting, with the seeds ``seed``, ``seed + 1``, ...
        output: Folder of the sweep; default: one named after the task and the keys, in ``output_dir``.

    Raises:
        ConfigError: An unknown key, a value that is not accepted, or nothing to sweep over.
    """
    base = load_config(path, overrides)
    grid = parse_over(over)
    if not grid and num_seeds < 2:
        raise ConfigError("there is nothing to sweep over: give --over key=value,value or --seeds 2 or more")
    if "seed" in grid and num_seeds > 1:
        raise ConfigError("the seeds are given twice: by --over seed=... and by --seeds")
    seeds = tuple(_whole(seed) for seed in grid.pop("seed", ()) or range(base.seed, base.seed + num_seeds))
    short = short_keys(grid)
    folder = output or Path(base.output_dir) / shortened(f"{base.run_name}-{'-'.join(short.values()) or 'seeds'}")
    trials: list[Trial] = []
    shared: dict[str, Initialisation] = {}
    for values, seed in itertools.product(itertools.product(*grid.values()), seeds):
        given = dict(zip(grid, values, strict=True))
        words = [f"{key}={_as_yaml(value)}" for key, value in {**given, "seed": seed}.items()]
        config = load_config(path, [*overrides, *words])
        typed = flat(config.model_dump(mode="json"))
        settings = {key: typed[key] for key in grid}
        labels = {**{short[key]: value for key, value in settings.items()}, "seed": seed}
        start = None
        if config.init.model is None:
            start = _initialisation(config, folder, {short[key]: settings[key] for key in grid if decides_init(key)})
            start = shared.setdefault(start.name, start)
        trials.append(_trial(config, folder, settings, trial_name(labels), start))
    if len({trial.name for trial in trials}) < len(trials):
        raise ConfigError(f"--over {' '.join(over)}: a value is given twice")
    swept = {key: tuple(dict.fromkeys(_hashable(trial.settings[key]) for trial in trials)) for key in grid}
    return SweepPlan(folder, swept, seeds, tuple(trials), tuple(shared.values()))


def _whole(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"--over seed: {seed!r} is no whole number")
    return seed


def parse_over(words: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Read ``key=value,value,...`` words; values are YAML, and commas inside brackets part none.

    Raises:
        ConfigError: An unknown or repeated key, or no, unreadable or repeated values.
    """
    known = [key for key, _, _ in describe_keys()]
    grid: dict[str, tuple[Any, ...]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        key = SHORT_KEYS.get(name, name)
        if not equals or not text.strip():
            raise ConfigError(f"--over {word}: the form is key=value,value,..., e.g. --over alpha=0.003,0.01")
        if key in OWN_KEYS:
            raise ConfigError(
                f"--over {word}: '{key}' cannot be swept over; every trial has a run directory of its own"
            )
        if key not in known:
            raise ConfigError(f"--over {word}: unknown key '{key}'.{nearest(key, known)}")
        if key in grid:
            raise ConfigError(f"--over {word}: '{key}' is given twice; name all its values in one --over")
        try:
            values = parse_yaml(f"[{text}]")
        except yaml.YAMLError:
            raise ConfigError(f"--over {word}: the values are not valid YAML") from None
        if len({json.dumps(value, default=str) for value in values}) < len(values):
            raise ConfigError(f"--over {word}: a value is given twice")
        grid[key] = tuple(values)
    return grid


def decides_init(key: str) -> bool:
    """Whether the initialised model depends on a configuration key."""
    if key in _EARLIER:
        return True
    return not any(key == later or key.startswith(f"{later}.") for later in _LATER)


def short_keys(keys: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """The last part of each key where that tells them apart, else the whole key."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: end if last.count(end) == 1 and end != "seed" else key for key, end in zip(keys, last, strict=True)}


def trial_name(labels: Mapping[str, Any]) -> str:
    """A folder name that says the settings: ``alpha-0.05-seed-1``."""
    return shortened("-".join(f"{name}-{_as_word(value)}" for name, value in labels.items()))


def shortened(name: str) -> str:
    """A name that fits a folder; a long one ends in a hash of the whole."""
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{_hash(name)}"


def check_resumable(plan: SweepPlan) -> None:
    """Refuse a folder that holds something else, before anything is written.

    Raises:
        RunError: No sweep, or one of its runs was made from another configuration.
    """
    if plan.folder.exists() and (
        not plan.folder.is_dir() or (any(plan.folder.iterdir()) and not (plan.folder / "sweep.json").is_file())
    ):
        raise RunError(f"{plan.folder}: exists and is no sweep; choose another folder with --output")
    for config in (*(start.config for start in plan.initialisations), *(trial.config for trial in plan.trials)):
        if not (config.run_dir / "config.yaml").is_file():
            continue
        changed = changed_keys(RunDirectory.open(config.run_dir).config, config)
        if changed:
            raise RunError(
                f"{config.run_dir}: this sweep was made with another configuration: {changed}; "
                "choose another folder with --output"
            )


def _trial(config: RunConfig, folder: Path, settings: dict[str, Any], name: str, start: Initialisation | None) -> Trial:
    init = config.init if start is None else config.init.model_copy(update={"model": str(start.model)})
    place = config.storage_path and f"{config.storage_path.rstrip('/')}/{folder.name}"
    own = config.model_copy(update={"name": name, "output_dir": str(folder), "storage_path": place, "init": init})
    return Trial(name, settings, own, start)


def _initialisation(config: RunConfig, folder: Path, labels: Mapping[str, Any]) -> Initialisation:
    # Only what decides it is taken over, so that all trials that share it agree on its configuration.
    tree = {key: value for key, value in flat(config.model_dump(mode="json")).items() if decides_init(key)}
    own = load_config(None, [f"{key}={_as_yaml(value)}" for key, value in tree.items()])
    # The hash keeps apart what the labels do not tell, such as two recipes.
    name = f"{trial_name({**labels, 'seed': config.seed})}-{_hash(json.dumps(tree, sort_keys=True))}"
    return Initialisation(name, own.model_copy(update={"name": name, "output_dir": str(folder / INIT_FOLDER)}))


def _as_yaml(value: Any) -> str:
    """A value as one line that YAML reads back as the same."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"inf": ".inf", "-inf": "-.inf"}.get(str(value), ".nan")
    return json.dumps(value, default=str)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_word(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        text = str(value).lower()
    elif isinstance(value, float):
        text = f"{value:g}"
    elif isinstance(value, (list, tuple)):
        text = "+".join(_as_word(item) for item in value) or "none"
    else:
        text = str(value)
    plain = re.sub(r"[^\w.+-]", "_", text)
    # Two texts that are written alike stay apart.
    return plain if plain == text else f"{plain}-{_hash(text)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
