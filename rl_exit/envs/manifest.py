"""The manifest of a state store: ``store.json``, written last, so that a folder without it is no store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rl_exit.envs.shards import Layout
from rl_exit.errors import RunError

FORMAT = "rl-exit state store"
VERSION = 1
MANIFEST = "store.json"


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest lists it.

    Attributes:
        index: Number of the shard.
        file: File name inside the store.
        first_row: Global row of its first instance.
        rows: Number of instances.
        num_bytes: Size of the file, bytes.
    """

    index: int
    file: str
    first_row: int
    rows: int
    num_bytes: int


def write_manifest(folder: Path, layout: Layout, shards: Sequence[ShardInfo], instances: str, model: str) -> None:
    """Write the manifest of a folder whose shards are complete."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **asdict(layout),
        "num_instances": shards[-1].first_row + shards[-1].rows,
        "instances": instances,
        "model": model,
        "shards": [{"file": s.file, "rows": s.rows, "bytes": s.num_bytes} for s in shards],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> tuple[Layout, list[ShardInfo], str, str]:
    """Layout, shards, fingerprint of the instances and fingerprint of the model.

    Raises:
        RunError: No such folder, no store, another version, or a damaged manifest.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such state store")
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunError(f"{folder}: no state store ('{MANIFEST}' is missing)") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / MANIFEST}: cannot be read: {error}") from None
    return parse_manifest(text, folder)


def parse_manifest(text: str, folder: Path) -> tuple[Layout, list[ShardInfo], str, str]:
    """The same from the manifest's text; ``folder`` is for messages.

    Raises:
        RunError: Another version, or a damaged manifest.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise RunError(f"{folder / MANIFEST}: cannot be read: {error}") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise RunError(f"{folder / MANIFEST}: not the manifest of a state store")
    if tree.get("version") != VERSION:
        raise RunError(f"{folder}: state store of version {tree.get('version')!r}; readable here: {VERSION}")
    try:
        layout = Layout(
            tree["num_layers"], tree["hidden_size"], tree["num_classes"], tree["dtype"], tree.get("keeps_logits", True)
        )
        infos: list[ShardInfo] = []
        row = 0
        for index, shard in enumerate(tree["shards"]):
            infos.append(ShardInfo(index, shard["file"], row, shard["rows"], shard["bytes"]))
            row += shard["rows"]
        if not infos or row != tree["num_instances"] or any(Path(info.file).name != info.file for info in infos):
            raise ValueError("rows and files of the shards do not fit")
        return layout, infos, tree["instances"], tree["model"]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder / MANIFEST}: damaged manifest: {error}") from None


def check_size(file: Path, expected: int) -> None:
    """Refuse a shard that is missing or has not the size it was written with.

    Raises:
        RunError: It is missing or truncated.
    """
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise RunError(f"{file}: this shard of the state store is missing") from None
    if size != expected:
        raise RunError(f"{file}: {size} bytes of {expected}: this shard is truncated or damaged; build the store again")
