"""The end of a decoder's run: measured on text and by what it writes, next to its own full depth and to its peers."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rl_exit.config import RunConfig
from rl_exit.criteria import ConsistentEE, Criterion
from rl_exit.data.instances import Instances
from rl_exit.evaluation import SplitResult
from rl_exit.files import read_json, write_json
from rl_exit.measurement import headline
from rl_exit.models.card import causal_card
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.progress import Display
from rl_exit.text_quality import BertScore, rouge_l
from rl_exit.token_comparison import compare_rules
from rl_exit.token_measurement import judge, tabulate
from rl_exit.trainers.run_directory import RunDirectory, versions
from rl_exit.trainers.token_evaluation import CURVE_POINTS, measure_split
from rl_exit.trainers.token_store import tokens_of
from rl_exit.writing import Written, write_texts

COMPARED_EXAMPLES = 64
TIMED_RUNS = 3


@dataclass(frozen=True)
class Reference:
    """Prompts that are generated for, and what was to come.

    Attributes:
        rows: Their rows in the split.
        prompts: Their texts.
        responses: The responses of the data.
    """

    rows: list[int]
    prompts: list[str]
    responses: list[str]


def finish_generation(run: RunDirectory, display: Display, best: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the best round's decoder and write evaluation.json, results.json and model/.

    Args:
        run: The run, all rounds done.
        display: Where progress is shown.
        best: Outcome of the best round on dev.
    """
    started = time.monotonic()
    config = run.config
    task = read_json(run.path / "data" / "task.json")
    model: EarlyExitCausalModel = EarlyExitCausalModel.from_pretrained(
        run.path / "rounds" / str(best["round"]) / "model"
    )
    model.config.threshold = best["threshold"]
    initial: EarlyExitCausalModel = EarlyExitCausalModel.from_pretrained(run.path / "init" / "model")
    at_threshold = config.model_copy(
        update={"inference": config.inference.model_copy(update={"threshold": best["threshold"]})}
    )
    score = None if config.generation.encoder == "none" else BertScore(config.generation.encoder)
    splits: dict[str, SplitResult] = {}
    before: dict[str, dict[str, Any]] = {}
    text: dict[str, dict[str, Any]] = {}
    timing: dict[str, dict[str, float]] = {}
    names = [split for split in ("dev", "test") if split in task["sizes"]]
    for split in names:
        instances = Instances.open(run.instances(split))
        count = int(tokens_of(instances).sum())
        with display.step(f"final evaluation on {split}", count * (CURVE_POINTS + 2)) as progress:
            splits[split] = measure_split(model, instances, at_threshold, 0.0, progress)
            table = tabulate(initial, instances)
            before[split] = {
                "full_depth_score": float(table.correct[:, -1].mean()),
                "exit_scores": table.correct.mean(0).tolist(),
                "exit_losses": table.losses.mean(0, dtype=np.float64).tolist(),
            }
        if config.generation.samples:
            reference = Reference(**read_json(run.path / "data" / f"{split}-references.json"))
            with display.step(f"writing for prompts of {split}", 1):
                text[split], timing[split] = try_writing(model, instances, reference, best["threshold"], config, score)
    compared = "test" if "test" in names else "dev"
    some = Instances.open(run.instances(compared))
    some = some.take(np.arange(min(len(some), COMPARED_EXAMPLES)))
    held = Instances.open(run.instances("held" if config.policy.holdout else "dev"))
    held = held.take(np.arange(min(len(held), 4 * COMPARED_EXAMPLES)))
    rules: dict[str, Any] = {}
    points, horizon = config.generation.points, config.generation.max_new_tokens
    if points:
        with display.step("criteria side by side", 1):
            rules = compare_rules(model, held, some, points=points, horizon=horizon, seed=config.seed)
    generation = {"splits": text, "criteria": {"split": compared, "examples": len(some), "rules": rules}}
    results = {
        "run_name": config.run_name,
        "task": task["name"],
        "kind": "generation",
        "metric": "accuracy",
        "algorithm": config.algorithm,
        "backbone": config.model.backbone,
        "seed": config.seed,
        "num_layers": model.num_exits,
        "exit_layers": list(model.exit_layers),
        "threshold": best["threshold"],
        "best_round": best["round"],
        "dev": None,
        "test": None,
        **{split: headline(result) for split, result in splits.items()},
        "initial_full_depth": {split: row["full_depth_score"] for split, row in before.items()},
        "generation": {
            split: {key: value for key, value in found.items() if key != "samples"} for split, found in text.items()
        },
        "timing": timing,
        "seconds": {**run.seconds(), "final": time.monotonic() - started},
        "versions": versions(),
    }
    write_json(
        run.path / "evaluation.json",
        {
            **{split: result.to_dict() for split, result in splits.items()},
            "label_names": ["all tokens"],
            "init": before,
            "task": task,
            "generation": generation,
        },
    )
    model.save_pretrained(run.path / "model", card=causal_card(model.config, model.exit_layers))
    shutil.copyfile(run.path / "config.yaml", run.path / "model" / "training.yaml")
    write_json(run.path / "results.json", results)
    return {"best_round": best["round"]}


def try_writing(
    model: EarlyExitCausalModel,
    instances: Instances,
    reference: Reference,
    threshold: float,
    config: RunConfig,
    score: BertScore | None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Let the decoder write for prompts at full depth and with exits, greedily, and hold both against the data.

    Returns:
        (figures and samples, timing: seconds of both and their ratio).
    """
    most, size = config.generation.max_new_tokens, config.inference.batch_size
    rule = ConsistentEE(threshold)
    some = instances.take(reference.rows)
    prompts = [tokens_of_prompt(some, row) for row in range(len(some))]
    written = {
        "full": write_texts(model, prompts, None, most, size),
        "exits": write_texts(model, prompts, rule, most, size),
    }
    full = tabulate(model, some, horizon=most)
    forced = judge(tabulate(model, some, rule, horizon=most), full, model.exit_layers)
    texts = {name: [one.text for one in rows] for name, rows in written.items()}
    figures: dict[str, Any] = {
        "prompts": len(prompts),
        "max_new_tokens": most,
        "saved_layers": _saved(written["exits"], model.num_layers),
        "teacher_forced": asdict(forced),
        "full_depth_perplexity": math.exp(min(float(full.losses[:, -1].mean()), 700.0)),
        "rouge_l": {name: _mean(map(rouge_l, found, reference.responses)) for name, found in texts.items()},
        "rouge_l_to_full_depth": _mean(map(rouge_l, texts["exits"], texts["full"])),
        "same_text_share": _mean(float(a == b) for a, b in zip(texts["exits"], texts["full"], strict=True)),
    }
    if score is not None:
        figures["encoder"] = score.name
        figures["bert_f"] = {name: _mean(score.f1(found, reference.responses)) for name, found in texts.items()}
        figures["bert_f_to_full_depth"] = _mean(score.f1(texts["exits"], texts["full"]))
    figures["samples"] = [
        {
            "prompt": reference.prompts[row],
            "reference": reference.responses[row],
            "full": texts["full"][row],
            "exits": texts["exits"][row],
            "tokens": written["exits"][row].pieces,
            "exit_layers": written["exits"][row].exit_layers,
            "rouge_l": rouge_l(texts["exits"][row], texts["full"][row]),
            "saved_layers": _saved(written["exits"][row : row + 1], model.num_layers),
        }
        for row in range(min(config.generation.shown, len(prompts)))
    ]
    return figures, _timing(model, prompts, rule, most, size)


def tokens_of_prompt(instances: Instances, row: int) -> list[int]:
    """Token ids of an example's prompt."""
    begin = int(instances.offsets[row])
    return instances.tokens[begin : begin + int(instances.labels[row])].tolist()


def _timing(
    model: EarlyExitCausalModel, prompts: list[list[int]], rule: Criterion, most: int, size: int
) -> dict[str, float]:
    """Seconds of writing at full depth and with exits, in the same engine: medians of 3 in turn after a warm-up."""
    times: dict[str, list[float]] = {"full_depth_seconds": [], "seconds": []}
    tokens: dict[str, int] = {}
    for _ in range(1 + TIMED_RUNS):
        for name, one in (("full_depth_seconds", None), ("seconds", rule)):
            started = time.perf_counter()
            done = write_texts(model, prompts, one, most, size)
            times[name].append(time.perf_counter() - started)
            tokens[name] = sum(len(text.exit_layers) for text in done)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    rates = {name: tokens[name] / medians[name] for name in medians}
    return {
        **medians,
        "tokens_per_second_full_depth": rates["full_depth_seconds"],
        "tokens_per_second": rates["seconds"],
        "speedup": rates["seconds"] / rates["full_depth_seconds"],
        "batch_size": size,
    }


def _saved(written: Sequence[Written], num_layers: int) -> float:
    layers = [layer for text in written for layer in text.exit_layers]
    return 1.0 - statistics.fmean(layers) / num_layers if layers else 0.0


def _mean(values: Any) -> float:
    return statistics.fmean(values)
