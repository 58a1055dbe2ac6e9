"""What exits are worth on a GPU, where the launches of a small model cost more than its arithmetic.

python benchmarks/engine_on_gpu.py MODEL TEXTS [--texts 2000] > benchmarks/results/engine-gpu.json

MODEL is a model folder, TEXTS a file of tokenised instances that nothing was fitted to (runs/NAME/data/held.arrow).
The threshold is the one at which half of the layers are saved. Variants and figures are those of ``rl-exit bench
inference``; needs torch with a GPU, transformers, pyarrow and pydantic, and no Ray.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rl_exit.criteria import ConsistentEE
from rl_exit.data.instances import Instances
from rl_exit.engine_bench import _engine
from rl_exit.gpu import kernels
from rl_exit.inference import run_instances
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.progress import Silent

SIZES = (1, 8, 32, 128, 512)
ROUNDS = 5
SINGLE = 400  # texts at batch size 1


def half_of_the_layers(model: EarlyExitModel, texts: Instances) -> float:
    """The threshold whose mean exit layer is nearest to L / 2."""
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        left = run_instances(model, texts, ConsistentEE(middle), 128).exit_layer.double().mean()
        low, high = (middle, high) if float(left) < model.num_layers / 2 else (low, middle)
    return (low + high) / 2


def measure(folder: Path, file: Path, count: int) -> dict[str, Any]:
    """Run every batch size."""
    model: EarlyExitModel = EarlyExitModel.from_pretrained(folder).to("cuda")
    texts = Instances.open(file)
    texts = texts.take(np.arange(min(count, len(texts))))
    threshold, rows = half_of_the_layers(model, texts), {}
    with Silent().step("engine", len(SIZES) * (1 + ROUNDS)) as progress:
        for size in SIZES:
            part = texts.take(np.arange(min(SINGLE, len(texts)))) if size == 1 else texts
            rows[str(size)] = _engine(model, part, threshold, size, ROUNDS, progress, 0)
    return {
        "command": "python benchmarks/engine_on_gpu.py MODEL TEXTS",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(0),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": "float32",
        "kernels": kernels() is not None,
        "rounds": ROUNDS,
        "model": folder.resolve().name,
        "num_layers": model.num_layers,
        "threshold": threshold,
        "engine": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("instances", type=Path, metavar="TEXTS")
    parser.add_argument("--texts", type=int, default=2000, help="how many, at most")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    print(json.dumps(measure(given.model, given.instances, given.texts), indent=1))


if __name__ == "__main__":
    main()
