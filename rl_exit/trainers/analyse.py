"""Evidence for ``rl-exit analyse``: the paper's figures and tables from a finished run.

Most is read from the run directory. Computed are a pass of the initialised model over dev and, where the policy learnt
on instances of its own, one of the finished model over training instances (both are kept in ``analysis/``); and, on the
kept state store, one exact policy per reward and alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_exit.analysis import exit_figures
from rl_exit.analysis.trade_off import default_alphas, points_of, policy_row, prices_of, reward_row
from rl_exit.config import RunConfig
from rl_exit.data.instances import Instances
from rl_exit.envs.state_store import StateStore
from rl_exit.errors import RunError, UserError
from rl_exit.evaluation import exit_layers, log_odds
from rl_exit.files import read_json, write_json
from rl_exit.measurement import losses_of
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.progress import Display
from rl_exit.seeding import derive_seed
from rl_exit.trainers.analyse_hardness import hardness
from rl_exit.trainers.exact_policy import exact_policy
from rl_exit.trainers.kept_logits import kept_logits
from rl_exit.trainers.policy_store import answer_ids, fit_answers, policy_store
from rl_exit.trainers.run_directory import RunDirectory, refuse_generation, versions
from rl_exit.trainers.store_evaluation import answers_of, deciding_logits, evaluate_store, exit_logits_of
from rl_exit.trainers.store_phase import model_fingerprint

REWARDS = ("vanilla", "hardness", "correctness")
PAPER_THRESHOLD = 0.5
FOLDER = "analysis"


def analyse(path: Path, display: Display, alphas: Sequence[float] | None = None) -> dict[str, Any]:
    """Analyse a finished run and write ``analysis/analysis.json``.

    Args:
        path: Run directory.
        display: Where progress is shown.
        alphas: Prices of a layer in nats to train policies at; the reward of being right takes a tenth of each, since
            its unit is larger. Default: around the run's own, a factor of two apart.

    Returns:
        The contents of the file: ``exits`` (Fig. 2), ``hardness`` (Table 1), ``rewards`` (Fig. 4), ``alphas`` (Fig. 5).

    Raises:
        RunError: No finished run, or its state stores are gone.
    """
    run = RunDirectory.open(path)
    refuse_generation(path, "analyse")
    if not (path / "results.json").is_file():
        raise RunError(f"{path}: this run is not finished; continue it with rl-exit train --resume")
    results = read_json(path / "results.json")
    train, dev = _store(path, results, "train"), _store(path, results, "dev")
    model = EarlyExitModel.from_pretrained(path / "model")
    tree: dict[str, Any] = {
        "run_name": results["run_name"],
        "task": results["task"],
        "metric": results["metric"],
        "num_layers": results["num_layers"],
        "seed": results["seed"],
        "round": results["best_round"],
        "threshold": results["threshold"],
        "objective": run.config.init.objective,
        "reward": run.config.reward.model_dump(),
        "num_policy": train.num_instances,
        "num_dev": dev.num_instances,
        "full_depth_score": results["initial_full_depth"]["dev"],
        "exits": _exits(path, display, dev, model, results["threshold"]),
        "hardness": hardness(path, display, train, dev, model, run.config.seed),
        **_rewards(path, run.config, display, train, dev, model, results, alphas),
        "versions": versions(),
    }
    write_json(path / FOLDER / "analysis.json", tree)
    return tree


def parse_alphas(words: str | None) -> tuple[float, ...] | None:
    """Numbers with commas between, distinct and ascending; None stays None.

    Raises:
        UserError: One is no number of at least 0.
    """
    if words is None:
        return None
    try:
        values = [float(word) for word in words.split(",")]
    except ValueError:
        values = []
    if not values or not all(math.isfinite(value) and value >= 0 for value in values):
        raise UserError(f"--alphas {words}: numbers of at least 0 are accepted, e.g. --alphas 0.05,0.1,0.2")
    return tuple(sorted(set(values)))


def _store(path: Path, results: dict[str, Any], split: str) -> StateStore:
    folder = path / "rounds" / str(results["best_round"]) / f"store-{split}"
    if not (folder / "store.json").is_file():
        raise RunError(f"{folder}: the state store of the best round is gone; train the run again to analyse it")
    return StateStore.open(folder)


def _exits(path: Path, display: Display, dev: StateStore, model: EarlyExitModel, threshold: float) -> dict[str, Any]:
    """Fig. 2: the exits of both objectives on dev, on the same groups of instances: those of the finished model."""
    odds = deciding_logits(dev, model, answers_of(dev, model.answer_heads))
    left = exit_layers(odds, log_odds(threshold))
    before = _initial_logits(path, display, dev)
    labels = np.array(dev.labels)
    first = exit_figures(losses_of(before, labels), before.argmax(-1) == labels[:, None], left)
    final = exit_figures(dev.losses, dev.correct, left)
    return {"initial": first.to_dict(), "final": final.to_dict()}


def _initial_logits(path: Path, display: Display, dev: StateStore) -> npt.NDArray[np.float32]:
    """Logits of the exits after initialisation on dev, [N, L, C]."""
    folder = path / "init" / "model"
    if not folder.is_dir():
        raise RunError(f"{folder}: the initialised model of this run is gone; train the run again to analyse it")
    initial = EarlyExitModel.from_pretrained(folder)
    if model_fingerprint(initial) == dev.model_fingerprint:
        return dev.logits
    instances = Instances.open(path / "data" / "dev.arrow")
    file = path / FOLDER / "initial-dev.safetensors"
    return kept_logits(file, initial, instances, display, "exits after initialisation on dev")


def _rewards(
    path: Path,
    config: RunConfig,
    display: Display,
    train: StateStore,
    dev: StateStore,
    model: EarlyExitModel,
    results: dict[str, Any],
    prices: Sequence[float] | None,
) -> dict[str, Any]:
    """Fig. 4 and 5: exact policies of every reward at several alphas, measured on dev."""
    nats = prices or default_alphas(config.reward.name, config.reward.alpha)
    alphas = {reward: prices_of(reward, nats) for reward in REWARDS}
    reference = float(results["initial_full_depth"]["dev"])
    rows: list[dict[str, Any]] = []
    rewards: dict[str, Any] = {}
    total = sum(len(values) for values in alphas.values())
    inputs = model.config.policy_inputs
    # Of new heads on the same instances: the model's own know these.
    fitted = None
    if model.answer_heads is not None:
        fitted = fit_answers(train, derive_seed(config.seed, "answers", "analysis"), answer_ids(path, config.policy))
    own = None if fitted is None else answers_of(dev, fitted.heads)
    seed = derive_seed(config.seed, "analysis")
    with (
        policy_store(train.path, inputs, None if fitted is None else fitted.answers) as store,
        display.step(f"{total} policies on the kept store", total) as bar,
    ):
        for reward, values in alphas.items():
            points = []
            for alpha in values:
                heads = exact_policy(config, store, model.policy, seed, reward=reward, alpha=alpha)
                odds = exit_logits_of(dev, heads, inputs, own)
                found = evaluate_store(dev, odds, results["metric"], PAPER_THRESHOLD, own)
                rows.append(policy_row(reward, alpha, found))
                points += points_of(found, alpha)
                bar.update(len(rows), f"{reward}, alpha {alpha:g}: exit {found.mean_exit_layer:.2f}")
            rewards[reward] = reward_row(points, reference, dev.num_layers)
    return {"rewards": rewards, "alphas": {reward: list(values) for reward, values in alphas.items()}, "policies": rows}
