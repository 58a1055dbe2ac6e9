"""What the policy's own answers bring, on instances that are never reported: how the default recipe was decided.

    python benchmarks/answers.py RUN [RUN ...] > benchmarks/results/answers-TASK.json

Of each run's exits after initialisation, the instances kept from them (``policy.holdout``) are all that is read. Two
thirds fit answer heads and policy, the last third is measured. The policy is trained by the exact gradient in a bare
loop, with the run's reward. A run that has ended after its initialisation is enough.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from rl_exit.comparison.bootstrap import resamples
from rl_exit.comparison.evidence import Scores, Split
from rl_exit.comparison.figures import full_depth, measure_method
from rl_exit.comparison.pool import gain_tree, pooled
from rl_exit.criteria import StoredSplit, criterion, scores_from_store
from rl_exit.data.instances import Instances
from rl_exit.files import read_json
from rl_exit.method.distribution import expected_return
from rl_exit.models.answer_heads import fit_answer_heads
from rl_exit.models.answers import NUM_ANSWERS, all_answer_figures
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.models.policy import PolicyHeads
from rl_exit.progress import Silent
from rl_exit.seeding import derive_seed
from rl_exit.trainers.run_directory import RunDirectory, versions
from rl_exit.trainers.store_phase import build_store

REPLICATES = 1000
UPDATES, BATCH, LR = 600, 256, 3e-3
METHODS = ("max_probability", "max_probability on own answers", "policy on the exits' answers", "policy on own answers")


def main() -> None:
    """Measure all runs and print JSON."""
    runs = [RunDirectory.open(Path(word)) for word in sys.argv[1:]]
    if not runs:
        raise SystemExit(__doc__)
    found = {run.config.seed: _measure(run) for run in runs}
    points = ("no_loss", "within_1")
    saved = {
        point: {name: pooled([one["figures"][name].points[point].saved for one in found.values()]) for name in METHODS}
        for point in points
    }
    tree = {
        "benchmark": "answers",
        "command": "python benchmarks/answers.py RUN ...",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "task": read_json(runs[0].path / "data" / "task.json")["name"],
        "split": "a third of the instances kept from the exits",
        "seeds": list(found),
        "settings": runs[0].config.model_dump(
            mode="json", include={"task": {"max_train"}, "init": True, "policy": True}
        ),
        "sizes": [one["sizes"] for one in found.values()],
        "exit_scores": [one["exits"] for one in found.values()],
        "own_scores": [one["own"] for one in found.values()],
        "methods": {
            name: {
                point: {
                    "saved_layers": float(saved[point][name][0]),
                    "against_max_probability": gain_tree(saved[point][name], saved[point]["max_probability"]),
                }
                for point in points
            }
            for name in METHODS
        },
        "versions": versions(),
    }
    print(json.dumps(tree, indent=1))


def _measure(run: RunDirectory) -> dict[str, Any]:
    seed, task = run.config.seed, read_json(run.path / "data" / "task.json")
    model = EarlyExitModel.from_pretrained(run.path / "init" / "model")
    held = Instances.open(run.path / "data" / "held.arrow")
    with tempfile.TemporaryDirectory() as scratch, Silent().step("held", len(held)) as progress:
        store = build_store(model, held, Path(scratch) / "held", "float32", 8192, 64, progress)
        every = np.arange(store.num_instances)
        states, logits, labels = store.states(every), np.array(store.logits), np.array(store.labels)
    order = np.random.default_rng(derive_seed(seed, "answers", "thirds")).permutation(len(every))
    out, fit = np.sort(order[: len(order) // 3]), np.sort(order[len(order) // 3 :])
    known = states[fit]
    fitted = fit_answer_heads(lambda rows: known[rows], logits[fit], labels[fit], states.shape[-1], seed)
    with torch.inference_mode():
        own = fitted.heads(torch.from_numpy(states[out]), torch.from_numpy(logits[out])).numpy()
    weights = resamples(len(out), REPLICATES)
    split = Split(out, labels[out], logits[out].argmax(-1), logits.shape[-1])
    reference = full_depth(split, weights, task["metric"])
    figures = {}
    for words, learnt, told in (("the exits'", logits[fit], logits[out]), ("own", fitted.answers, own)):
        stored = StoredSplit.from_logits(labels[out], told)
        policy = _policy(torch.from_numpy(learnt), torch.from_numpy(labels[fit]), run, seed)
        scores = {
            f"max_probability{' on own answers' if words == 'own' else ''}": scores_from_store(
                criterion("max_probability", threshold=0.5), stored
            ),
            f"policy on {words} answers": policy(all_answer_figures(torch.from_numpy(told))).detach().numpy(),
        }
        for name, score in scores.items():
            found = Scores(score, answers=told.argmax(-1))
            figures[name] = measure_method(found, split, weights, reference, task["metric"])
    right = labels[out][:, None]
    return {
        "figures": figures,
        "sizes": {"exits": task["sizes"]["train"], "policy": len(fit), "measured": len(out)},
        "exits": (logits[out].argmax(-1) == right).mean(0).tolist(),
        "own": (own.argmax(-1) == right).mean(0).tolist(),
    }


def _policy(answers: torch.Tensor, labels: torch.Tensor, run: RunDirectory, seed: int) -> PolicyHeads:
    """Exact policy gradient: the return in closed form."""
    torch.manual_seed(seed)
    count, layers = answers.shape[:2]
    figures, alpha = all_answer_figures(answers), run.config.reward.alpha
    rewards = (answers.argmax(-1) == labels[:, None]).float() - alpha * torch.arange(1, layers + 1)
    heads = PolicyHeads(layers, NUM_ANSWERS, run.config.model.policy_width, shared=True)
    optimizer = torch.optim.Adam(heads.parameters(), lr=LR)
    for update in range(UPDATES):
        optimizer.param_groups[0]["lr"] = LR * (1 - update / UPDATES)
        some = torch.randint(0, count, (BATCH,))
        odds = heads(figures[some])
        entropy = (F.softplus(odds) - odds * odds.sigmoid()).mean()
        loss = -expected_return(odds, rewards[some]).mean() - run.config.policy.entropy * entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads


if __name__ == "__main__":
    main()
