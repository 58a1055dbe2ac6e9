"""What exits are worth on a GPU, where the launches of a small model cost more than its arithmetic.

python benchmarks/engine_on_gpu.py MODEL TEXTS > benchmarks/results/engine-gpu.json

MODEL is a model folder, TEXTS a file of tokenised instances that nothing was fitted to (runs/NAME/data/held.arrow). It
runs with kernels and without (``RL_EXIT_GPU_KERNELS=0``); then, with kernels, a model of BERT-large's size runs in
float32 and bfloat16, whose weights are random, as are therefore its exits: a measure of time, not of what they say. The
threshold is the one next to which half of the layers are saved; where many texts leave together, that is not near.
Variants and figures are those of ``rl-exit bench inference``; needs torch with a GPU, transformers, pyarrow and
pydantic, and no Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rl_exit.criteria import ConsistentEE
from rl_exit.data.instances import Instances
from rl_exit.engine_bench import measure_engine
from rl_exit.gpu import SWITCH, kernels
from rl_exit.inference import run_instances
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.progress import Silent

SIZES = (1, 8, 32, 128, 512)
LARGE_SIZES = (8, 32, 128)
ROUNDS = 5
SINGLE = 400  # texts at batch size 1
LARGE = 600  # texts of the large model, and without kernels
LARGE_SHAPE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def half_of_the_layers(model: EarlyExitModel, texts: Instances) -> float:
    """The threshold at which the mean exit layer crosses L / 2."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        left = run_instances(model, texts, ConsistentEE(middle), 128).exit_layer.double().mean()
        low, high = (middle, high) if float(left) < model.num_layers / 2 else (low, middle)
    return (low + high) / 2


def large_model(like: EarlyExitModel, shape: dict[str, int]) -> EarlyExitModel:
    """A BERT of another size with random weights, for the same tokens."""
    config = transformers.BertConfig(vocab_size=len(like.tokenizer), **shape)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
        like.tokenizer.save_pretrained(folder)
        made = EarlyExitModel.from_backbone(
            folder,
            ["a", "b"],
            pooling="mean",
            policy_inputs="answers",
            policy_shared=True,
            policy_answer="own",
            max_length=like.config.max_tokens,
        )
    torch.manual_seed(1)
    for weight in [*made.policy.parameters(), *made.exits.parameters(), *made.answer_heads.buffers()]:
        torch.nn.init.normal_(weight, std=0.7)
    return made.eval()


def measure(model: EarlyExitModel, texts: Instances, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Run every batch size."""
    threshold, rows = half_of_the_layers(model, texts), {}
    with Silent().step("engine", len(sizes) * (1 + rounds)) as progress:
        for size in sizes:
            part = texts.take(np.arange(min(SINGLE, len(texts)))) if size == 1 else texts
            rows[str(size)] = measure_engine(model, part, threshold, size, rounds, progress, 0)
            print(f"{size}: {rows[str(size)]['time_per_layer_speedup']:.2f}", file=sys.stderr, flush=True)
    return {
        "kernels": kernels() is not None,
        "dtype": str(next(model.backbone.parameters()).dtype).removeprefix("torch."),
        "num_layers": model.num_layers,
        "hidden_size": model.backbone.hidden_size,
        "rounds": rounds,
        "threshold": threshold,
        "engine": rows,
    }


@contextmanager
def without_kernels() -> Iterator[None]:
    """As with ``RL_EXIT_GPU_KERNELS=0``."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    kernels.cache_clear()
    try:
        yield
    finally:
        os.environ.pop(SWITCH) if before is None else os.environ.update({SWITCH: before})
        kernels.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("instances", type=Path, metavar="TEXTS")
    parser.add_argument("--texts", type=int, default=2000, help="how many, at most")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    texts = Instances.open(given.instances)
    texts = texts.take(np.arange(min(given.texts, len(texts))))
    few = texts.take(np.arange(min(LARGE, len(texts))))
    model: EarlyExitModel = EarlyExitModel.from_pretrained(given.model).to("cuda")
    runs = {"kernels": measure(model, texts, SIZES, ROUNDS)}
    with without_kernels():
        runs["torch"] = measure(EarlyExitModel.from_pretrained(given.model).to("cuda"), few, (1, 8, 32, 128), 3)
    large: EarlyExitModel = large_model(model, LARGE_SHAPE).to("cuda")
    runs["large"] = measure(large, few, LARGE_SIZES, 3)
    runs["large, bfloat16"] = measure(large.lighten(), few, LARGE_SIZES, 3)
    found = {
        "command": "python benchmarks/engine_on_gpu.py MODEL TEXTS",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(0),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": given.model.resolve().name,
        "texts": {"small": len(texts), "large": len(few)},
        "runs": runs,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
