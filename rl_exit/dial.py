"""A dial without retraining: one policy for every price of a layer, with the price as an input.

An ordinary policy is trained at one price alpha; another trade-off needs another training, or a threshold it was not
trained for. The policy here reads, beside the figures of :mod:`rl_exit.models.answers`, where between the cheapest and
the dearest price it stands: ``alpha = low (high / low)^speed`` for a *speed* in 0..1. Each update draws a speed for
every instance and ascends the exact expected return at that price
(:func:`rl_exit.method.distribution.expected_return`), so that one set of weights holds the whole curve. Speed 0 is full
depth itself. Kept in the model's folder as ``dial.safetensors`` and ``dial.json``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from rl_exit.criteria.base import Carry, LayerView
from rl_exit.criteria.stored import StoredSplit
from rl_exit.errors import ModelError, RunError
from rl_exit.files import atomic_file, read_json, write_json
from rl_exit.method.distribution import expected_return
from rl_exit.method.rewards import rewards
from rl_exit.models.answers import NUM_ANSWERS, all_answer_figures, answer_figures
from rl_exit.models.policy import PolicyHeads

FORMAT = 1
WEIGHTS, DESCRIPTION = "dial.safetensors", "dial.json"
PLACES = 3
"""Inputs that say where the dial stands: the speed from -1 to 1, its square, and its half above the middle."""


@dataclass(frozen=True)
class DialSettings:
    """How a dial is trained.

    Attributes:
        low: Price of a layer at speed just above 0, in right answers.
        high: Price at speed 1.
        epochs: Passes over the instances; usual 40-200.
        batch_size: Instances per update.
        lr: Learning rate at the start, of Adam; falls to 0 along a line.
        entropy_start: Bonus on the entropy of the actions at the start, without which every price first learns what
            most prices have in common and sticks to it.
        entropy: The same in the last third.
        width: Hidden width.
    """

    low: float = 5e-4
    high: float = 0.15
    epochs: int = 60
    batch_size: int = 256
    lr: float = 3e-3
    entropy_start: float = 1.0
    entropy: float = 1e-3
    width: int = 64


@dataclass(frozen=True)
class Dial:
    """Leave at the first layer where the policy, at this speed, finds Exit likelier than Continue.

    A criterion (:class:`rl_exit.criteria.base.Criterion`).

    Attributes:
        heads: The policy, of L-1 layers and NUM_ANSWERS + PLACES inputs.
        speed: In 0..1; 0 never leaves early.
    """

    heads: PolicyHeads = field(repr=False, compare=False)
    speed: float
    name = "dial"

    def start(self, batch_size: int, device: torch.device) -> Carry:
        """An empty carry."""
        return {}

    def leave(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Criterion.leave`."""
        if self.speed == 0.0:
            return view.everyone(False)
        figures = answer_figures(layer, view.num_layers, view.logits, carry)
        place = self._place.to(figures.device).expand(len(figures), -1)
        return self.heads.at(layer, torch.cat([figures, place], -1)) > 0.0

    @cached_property
    def _place(self) -> Tensor:
        return places(torch.tensor([self.speed]))


def places(speeds: Tensor) -> Tensor:
    """What the policy reads of the dial, [..., PLACES] from speeds [...] in 0..1."""
    turned = 2.0 * speeds - 1.0
    return torch.stack([2.0 * turned, 2.0 * turned.square() - 1.0, turned.clamp_min(0.0)], -1)


def train_dial(
    split: StoredSplit, settings: DialSettings | None = None, seed: int = 0, fixed_speed: float | None = None
) -> PolicyHeads:
    """Train the policy; the same arguments give the same weights.

    Args:
        split: N instances that the exits were not trained on, with labels.
        settings: Of the training.
        seed: Decides first weights, batches and speeds; torch's generator is left as it was.
        fixed_speed: Train for this speed alone, an ordinary policy of the same form: what the dial is compared with.

    Raises:
        RunError: The training diverged.
        ValueError: No instances.
    """
    how = settings or DialSettings()
    count, layers = split.num_instances, split.num_layers
    if count == 0:
        raise ValueError("train_dial needs at least one instance")
    figures = all_answer_figures(torch.from_numpy(np.array(split.logits)))[:, : layers - 1]
    right = torch.from_numpy(rewards(split.losses, None, 0.0, "correctness", correct=split.correct))
    depth = torch.arange(1, layers + 1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = PolicyHeads(layers, NUM_ANSWERS + PLACES, how.width, shared=True)
    optimiser = torch.optim.Adam(heads.parameters(), lr=how.lr)
    updates = how.epochs * -(-count // how.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=max(updates, 1))
    for epoch in range(how.epochs):
        bonus = how.entropy + (how.entropy_start - how.entropy) * max(1.0 - 1.5 * epoch / how.epochs, 0.0)
        order = torch.randperm(count, generator=generator)
        for start in range(0, count, how.batch_size):
            rows = order[start : start + how.batch_size]
            speeds = torch.rand(len(rows), generator=generator)
            if fixed_speed is not None:
                speeds = torch.full_like(speeds, fixed_speed)
            price = how.low * (how.high / how.low) ** speeds
            place = places(speeds)[:, None].expand(-1, layers - 1, -1)
            odds = heads(torch.cat([figures[rows], place], -1))
            gain = expected_return(odds, right[rows] - price[:, None] * depth)
            # Every price counts alike: where a layer is dear, returns differ by more.
            gain = gain / (price * layers + 0.05)
            loss = -(gain.mean() + bonus * F.binary_cross_entropy_with_logits(odds, odds.sigmoid()))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    if not all(bool(value.isfinite().all()) for value in heads.state_dict().values()):
        raise RunError("training the dial diverged; are the exits' logits finite?")
    return heads.requires_grad_(False)


@torch.inference_mode()
def dial_exits(heads: PolicyHeads, split: StoredSplit, speed: float) -> Tensor:
    """Where stored instances leave at a speed, [N] int64 in 1..L."""
    from rl_exit.criteria.stored import exits_from_store

    return exits_from_store(Dial(heads, speed), None, split.logits, None)


def save_dial(folder: Path, heads: PolicyHeads, num_classes: int, notes: dict[str, Any]) -> None:
    """Write the dial into a model's folder.

    Args:
        folder: The model's.
        heads: What was trained.
        num_classes: C of the model.
        notes: How; JSON values.
    """
    with atomic_file(folder / WEIGHTS) as beside:
        save_file({name: value.contiguous() for name, value in heads.state_dict().items()}, beside)
    write_json(
        folder / DESCRIPTION,
        {
            "format": FORMAT,
            "num_layers": heads.num_layers,
            "num_classes": num_classes,
            "width": heads.width,
            "notes": notes,
        },
    )


def load_dial(folder: Path, num_layers: int, speed: float) -> Dial:
    """Read the dial of a model.

    Raises:
        ModelError: There is none, or it is damaged or of another model.
    """
    if not (folder / DESCRIPTION).is_file():
        raise ModelError(f"{folder}: this model has no dial; 'rl-exit dial MODEL' trains one")
    tree = read_json(folder / DESCRIPTION)
    if tree.get("format") != FORMAT or tree.get("num_layers") != num_layers:
        raise ModelError(
            f"{folder / DESCRIPTION}: format {tree.get('format')} for {tree.get('num_layers')} layers; accepted here: "
            f"format {FORMAT} for {num_layers}"
        )
    try:
        heads = PolicyHeads(num_layers, NUM_ANSWERS + PLACES, int(tree["width"]), shared=True)
        heads.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / WEIGHTS}: cannot be read as a dial: {error}") from None
    return Dial(heads.requires_grad_(False).eval(), speed)


def at_speed(dial: Dial, speed: float) -> Dial:
    """The same dial turned."""
    return replace(dial, speed=speed)
