"""Building a state store shard by shard, in one process or in many that share a disk.

The shards are collected in ``.<name>.partial`` beside the store's place; :func:`finish` checks them, writes the
manifest and renames the folder. A build that was killed can be resumed: :func:`written_shards` says what is complete.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rl_exit.envs.manifest import MANIFEST, ShardInfo, write_manifest
from rl_exit.envs.shards import (
    Layout,
    ShardOrigin,
    StateBlock,
    checked_block,
    read_origin,
    shard_name,
    write_shard_file,
    writing,
)
from rl_exit.errors import RunError


def write_shard(
    path: str | os.PathLike[str],
    index: int,
    ids: npt.ArrayLike,
    labels: npt.ArrayLike,
    states: npt.ArrayLike,
    losses: npt.ArrayLike,
    correct: npt.ArrayLike,
    logits: npt.ArrayLike,
    *,
    dtype: str = "float32",
    instances: str = "",
    model: str = "",
) -> None:
    """Write one shard by itself: several processes build a store together, then one of them calls :func:`finish`.

    Writing the same shard again replaces it, so a repeated piece of work does no harm.

    Args:
        path: Folder the store will have.
        index: Number of the shard, from 0; the rows of a store follow its shards.
        ids: [B], and so on as in :class:`StateBlock`, B >= 1.
        labels: [B].
        states: [B, L, H].
        losses: [B, L].
        correct: [B, L].
        logits: [B, L, C].
        dtype: Storage of the states.
        instances: Fingerprint of the tokenised instances.
        model: Fingerprint of the model.

    Raises:
        ValueError: A shape does not fit, or the shard is empty.
        UserError: No space on the device, something else is at ``path``, values that are not finite.
    """
    state_shape, logit_shape = np.shape(states), np.shape(logits)
    if index < 0 or len(state_shape) != 3 or len(logit_shape) != 3 or state_shape[0] == 0:
        raise ValueError(
            f"write_shard: index {index}, states {state_shape}, logits {logit_shape}; "
            "accepted: index >= 0, [B, L, H], [B, L, C], B >= 1"
        )
    layout = Layout(state_shape[1], state_shape[2], logit_shape[2], dtype)
    block = checked_block(layout, ids, labels, states, losses, correct, logits)
    store_block(Path(path).absolute(), ShardOrigin(index, layout, instances, model), block)


def store_block(folder: Path, origin: ShardOrigin, block: StateBlock) -> None:
    """Write a checked block as a shard of the store that ``folder`` will be.

    Raises:
        UserError: As :func:`write_shard`.
    """
    refuse_other_things(folder)
    partial = _partial(folder)
    with writing(folder):
        partial.mkdir(parents=True, exist_ok=True)
    write_shard_file(partial / shard_name(origin.index), origin, block)


def written_shards(path: str | os.PathLike[str]) -> list[int]:
    """Numbers of the shards that a build in progress has complete; a resumed build need not write them again."""
    found = (re.fullmatch(r"shard-(\d{5,})\.arrow", entry.name) for entry in _entries(_partial(Path(path).absolute())))
    return sorted(int(match[1]) for match in found if match)


def written_origins(path: str | os.PathLike[str]) -> dict[int, tuple[ShardOrigin, int]]:
    """What the shards of a build in progress belong to, and their rows; those that cannot be read are left out."""
    folder = _partial(Path(path).absolute())
    found: dict[int, tuple[ShardOrigin, int]] = {}
    for index in written_shards(path):
        with contextlib.suppress(RunError):
            found[index] = read_origin(folder / shard_name(index))
    return found


def finish(
    path: str | os.PathLike[str],
    num_shards: int,
    *,
    layout: Layout,
    instances: str = "",
    model: str = "",
) -> None:
    """Check that all shards are there and of one build, write the manifest and put the store in its place.

    An older store at ``path`` stays until the new one is complete, and is then replaced.

    Args:
        path: Folder the store will have.
        num_shards: How many shards were to be written; numbers 0..num_shards-1.
        layout: Shapes and storage type that every shard must have.
        instances: Fingerprint of the tokenised instances that every shard must carry.
        model: Fingerprint of the model that every shard must carry.

    Raises:
        RunError: Shards are missing, too many, damaged or of another build; something else is at ``path``.
        UserError: No space on the device.
    """
    folder = Path(path).absolute()
    partial = _partial(folder)
    refuse_other_things(folder)
    if num_shards < 1:
        raise RunError(f"{folder}: a state store without instances cannot be written")
    present = written_shards(folder)
    if present != list(range(num_shards)):
        missing = sorted(set(range(num_shards)) - set(present))
        surplus = sorted(set(present) - set(range(num_shards)))
        raise RunError(f"{folder}: {num_shards} shards expected; missing: {missing}, not expected: {surplus}")
    infos: list[ShardInfo] = []
    row = 0
    for index in range(num_shards):
        file = partial / shard_name(index)
        origin, rows = read_origin(file)
        expected = ShardOrigin(index, layout, instances, model)
        if origin != expected:
            raise RunError(f"{file}: written by another build: {asdict(origin)}; expected: {asdict(expected)}")
        infos.append(ShardInfo(index, file.name, row, rows, file.stat().st_size))
        row += rows
    with writing(folder):
        for entry in _entries(partial):  # leftovers of writers that were killed
            if entry.name.startswith("."):
                entry.unlink()
        write_manifest(partial, layout, infos, instances, model)
        if folder.exists():
            shutil.rmtree(_replaced(folder), ignore_errors=True)
            folder.rename(_replaced(folder))
        partial.rename(folder)
        shutil.rmtree(_replaced(folder), ignore_errors=True)


def discard_partial(path: str | os.PathLike[str]) -> None:
    """Remove what an unfinished build of ``path`` has left; a finished store is not touched."""
    folder = Path(path).absolute()
    shutil.rmtree(_partial(folder), ignore_errors=True)
    shutil.rmtree(_replaced(folder), ignore_errors=True)


def refuse_other_things(folder: Path) -> None:
    """Allow a new store where there is nothing, or an older store to replace.

    Raises:
        RunError: Something else is there.
    """
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise RunError(f"{folder}: in the way of a state store, and no state store itself")


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
