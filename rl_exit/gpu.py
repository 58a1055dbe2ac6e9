"""Kernels for GPUs (:mod:`rl_exit.gpu_kernels`), unless ``RL_EXIT_GPU_KERNELS=0``.

They are compiled by Triton, which comes with torch's builds for GPUs, at the first text, and kept by Triton for the
next process. Where they are refused or cannot be had, torch computes the same, in some hundred launches a decision.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch

SWITCH = "RL_EXIT_GPU_KERNELS"


@cache
def kernels() -> Any | None:
    """The module of kernels, tried once; None where there is none to be had."""
    if os.environ.get(SWITCH, "1") == "0" or not torch.cuda.is_available():
        return None
    try:
        found = import_module("rl_exit.gpu_kernels")
        _try(found)
    except Exception as error:  # noqa: BLE001 - whatever a compiler may raise, torch computes the same
        logging.getLogger(__name__).warning(
            "no kernels for this GPU, torch computes instead: %s: %s", type(error).__name__, error
        )
        return None
    return found


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the one where kernels are launched."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def power_of_two(at_least: int) -> int:
    """The smallest power of two that is not below a number of at least 1."""
    return 1 << (at_least - 1).bit_length()


def _try(found: Any) -> None:
    """Copy two rows.

    Raises:
        RuntimeError: They came out wrong.
    """
    source = torch.arange(8.0, device="cuda").reshape(2, 2, 2)
    out, seen = torch.empty_like(source), torch.empty((2, 2), dtype=torch.bool, device="cuda")
    lengths = torch.tensor([2, 1], device="cuda")
    found.gather[(2, 1)](source, lengths, lengths, out, seen, 0, 2, 2, SIZE=2, CHOSEN=False, BLOCK=2, H2=2)
    if out.flatten().tolist() != [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0]:
        raise RuntimeError("a copy of two rows came out wrong")
