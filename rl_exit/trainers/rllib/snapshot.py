"""Where a policy phase stands: enough to go on bit for bit after a learner, or the whole process, was lost.

Draws depend on (seed, epoch, block) alone, so weights, the optimiser's state and the position are everything; where
sampling and learning overlap, also the weights by which the trajectories of the next update are being drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl_exit.files import atomic_folder

_MODULE, _OPTIMIZER = "module.", "optimizer."


@dataclass(frozen=True)
class PolicySnapshot:
    """A policy phase between two iterations.

    Attributes:
        epoch: Whole passes done.
        update: Updates done in the present one.
        number: How often each learner has updated (it seeds the order of PPO's minibatches).
        tensors: State of module and optimiser, by name.
        ahead: Weights by which the next update's trajectories are drawn, where that has begun already.
        rows: What was logged so far.
    """

    epoch: int
    update: int
    number: int
    tensors: Mapping[str, Tensor]
    ahead: Mapping[str, npt.NDArray[Any]] | None = None
    rows: list[dict[str, float]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write it; the one that is there is replaced at once or not at all."""
        place = {"epoch": self.epoch, "update": self.update, "number": self.number, "rows": self.rows}
        with atomic_folder(folder) as beside:
            save_file({name: value.contiguous() for name, value in self.tensors.items()}, beside / "state.safetensors")
            if self.ahead is not None:
                save_arrays(dict(self.ahead), beside / "ahead.safetensors")
            (beside / "position.json").write_text(json.dumps(place))

    @staticmethod
    def load(folder: Path) -> PolicySnapshot | None:
        """Read the one at ``folder``; None where there is none, or none that can be read."""
        try:
            place = json.loads((folder / "position.json").read_text())
            ahead = folder / "ahead.safetensors"
            return PolicySnapshot(
                tensors=load_file(folder / "state.safetensors"),
                ahead=load_arrays(ahead) if ahead.is_file() else None,
                **place,
            )
        except (FileNotFoundError, ValueError, TypeError, SafetensorError):
            return None


def learner_state(learner: Any) -> tuple[int, dict[str, Tensor]]:
    """Number of updates and state of a learner; runs in its process."""
    module = learner.module[DEFAULT_MODULE_ID].unwrapped()
    tensors = {f"{_MODULE}{name}": value.detach().cpu().clone() for name, value in module.state_dict().items()}
    for which, (_, optimizer) in enumerate(learner.get_optimizers_for_module(DEFAULT_MODULE_ID)):
        for index, slots in optimizer.state_dict()["state"].items():
            for name, value in slots.items():
                tensors[f"{_OPTIMIZER}{which}.{index}.{name}"] = torch.as_tensor(value).detach().cpu().clone()
    return learner._weights_seq_no, tensors


def restore_learner(learner: Any, number: int, tensors: Mapping[str, Tensor]) -> None:
    """Put :func:`learner_state` into a learner; runs in its process."""
    module = learner.module[DEFAULT_MODULE_ID].unwrapped()
    module.load_state_dict({n.removeprefix(_MODULE): value for n, value in tensors.items() if n.startswith(_MODULE)})
    for which, (_, optimizer) in enumerate(learner.get_optimizers_for_module(DEFAULT_MODULE_ID)):
        state = optimizer.state_dict()
        begin = f"{_OPTIMIZER}{which}."
        for key, value in tensors.items():
            if key.startswith(begin):
                index, _, name = key.removeprefix(begin).partition(".")
                state["state"].setdefault(int(index), {})[name] = value.clone()
        optimizer.load_state_dict(state)
    learner._weights_seq_no = number


def copied(weights: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Weights that do not change any more."""
    return {name: np.array(value) for name, value in weights.items()}
