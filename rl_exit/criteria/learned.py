"""What a learned criterion has learned: named tensors with the sizes they fit, and how they are kept on disk.

A folder of criteria holds two files per word::

    <word>.safetensors      the tensors
    <word>.json             format, word, sizes, parameters (threshold, ...), notes on the fit

A head's tensors are its ``state_dict`` (see :mod:`rl_exit.criteria.heads`), whether it was trained together with the
model (:mod:`rl_exit.objectives`) or fitted on frozen exits (:mod:`rl_exit.criteria.fitting`).

========== ==================================================================================================
word       tensors (``torch.nn.Linear`` weights are [out, in])
========== ==================================================================================================
right_tool ``temperature`` [L-1]
beem       ``weight`` [L-1]
lte        ``linear.weight`` [1, H], ``linear.bias`` [1]
calm_meta  as lte
cat        ``pool.*`` [32, H], ``hidden.*`` [32, C + 35 + max(L-3, 0)], ``out.*`` [1, 32]
palbert    ``first.*`` [W, 2H], ``layer`` [L-1, W], ``out.*`` [1, W]
jei        ``first.<l-1>.*`` [32, H + 4], ``out.<l-1>.*`` [1, 32] for l = 1..L-1
========== ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_exit.errors import RunError, nearest
from rl_exit.files import atomic_file, read_json, write_json

FORMAT = 1
LEARNED = ("right_tool", "lte", "cat", "calm_meta", "palbert", "beem", "jei")


@dataclass(frozen=True, eq=False)
class Learned:
    """The tensors of one learned criterion; equal to nothing but itself.

    Attributes:
        word: One of ``LEARNED``.
        num_layers: L of the model they belong to.
        hidden_size: H.
        num_classes: C.
        tensors: By name, as in the table above; on the CPU, without gradient.
        params: Parameters the criterion is made with unless others are given, e.g. ``{"threshold": 0.5}``; JSON values.
        notes: How they were found (seed, loss, objective, ...); JSON values, read by nobody but people.
    """

    word: str
    num_layers: int
    hidden_size: int
    num_classes: int
    tensors: Mapping[str, Tensor] = field(repr=False)
    params: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.word not in LEARNED:
            raise ValueError(f"'{self.word}' is no learned criterion; accepted: {', '.join(LEARNED)}")
        plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.tensors.items()}
        bad = [name for name, tensor in plain.items() if not bool(torch.isfinite(tensor).all())]
        if bad or not plain:
            what = f"not finite: {', '.join(bad)}" if bad else "no tensors"
            raise RunError(f"criterion '{self.word}': {what}; what was learned cannot be used (did training diverge?)")
        object.__setattr__(self, "tensors", plain)


def write_learned(folder: Path, learned: Learned) -> None:
    """Write ``<word>.safetensors`` and ``<word>.json`` into a folder, which is made; files of that word are replaced.

    Raises:
        UserError: The folder cannot be written, or no space is left.
    """
    from safetensors.torch import save_file

    # The description last, and with the shapes: a reader refuses tensors that do not belong to it.
    with atomic_file(folder / f"{learned.word}.safetensors") as beside:
        save_file(dict(learned.tensors), beside)
    write_json(
        folder / f"{learned.word}.json",
        {
            "format": FORMAT,
            "criterion": learned.word,
            "num_layers": learned.num_layers,
            "hidden_size": learned.hidden_size,
            "num_classes": learned.num_classes,
            "params": dict(learned.params),
            "notes": dict(learned.notes),
            "tensors": {name: list(tensor.shape) for name, tensor in learned.tensors.items()},
        },
    )


def read_learned(folder: Path, word: str) -> Learned:
    """Read what :func:`write_learned` wrote.

    Raises:
        RunError: Missing, of another format, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description = folder / f"{word}.json"
    if not description.is_file():
        there = learned_words(folder)
        raise RunError(
            f"{folder}: no learned criterion '{word}' here; found: {', '.join(there) or 'none'}.{nearest(word, there)}"
        )
    tree = read_json(description)
    if tree.get("format") != FORMAT or tree.get("criterion") != word:
        raise RunError(
            f"{description}: format {tree.get('format')} of criterion '{tree.get('criterion')}'; "
            f"accepted here: format {FORMAT} of '{word}'"
        )
    weights = folder / f"{word}.safetensors"
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{weights}: cannot be read: {error}") from None
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != tree.get("tensors"):
        raise RunError(f"{weights}: its tensors are not those that {description.name} describes")
    layers, hidden, classes = (tree.get(key) for key in ("num_layers", "hidden_size", "num_classes"))
    if not (isinstance(layers, int) and isinstance(hidden, int) and isinstance(classes, int)):
        raise RunError(f"{description}: num_layers, hidden_size and num_classes must be whole numbers")
    return Learned(word, layers, hidden, classes, tensors, tree.get("params", {}), tree.get("notes", {}))


def learned_words(folder: Path) -> list[str]:
    """Words of the learned criteria in a folder, in the order of ``LEARNED``; none if there is no such folder."""
    return [word for word in LEARNED if (folder / f"{word}.json").is_file()]
