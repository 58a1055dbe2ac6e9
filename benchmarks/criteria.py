"""How long it takes to ask every criterion at all of its thresholds, from a finished store.

    python benchmarks/criteria.py [INSTANCES] > benchmarks/results/criteria.json

The store holds random states and logits that grow better with depth (L=6, H=384, C=20, float32), so that nothing needs
a model. Learned criteria are fitted before, on 2000 of its instances. Timed is what ``rl-exit compare`` does then: the
scores of each criterion, and accuracy and saved layers at every threshold that makes a difference.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from rl_exit.comparison.bootstrap import resamples
from rl_exit.comparison.evidence import Scores, Split
from rl_exit.comparison.figures import full_depth, measure_method
from rl_exit.criteria import CRITERIA, LEARNED, StoredSplit, criterion, scores_from_store
from rl_exit.criteria.fitting import fit_criterion
from rl_exit.envs.state_store import StateStore, StateStoreWriter
from rl_exit.measurement import losses_of
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.compare import NUMBERS_ONLY
from rl_exit.trainers.compare_evidence import any_value
from rl_exit.trainers.run_directory import versions

LAYERS, HIDDEN, CLASSES = 6, 384, 20
FITTED = 2000
BLOCK = 4096


def write_store(folder: Path, count: int) -> StateStore:
    """Random instances; the right class gains by every layer."""
    rng = np.random.default_rng(0)
    with StateStoreWriter(
        folder, LAYERS, HIDDEN, CLASSES, "float32", 8192, instances="random", model="random"
    ) as writer:
        for start in range(0, count, BLOCK):
            n = min(BLOCK, count - start)
            labels = rng.integers(0, CLASSES, n)
            states = rng.standard_normal((n, LAYERS, HIDDEN), dtype=np.float32)
            logits = rng.standard_normal((n, LAYERS, CLASSES), dtype=np.float32)
            logits[np.arange(n), :, labels] += np.linspace(1.5, 4.0, LAYERS, dtype=np.float32)
            right = logits.argmax(-1) == labels[:, None]
            writer.append(np.arange(start, start + n), labels, states, losses_of(logits, labels), right, logits)
    return StateStore.open(folder)


def main() -> None:
    """Measure and print JSON."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with tempfile.TemporaryDirectory() as scratch:
        store = write_store(Path(scratch) / "store", count)
        stored = StoredSplit(store.labels, store.logits, store.losses, store.correct, store.states)
        rules, fitting = {}, {}
        for word in CRITERIA:
            if word in NUMBERS_ONLY:
                continue
            values = any_value(word)
            started = time.monotonic()
            few = stored.select(np.arange(min(FITTED, count)))
            rules[word] = fit_criterion(word, few, 0, **values) if word in LEARNED else criterion(word, **values)
            fitting[word] = time.monotonic() - started
        policy = PolicyHeads(LAYERS, HIDDEN, 64)
        seconds = {}
        for word, rule in rules.items():
            started = time.monotonic()
            asked = stored
            if word == "consistentee":
                with torch.inference_mode():
                    blocks = [
                        policy(store.states(np.arange(at, min(at + BLOCK, count)))) for at in range(0, count, BLOCK)
                    ]
                asked = StoredSplit(
                    store.labels, store.logits, store.losses, store.correct, store.states, torch.cat(blocks).numpy()
                )
            scores = scores_from_store(rule, asked)
            split = Split(np.array(store.ids), np.array(store.labels), np.argmax(store.logits, -1), CLASSES)
            weights = resamples(count, 0)
            measure_method(Scores(scores), split, weights, full_depth(split, weights, "accuracy"), "accuracy")
            seconds[word] = time.monotonic() - started
            print(f"{word}: {seconds[word]:.2f} s", file=sys.stderr)
    tree = {
        "benchmark": "criteria",
        "command": f"python benchmarks/criteria.py {count}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "instances": count,
        "layers": LAYERS,
        "classes": CLASSES,
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "fitting_seconds": {word: value for word, value in fitting.items() if word in LEARNED},
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    print(json.dumps(tree, indent=1))


if __name__ == "__main__":
    main()
