"""Texts in, answers out: what a replica of the server does, without HTTP and without Ray."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl_exit.criteria import Criterion, Fixed
from rl_exit.data.instances import Instances
from rl_exit.dial import DESCRIPTION
from rl_exit.inference import run_batch
from rl_exit.models.choices import chosen_rule
from rl_exit.serving.engine import PooledEngine
from rl_exit.serving.pool import PoolRules
from rl_exit.serving.schema import FULL_DEPTH, Wish
from rl_exit.serving.texts import Left, TextSide

TIMED = 3  # passes of which the fastest counts, where a text is timed against full depth


class ModelService:
    """One model, its thread, and the rules that requests may ask for.

    Args:
        model: An :class:`rl_exit.EarlyExitModel` with its tokenizer.
        rules: Of the pool.

    Attributes:
        texts: Tokenizer and labels of the model.
        engine: Its thread.
    """

    def __init__(self, model: Any, rules: PoolRules) -> None:
        self.model = model
        self.texts = TextSide.of(model)
        self.engine = PooledEngine(model, rules)
        self.rule_for = lru_cache(maxsize=64)(self._rule)

    @property
    def operating_points(self) -> list[str]:
        """Names that a :class:`Wish` may use."""
        return operating_points(self.model)

    async def answer(self, texts: Sequence[str], pairs: Sequence[str] | None, wish: Wish) -> list[dict[str, Any]]:
        """Label texts; those of all requests at the same layer run together.

        Args:
            texts: N >= 1 texts.
            pairs: N second texts, or None.
            wish: When they leave.

        Returns:
            N mappings with label, label_id, probabilities [C], exit_layer and milliseconds.

        Raises:
            ConfigError: There is no such operating point.
        """
        answers = self.engine.submit(self.texts.tokenised(texts, pairs), self.rule_for(wish))
        left: list[Left] = await asyncio.wrap_future(answers)
        return self.texts.told(left)

    async def explain(self, text: str, pair: str | None, wish: Wish) -> dict[str, Any]:
        """What every layer says of a text, where it leaves, and its time alone against full depth.

        Raises:
            ConfigError: There is no such operating point.
        """
        instances = self.texts.tokenised([text], None if pair is None else [pair])
        return await asyncio.wrap_future(self.explained(instances, wish))

    def explained(self, instances: Instances, wish: Wish) -> Future[dict[str, Any]]:
        """The explanation of one instance.

        Raises:
            ConfigError: There is no such operating point.
        """
        rule = self.rule_for(wish)
        return self.engine.call(lambda: _explained(self.model, instances, rule))

    async def states(self) -> dict[str, dict[str, Any]]:
        """The state of this one, by name, as several replicas would tell theirs."""
        return {"1": self.state()}

    def state(self) -> dict[str, Any]:
        """Texts that wait by layer, and what was done since the start."""
        return {"waiting": self.engine.waiting(), **asdict(self.engine.counts)}

    def close(self) -> None:
        """Answer what is inside, then stop."""
        self.engine.close()

    def _rule(self, wish: Wish) -> Criterion:
        if wish.operating_point == FULL_DEPTH:
            return Fixed(self.model.num_layers)
        return chosen_rule(self.model, wish.threshold, None, wish.operating_point, wish.speed)


def operating_points(model: Any) -> list[str]:
    """Names of the operating points of a model."""
    return [*(model.config.operating_points or ()), FULL_DEPTH]


def has_dial(model: Any) -> bool:
    """Whether requests may name a speed."""
    return (Path(model.config.name_or_path or ".") / DESCRIPTION).is_file()


@torch.inference_mode()
def run_together(model: Any, requests: Sequence[tuple[Instances, Criterion]]) -> list[list[Left]]:
    """Plain batching: the texts of all requests in one batch to the end of the last; for comparison.

    Args:
        model: In evaluation mode.
        requests: One or more; those of the same rule share a batch.

    Returns:
        Per request its answers, in order; ``seconds`` is that of the whole batch.
    """
    started = time.monotonic()
    found: list[list[Left]] = [[] for _ in requests]
    for rule in {id(rule): rule for _, rule in requests}.values():
        members = [number for number, (_, other) in enumerate(requests) if other is rule]
        batch = _concatenated([requests[number][0] for number in members])
        out = run_batch(model, batch.batch(range(len(batch))), rule)
        logits = out.logits.float().cpu().numpy()
        seconds = time.monotonic() - started
        row = 0
        for number in members:
            for _ in range(len(requests[number][0])):
                found[number].append(Left(logits[row], int(out.exit_layer[row]), seconds))
                row += 1
    return found


def _concatenated(parts: Sequence[Instances]) -> Instances:
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([part.lengths for part in parts])
    types = [part.token_types for part in parts if part.token_types is not None]
    return Instances(
        ids=np.arange(len(lengths)),
        labels=np.zeros(len(lengths), np.int64),
        tokens=np.concatenate([part.tokens for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_types=np.concatenate(types) if types else None,
        pad_token_id=parts[0].pad_token_id,
    )


@torch.inference_mode()
def _explained(model: Any, instances: Instances, rule: Criterion) -> dict[str, Any]:
    """See :meth:`ModelService.explain`; the fastest of a few passes, the two kinds in turn."""
    batch = instances.batch([0])
    took: dict[bool, float] = {True: math.inf, False: math.inf}
    exit_layer = 0
    for _ in range(TIMED):
        for exits in (True, False):
            started = time.perf_counter()
            out = run_batch(model, batch, rule if exits else Fixed(model.num_layers))
            took[exits] = min(took[exits], time.perf_counter() - started)
            if exits:
                exit_layer = int(out.exit_layer[0])
    every = model.all_exits(**batch)
    # The policy may answer by heads of its own; other rules leave it to the exits.
    own = getattr(rule, "answer", None) is not None
    said = model.answers(every.states, every.logits) if own else every.logits
    policy = [*model.exit_logits(every.states, every.logits)[0].float().sigmoid().tolist(), 1.0]
    names = model.config.id2label
    layers, inside = [], 1.0
    for layer, (chance, row) in enumerate(zip(policy, said[0].float().softmax(-1), strict=True), start=1):
        number = int(row.argmax())
        layers.append(
            {
                "layer": layer,
                "label": names[number],
                "probability": float(row[number]),
                "exit_probability": chance,
                "leaves_here": inside * chance,
            }
        )
        inside *= 1.0 - chance
    answer = layers[exit_layer - 1]
    return {
        "label": answer["label"],
        "probability": answer["probability"],
        "exit_layer": exit_layer,
        "num_layers": model.num_layers,
        "tokens": int(instances.lengths[0]),
        "layers": layers,
        "milliseconds": 1000 * took[True],
        "full_depth_milliseconds": 1000 * took[False],
    }
