"""The end of a run: the chosen model measured on dev and test, then written out with what it achieved."""

from __future__ import annotations

import shutil
import time
from typing import Any

from rl_exit.data.instances import Instances
from rl_exit.evaluation import SplitResult, evaluate
from rl_exit.files import read_json, write_json
from rl_exit.measurement import every_exit, headline, losses_of, measure, time_exits
from rl_exit.models.card import model_card
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.progress import Display
from rl_exit.trainers.run_directory import RunDirectory, versions


def finish(run: RunDirectory, display: Display, best: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the best round's model and write evaluation.json, results.json and model/.

    Args:
        run: The run, all rounds done.
        display: Where progress is shown.
        best: Outcome of the best round on dev.
    """
    started = time.monotonic()
    config = run.config
    task = read_json(run.path / "data" / "task.json")
    model = EarlyExitModel.from_pretrained(run.path / "rounds" / str(best["round"]) / "model")
    model.config.threshold = best["threshold"]
    model.config.metric = task["metric"]
    model.config.task = task["name"]
    initial = EarlyExitModel.from_pretrained(run.path / "init" / "model")
    splits: dict[str, SplitResult] = {}
    before: dict[str, SplitResult] = {}
    timing: dict[str, dict[str, float]] = {}
    batch_size = config.inference.batch_size
    for split in ("dev", "test"):
        if split not in task["sizes"]:
            continue
        instances = Instances.open(run.path / "data" / f"{split}.arrow")
        with display.step(f"final evaluation on {split}", 2 * len(instances)) as progress:
            splits[split] = measure(model, instances, task["metric"], best["threshold"], batch_size, progress)
            before[split] = _all_exits(initial, instances, task["metric"])
            timing[split] = time_exits(model, instances, best["threshold"], batch_size)
    results = {
        "run_name": config.run_name,
        "task": task["name"],
        "metric": task["metric"],
        "algorithm": config.algorithm,
        "backbone": config.model.backbone,
        "seed": config.seed,
        "num_layers": model.num_layers,
        "threshold": best["threshold"],
        "policy_rule": model.config.policy_rule,
        "policy_trial": _trial(run, best["round"]),
        "best_round": best["round"],
        "dev": None,
        "test": None,
        **{split: headline(result) for split, result in splits.items()},
        "initial_full_depth": {split: result.full_depth_score for split, result in before.items()},
        "timing": timing,
        "seconds": {**run.seconds(), "final": time.monotonic() - started},
        "versions": versions(),
    }
    write_json(
        run.path / "evaluation.json",
        {
            **{split: result.to_dict() for split, result in splits.items()},
            "label_names": task["label_names"],
            "init": {
                split: {
                    "full_depth_score": result.full_depth_score,
                    "exit_scores": list(result.exit_scores),
                    "exit_losses": list(result.exit_losses),
                }
                for split, result in before.items()
            },
            "task": task,
        },
    )
    model.save_pretrained(run.path / "model", card=_card(model, results, task["description"]))
    shutil.copyfile(run.path / "config.yaml", run.path / "model" / "training.yaml")
    write_json(run.path / "results.json", results)
    return {"best_round": best["round"]}


def _trial(run: RunDirectory, number: int) -> dict[str, Any] | None:
    """How the round's policy did against confidence; None where it was not tried."""
    found: dict[str, Any] = read_json(run.path / "steps" / f"round-{number}-policy.json")["results"]
    return found.get("trial")


def _all_exits(model: EarlyExitModel, instances: Instances, metric: str) -> SplitResult:
    """Scores and losses of every exit, without leaving early."""
    logits, exit_logits, _ = every_exit(model, instances)
    return evaluate(instances.labels, logits, losses_of(logits, instances.labels), exit_logits, metric, 1.0)


def _card(model: EarlyExitModel, results: dict[str, Any], description: str) -> str:
    """The model card with the figures of the run."""
    rows = [
        {
            "split": split,
            f"{results['metric']} at full depth": results[split]["full_depth_score"],
            f"{results['metric']} with exits": results[split]["score"],
            f"mean exit layer of {results['num_layers']}": results[split]["mean_exit_layer"],
            "saved layers": f"{100 * results[split]['saved_layers']:.1f} %",
            "oracle": results[split]["oracle_score"],
        }
        for split in ("dev", "test")
        if results[split]
    ]
    notes = f"The oracle leaves at the first exit that is right.\n\n## Data\n\n{description}"
    return model_card(model.config, model.num_layers, rows, notes)
