"""Logits of every exit on some instances, computed once and kept beside the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rl_exit.data.instances import Instances
from rl_exit.files import atomic_file
from rl_exit.measurement import every_exit
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.progress import Display
from rl_exit.trainers.store_phase import model_fingerprint


def kept_logits(
    file: Path, model: EarlyExitModel, instances: Instances, display: Display, title: str
) -> npt.NDArray[np.float32]:
    """Read what is kept, or run the model and keep it.

    Args:
        file: Safetensors file; one made from another model or other instances, or a damaged one, is replaced.
        model: The model; put into evaluation mode.
        instances: N instances.
        display: Where progress is shown.
        title: What the pass is called there.

    Returns:
        [N, L, C].

    Raises:
        UserError: The file cannot be written.
    """
    origin = {"model": model_fingerprint(model), "instances": instances.fingerprint}
    if file.is_file():
        try:
            with safe_open(str(file), "numpy") as tensors:
                if tensors.metadata() == origin:
                    return tensors.get_tensor("logits")
        except SafetensorError:
            pass  # damaged: computed again
    with display.step(title, len(instances)) as progress:
        logits, _, _ = every_exit(model.eval(), instances, progress)
    with atomic_file(file) as beside:
        save_file({"logits": logits}, str(beside), metadata=origin)
    return logits
