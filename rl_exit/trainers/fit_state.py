"""State of an interrupted training on disk: weights, optimiser, visits and position; safetensors and JSON only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import nn

from rl_exit.files import atomic_folder
from rl_exit.trainers.forgetting import Visits


@dataclass(frozen=True)
class FitState:
    """A checkpoint of :func:`rl_exit.trainers.supervised.fit`.

    Attributes:
        folder: Where it is kept.
        parameters: All that any phase trains, by name.
        visits: Answers so far.
    """

    folder: Path
    parameters: Mapping[str, nn.Parameter]
    visits: Visits

    def save(self, optimizer: torch.optim.Optimizer, done: int) -> None:
        """Write it.

        Args:
            optimizer: Of the phase at work.
            done: Updates so far in all phases.
        """
        state = optimizer.state_dict()["state"]
        slots = {f"{index}.{name}": value for index, part in state.items() for name, value in part.items()}
        with atomic_folder(self.folder) as beside:
            weights = {name: value.detach().contiguous() for name, value in self.parameters.items()}
            save_file(weights, beside / "model.safetensors")
            save_file({name: value.contiguous() for name, value in slots.items()}, beside / "optimizer.safetensors")
            save_arrays({"visits": self.visits.flags}, beside / "visits.safetensors")
            (beside / "position.json").write_text(json.dumps({"updates": done}))

    def restore(self) -> int:
        """Load weights and visits in place; returns the number of updates done, 0 without a checkpoint."""
        if not (self.folder / "position.json").is_file():
            return 0
        with torch.no_grad():
            for name, value in load_file(self.folder / "model.safetensors").items():
                self.parameters[name].copy_(value)
        np.copyto(self.visits.flags, load_arrays(self.folder / "visits.safetensors")["visits"])
        return int(json.loads((self.folder / "position.json").read_text())["updates"])

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the optimiser's state; for the phase inside which the checkpoint was written."""
        state = optimizer.state_dict()
        for key, value in load_file(self.folder / "optimizer.safetensors").items():
            index, _, name = key.partition(".")
            state["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(state)
