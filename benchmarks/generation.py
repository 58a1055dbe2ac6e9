"""Curves of quality against saved layers: the policy, CALM's three measures and fixed depth on the same exits.

Reads finished runs of one configuration with several seeds and writes one JSON file: for every rule, seed and operating
point what is measured on text that the model is made to say (agreement with full depth, perplexity, accuracy) and on
what it writes itself (Rouge-L to its own full depth and to the data, saved layers). CALM's points are thresholds, set
on examples that neither exits nor test have seen. The policy's points are prices of a layer: for each alpha a policy is
trained on those examples, once more on the states that its own exits leave, and leaves at pi > 0.5.

    python benchmarks/generation.py OUT.json RUN ... [--examples 100] [--prompts 32] [--new-tokens 40] [--points 6]
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from rl_exit.config import AGREEING, load_config
from rl_exit.criteria import ConsistentEE, Criterion
from rl_exit.data.instances import Instances
from rl_exit.errors import ConfigError
from rl_exit.files import read_json, write_json
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.text_quality import rouge_l
from rl_exit.token_comparison import calibrated_on_text, compare_rules, rules_of
from rl_exit.token_measurement import judge, tabulate
from rl_exit.trainers.policy_phase import train_policy
from rl_exit.trainers.run_directory import versions
from rl_exit.trainers.steps import policy_settings
from rl_exit.trainers.token_store import build_block
from rl_exit.writing import write_texts

GUARANTEE = 0.1  # share of a response's tokens that Learn-then-Test lets change
GRID = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.0)  # of its lambda
PRICES = {
    "agreement": (0.1, 0.14, 0.17, 0.19, 0.21, 0.23, 0.26, 0.3),
    "fidelity": (0.2, 0.28, 0.34, 0.38, 0.42, 0.46, 0.52, 0.6),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", type=Path)
    for name, count in (("examples", 100), ("prompts", 32), ("new-tokens", 40), ("points", 6)):
        parser.add_argument(f"--{name}", type=int, default=count)
    given = parser.parse_args()
    seeds = [measure(run, given) for run in given.runs]
    write_json(
        given.out,
        {
            "command": "python benchmarks/generation.py "
            f"{given.out.name} RUN ... --examples {given.examples} --prompts {given.prompts} "
            f"--new-tokens {given.new_tokens} --points {given.points}",
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "examples": given.examples,
            "prompts": given.prompts,
            "new_tokens": given.new_tokens,
            "versions": versions(),
            "seeds": seeds,
        },
    )


def measure(run: Path, given: argparse.Namespace) -> dict[str, Any]:
    config = load_config(run / "config.yaml")
    if config.reward.name not in PRICES:
        raise ConfigError(f"{run}: reward '{config.reward.name}'; prices are known for: {', '.join(PRICES)}")
    model = EarlyExitCausalModel.from_pretrained(run / "model")
    held = Instances.open(run / "data" / "held.arrow")
    test = Instances.open(run / "data" / "test.arrow")
    some = test.take(np.arange(min(len(test), given.examples)))
    reference = read_json(run / "data" / "test-references.json")
    rows = reference["rows"][: given.prompts]
    prompts = [test.tokens[test.offsets[row] : test.offsets[row] + test.labels[row]].tolist() for row in rows]
    full_texts = [one.text for one in write_texts(model, prompts, None, given.new_tokens, 48)]

    def written(rule: Criterion | None) -> dict[str, float]:
        found = write_texts(model, prompts, rule, given.new_tokens, 48)
        texts = [one.text for one in found]
        layers = [layer for one in found for layer in one.exit_layers]
        return {
            "rouge_l_full": float(np.mean(list(map(rouge_l, texts, full_texts)))),
            "rouge_l_data": float(np.mean(list(map(rouge_l, texts, reference["responses"])))),
            "written_saved_layers": 1.0 - float(np.mean(layers)) / model.num_layers,
        }

    rules = compare_rules(
        model, held, some, points=given.points, horizon=given.new_tokens, seed=config.seed, more=written
    )
    rules["policy_at_one_price"] = rules.pop("policy")
    rules["policy"] = priced(run, model, held, some, given, written)
    dev = Instances.open(run / "data" / "dev.arrow")
    full = tabulate(model, some, horizon=given.new_tokens)
    proven: dict[str, Any] = {}
    for name, rule in rules_of(model, held, config.seed).items():
        if name == "policy":
            continue
        try:
            found, _ = calibrated_on_text(rule, model, dev, GUARANTEE, grid=GRID, horizon=given.new_tokens)
        except ConfigError as error:
            proven[name] = {"none": str(error)}
            continue
        table = tabulate(model, some, found, horizon=given.new_tokens)
        scored = judge(table, full, model.exit_layers)
        proven[name] = {
            "threshold": found.threshold, "agreement": scored.agreement, "saved_layers": scored.saved_layers
        }  # fmt: skip
    results = read_json(run / "results.json")
    print(f"{run}: done", file=sys.stderr)
    return {
        "seed": config.seed,
        "num_layers": model.num_layers,
        "initial_full_depth": results["initial_full_depth"],
        "rules": rules,
        "learn_then_test": {"delta": GUARANTEE, "level": 0.05, "rules": proven},
    }


def priced(
    run: Path,
    model: EarlyExitCausalModel,
    held: Instances,
    some: Instances,
    given: argparse.Namespace,
    written: Callable[[Criterion | None], dict[str, float]],
) -> list[dict[str, Any]]:
    """The policy's curve: one policy for each price of a layer, all from the same examples and start."""
    config = load_config(run / "config.yaml")
    full = tabulate(model, some, horizon=given.new_tokens)
    before = {name: value.detach().clone() for name, value in model.policy.state_dict().items()}
    rows = []
    rule = ConsistentEE(0.5)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"

        def observe() -> None:
            build_block(
                model, held, store, config.store.dtype, config.store.shard_size, 16, rule,
                agreement=config.reward.name in AGREEING,
            )  # fmt: skip

        for alpha in PRICES[config.reward.name]:
            settings = replace(policy_settings(config, config.seed), alpha=alpha, algorithm="exact")
            weights = before
            for _ in range(2):  # the second time on what the first policy's exits show to later tokens
                model.policy.load_state_dict(weights)
                observe()
                weights = train_policy(store, weights, settings).weights
            model.policy.load_state_dict(weights)
            table = tabulate(model, some, rule, horizon=given.new_tokens)
            rows.append({"alpha": alpha, **asdict(judge(table, full, model.exit_layers)), **written(rule)})
    model.policy.load_state_dict(before)
    return sorted(rows, key=lambda row: row["mean_exit_layer"])


if __name__ == "__main__":
    main()
