"""What each part of the default recipe is worth: policies that differ in one setting, on the same exits.

    python benchmarks/ablate.py RUN [RUN ...] > benchmarks/results/ablation-TASK.json

Runs of one task with the default recipe, finished, by seed; backbone and exits are not trained again. Policies are
trained on the run's kept store (or, for ``fitted``, on one that is made of the instances that the exits were fitted
to) and measured on test where it is labelled, else on dev; variants that are the run's own recipe are left out. Points
are those of ``rl-exit compare``: most saved layers at no loss and within 1 point of full depth, pooled over seeds, with
the paired difference to the default's.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rl_exit.comparison.bootstrap import resamples
from rl_exit.comparison.evidence import Scores, Split
from rl_exit.comparison.figures import MethodFigures, full_depth, measure_method
from rl_exit.comparison.pool import gain_tree, point_tree, pooled
from rl_exit.config import RunConfig
from rl_exit.criteria import StoredSplit, criterion, scores_from_store
from rl_exit.data.instances import Instances
from rl_exit.envs.state_store import StateStore
from rl_exit.files import read_json
from rl_exit.models.answers import input_size
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.models.policy import PolicyHeads
from rl_exit.progress import Silent
from rl_exit.seeding import derive_seed
from rl_exit.trainers.policy_phase import train_policy
from rl_exit.trainers.policy_store import answer_ids, fit_answers, policy_store
from rl_exit.trainers.run_directory import RunDirectory, versions
from rl_exit.trainers.steps import policy_settings
from rl_exit.trainers.store_evaluation import answers_of, exit_logits_of
from rl_exit.trainers.store_phase import build_store

REPLICATES = 1000
MOST = 8000  # Fitted instances that the variant "fitted" has, at most.
# Name -> settings of the policy phase that differ from the run's, what the policy reads and answers, and which
# instances it has.
VARIANTS: dict[str, dict[str, Any]] = {
    "evidence": {},
    "answers as the exit does": {"answer": "exit"},
    "answers of its own": {"answer": "own"},
    "own weights at each layer": {"shared": False},
    "reads the state": {"inputs": "state", "shared": False, "epochs": 10},
    "reads both": {"inputs": "both", "epochs": 20},
    "reward hardness": {"reward": "hardness", "alpha": 0.1},
    "reward vanilla": {"reward": "vanilla", "alpha": 0.1},
    "learns on fitted instances": {"fitted": True},
    "exact gradient": {"algorithm": "exact"},
    "answers fitted to kept instances": {"answer_on": "held"},
    "sampled gradient": {"algorithm": "pg"},
    "no entropy bonus": {"entropy": 0.0},
    "alpha 0.003": {"alpha": 0.003},
    "alpha 0.03": {"alpha": 0.03},
    "paper's policy": {
        "inputs": "state",
        "answer": "exit",
        "shared": False,
        "epochs": 5,
        "lr": 1e-3,
        "lr_final": None,
        "width": 32,
        "baseline": "mean",
        "entropy": 0.0,
        "algorithm": "pg",
        "reward": "hardness",
        "alpha": 0.05,
        "fitted": True,
    },
}


# Without a policy: on the exits, and on the policy's answers, to tell what they bring from what the policy does.
BASELINES = ("max_probability", "max_probability on the policy's answers")


def main() -> None:
    """Measure all variants and print JSON."""
    runs = [RunDirectory.open(Path(word)) for word in sys.argv[1:]]
    if not runs:
        raise SystemExit(__doc__)
    variants = {name: changes for name, changes in VARIANTS.items() if not changes or _differs(changes, runs[0].config)}
    figures: dict[str, dict[int, MethodFigures]] = {name: {} for name in (*variants, *BASELINES)}
    for run in runs:
        for name, found in _measure(run, variants).items():
            figures[name][run.config.seed] = found
        print(f"{run.path}: done", file=sys.stderr)
    layers = int(read_json(runs[0].path / "results.json")["num_layers"])
    tree = {
        "benchmark": "ablation",
        "command": "python benchmarks/ablate.py RUN ...",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "task": read_json(runs[0].path / "data" / "task.json")["name"],
        "split": _split_name(runs[0]),
        "seeds": sorted(figures["evidence"]),
        "settings": runs[0].config.policy.model_dump() | runs[0].config.reward.model_dump(),
        "variants": {
            name: {
                "changes": VARIANTS.get(name, {}),
                **{point: _point(by_seed, figures["evidence"], point, layers) for point in ("no_loss", "within_1")},
            }
            for name, by_seed in figures.items()
        },
        "versions": versions(),
    }
    print(json.dumps(tree, indent=1))


def _point(by_seed: dict[int, MethodFigures], default: dict[int, MethodFigures], point: str, layers: int) -> Any:
    saved = {seed: found.points[point].saved for seed, found in by_seed.items()}
    ours = pooled([default[seed].points[point].saved for seed in saved])
    tree = point_tree({seed: found.points[point] for seed, found in by_seed.items()}, layers)
    kept = {key: tree[key] for key in ("score", "saved_layers", "mean_exit_layer", "interval", "by_seed")}
    return {**kept, "against_default": gain_tree(pooled(list(saved.values())), ours)}


def _split_name(run: RunDirectory) -> str:
    return "test" if "test" in read_json(run.path / "data" / "task.json")["sizes"] else "dev"


def _differs(changes: dict[str, Any], config: RunConfig) -> bool:
    """Whether a variant changes anything of a configuration."""
    of = config.policy.model_dump() | {
        "reward": config.reward.name,
        "alpha": config.reward.alpha,
        "algorithm": config.algorithm,
        "width": config.model.policy_width,
        "fitted": False,
    }
    return any(of[key] != value for key, value in changes.items())


def _measure(run: RunDirectory, variants: dict[str, dict[str, Any]]) -> dict[str, MethodFigures]:
    task = read_json(run.path / "data" / "task.json")
    name = _split_name(run)
    model = EarlyExitModel.from_pretrained(run.path / "init" / "model")
    first = run.path / "rounds" / "1"
    with tempfile.TemporaryDirectory() as scratch:

        def store_of(split: str) -> StateStore:
            instances = Instances.open(run.path / "data" / f"{split}.arrow")
            if len(instances) > MOST:
                order = np.random.default_rng(run.config.seed).permutation(len(instances))
                instances = instances.take(np.sort(order[:MOST]))
            with Silent().step(split, len(instances)) as progress:
                return build_store(model, instances, Path(scratch) / split, "float32", 8192, 64, progress)

        measured = StateStore.open(first / "store-dev") if name == "dev" else store_of(name)
        fitted = store_of("train")
        logits = np.array(measured.logits)
        split = Split(np.array(measured.ids), np.array(measured.labels), logits.argmax(-1), len(task["label_names"]))
        weights = resamples(len(logits), REPLICATES)
        reference = full_depth(split, weights, task["metric"])

        kept = StateStore.open(first / "store-train")

        @cache
        def own(source: Path, answer_on: str) -> tuple[Any, Any]:
            """What the policy learns from in a store, and what it answers on the measured split."""
            config = run.config.policy.model_copy(update={"answer_on": answer_on})
            ids = answer_ids(run.path, config) if source == kept.path else None
            found = fit_answers(StateStore.open(source), derive_seed(run.config.seed, "answers", 1), ids)
            return found.answers, answers_of(measured, found.heads)

        def figures(scores: Any, answers: Any) -> MethodFigures:
            told = None if answers is None else answers.argmax(-1)
            return measure_method(Scores(scores, answers=told), split, weights, reference, task["metric"])

        found = {}
        for baseline, answers in zip(BASELINES, (None, own(kept.path, run.config.policy.answer_on)[1]), strict=True):
            stored = StoredSplit.from_logits(measured.labels, logits if answers is None else answers)
            scores = scores_from_store(criterion("max_probability", threshold=0.5), stored)
            found[baseline] = figures(scores, answers)
        for variant, changes in variants.items():
            settings = dict(changes)
            inputs = settings.pop("inputs", run.config.policy.inputs)
            source = (fitted if settings.pop("fitted", False) else kept).path
            answer = settings.pop("answer", run.config.policy.answer)
            answer_on = settings.pop("answer_on", run.config.policy.answer_on)
            learnt, told = own(source, answer_on) if answer == "own" else (None, None)
            phase = replace(policy_settings(run.config, derive_seed(run.config.seed, "policy", 1)), **settings)
            heads = PolicyHeads(model.num_layers, input_size(inputs, measured.hidden_size), phase.width, phase.shared)
            with policy_store(source, inputs, learnt) as store:
                heads.load_state_dict(train_policy(store, heads.state_dict(), phase).weights)
            found[variant] = figures(exit_logits_of(measured, heads, inputs, told), told)
    return found


if __name__ == "__main__":
    main()
