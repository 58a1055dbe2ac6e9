"""The tiny learnable task that tests train on."""

from __future__ import annotations

import json
import random
from pathlib import Path

ANIMALS = ("cat", "dog", "horse", "mouse")
TOOLS = ("hammer", "saw", "drill", "wrench")
FILLER = ("the", "a", "my", "old", "new", "red", "blue", "big", "small", "near", "under", "saw", "lost", "found")


def write_tiny_task(folder: Path, sizes: dict[str, int] | None = None, seed: int = 0) -> Path:
    """Animals against tools among filler words, as JSONL files; a tool word that is also filler makes some hard."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (sizes or {"train": 192, "dev": 64, "test": 64}).items():
        with (folder / f"{split}.jsonl").open("w") as out:
            for index in range(count):
                label = index % 2
                text = rng.choices(FILLER, k=rng.randint(2, 7))
                text.insert(rng.randrange(len(text) + 1), rng.choice((ANIMALS, TOOLS)[label]))
                out.write(json.dumps({"text": " ".join(text), "label": ("animal", "tool")[label]}) + "\n")
    return folder
