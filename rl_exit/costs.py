"""What a layer costs in time on one machine: measured once, kept beside the model, read wherever layers were counted.

``costs.json`` in the model's folder holds medians of seconds, for a batch of B texts of T tokens each without padding,
in the parts in which the engine runs it (:data:`rl_exit.pooling.MOST_TOKENS`)::

    embed_seconds   [B, T]        ids to the input of layer 1
    layer_seconds   [B, T, L]     each layer, with the engine's own work around it
    exit_seconds    [B, L]        pooled state and exit classifier of each layer
    policy_seconds  [B, L-1]      the policy at each layer, on top of its exit

Everything between the measured sizes is interpolated along lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_exit.errors import RunError
from rl_exit.files import read_json, write_json

FILE = "costs.json"
FORMAT = 1
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CostModel:
    """Measured seconds; see the module.

    Attributes:
        batch_sizes: [S] rising.
        lengths: [T] rising, tokens.
        embed: [S, T].
        layers: [S, T, L].
        exits: [S, L].
        policy: [S, L-1].
        where: Machine, threads, dtype, versions, date: what the figures hold for.
    """

    batch_sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    embed: FloatArray
    layers: FloatArray
    exits: FloatArray
    policy: FloatArray
    where: Mapping[str, Any]

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.layers.shape[2])

    def full_depth(self, batch_size: int, lengths: npt.ArrayLike) -> FloatArray:
        """Seconds of each text without exits, [N]: all layers and the last exit.

        Args:
            batch_size: Texts that run together.
            lengths: [N], tokens.
        """
        at = self._per_row(batch_size, lengths)
        return np.asarray(at.embed + at.layers.sum(1) + at.exits[-1])

    def leaving(self, batch_size: int, lengths: npt.ArrayLike) -> FloatArray:
        """Seconds of each text that leaves at each layer by the policy, [N, L], with exits and policy on its way.

        The batch is taken to be full at every layer, as the engine keeps it over many texts (:mod:`rl_exit.pooling`).

        Args:
            batch_size: Texts that run together.
            lengths: [N], tokens.
        """
        at = self._per_row(batch_size, lengths)
        decisions = at.exits + np.append(at.policy, 0.0)
        return np.asarray(at.embed[:, None] + np.cumsum(at.layers + decisions, axis=1))

    def in_layers(self, batch_size: int, length: int) -> FloatArray:
        """Time of leaving at each layer in units of a layer, [L]; L at the last: in place of the layer's number.

        Args:
            batch_size: Texts that run together.
            length: Tokens of a usual text.
        """
        seconds = self.leaving(batch_size, [length])[0]
        return np.asarray(self.num_layers * seconds / seconds[-1])

    def speedup(self, batch_size: int, lengths: npt.ArrayLike, exit_layers: npt.ArrayLike) -> float:
        """How many times as fast as full depth texts are that leave at the given layers, [N] each."""
        left = np.asarray(exit_layers, dtype=np.int64) - 1
        seconds = self.leaving(batch_size, lengths)[np.arange(len(left)), left]
        return float(self.full_depth(batch_size, lengths).sum() / seconds.sum())

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "format": FORMAT,
            "where": dict(self.where),
            "batch_sizes": list(self.batch_sizes),
            "lengths": list(self.lengths),
            "embed_seconds": self.embed.tolist(),
            "layer_seconds": self.layers.tolist(),
            "exit_seconds": self.exits.tolist(),
            "policy_seconds": self.policy.tolist(),
        }

    def _per_row(self, batch_size: int, lengths: npt.ArrayLike) -> _Rates:
        tokens = np.asarray(lengths, dtype=np.float64)
        sizes = np.asarray(self.batch_sizes, dtype=np.float64)
        # Per text, not per batch: between two sizes, and beyond the largest, a text costs about the same.
        scale = sizes[:, None]
        embed = _along(sizes, self.embed / scale, batch_size)
        layers = _along(sizes, self.layers / scale[..., None], batch_size)
        return _Rates(
            embed=_along_lengths(self.lengths, embed, tokens),
            layers=np.stack([_along_lengths(self.lengths, column, tokens) for column in layers.T], 1),
            exits=_along(sizes, self.exits / scale, batch_size),
            policy=_along(sizes, self.policy / scale, batch_size),
        )


@dataclass(frozen=True)
class _Rates:
    """Seconds per text at one batch size: [N], [N, L], [L], [L-1]."""

    embed: FloatArray
    layers: FloatArray
    exits: FloatArray
    policy: FloatArray


def write_costs(folder: Path, costs: CostModel) -> None:
    """Keep a cost model beside a model.

    Raises:
        UserError: The folder cannot be written.
    """
    write_json(folder / FILE, costs.to_dict())


def read_costs(folder: Path) -> CostModel | None:
    """The cost model kept beside a model; None if there is none.

    Raises:
        RunError: Of another format, or damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    tree = read_json(path)
    if tree.get("format") != FORMAT:
        raise RunError(f"{path}: format {tree.get('format')}; accepted here: {FORMAT}; 'rl-exit profile' measures anew")
    try:
        names = ("embed_seconds", "layer_seconds", "exit_seconds", "policy_seconds")
        embed, layers, exits, policy = (np.array(tree[name], dtype=np.float64) for name in names)
        sizes, lengths = (tuple(int(value) for value in tree[name]) for name in ("batch_sizes", "lengths"))
        depth = layers.shape[2]
        shapes = ((len(sizes), len(lengths)), (len(sizes), len(lengths), depth), (len(sizes), depth))
        if (embed.shape, layers.shape, exits.shape, policy.shape) != (*shapes, (len(sizes), depth - 1)):
            raise ValueError("its arrays do not fit together")
        if not all(np.isfinite(array).all() and (array >= 0).all() for array in (embed, layers, exits, policy)):
            raise ValueError("times must be finite and not negative")
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise RunError(f"{path}: damaged ({error}); 'rl-exit profile' measures anew") from None
    return CostModel(sizes, lengths, embed, layers, exits, policy, tree.get("where", {}))


def _along(sizes: FloatArray, values: FloatArray, size: float) -> FloatArray:
    """Values at one batch size, interpolated along the first axis; those of the ends beyond them."""
    at = float(np.clip(size, sizes[0], sizes[-1]))
    above = int(np.clip(np.searchsorted(sizes, at), 1, max(len(sizes) - 1, 1)))
    if len(sizes) == 1:
        return values[0]
    low, high = sizes[above - 1], sizes[above]
    share = (at - low) / (high - low)
    return np.asarray((1.0 - share) * values[above - 1] + share * values[above])


def _along_lengths(known: tuple[int, ...], values: FloatArray, wanted: FloatArray) -> FloatArray:
    return np.asarray(np.interp(wanted, np.asarray(known, dtype=np.float64), values))
