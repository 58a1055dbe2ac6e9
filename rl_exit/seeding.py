"""Independent random streams from one seed: every use names itself, so no two share a stream."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the use that ``names`` spell out, e.g. ``derive_seed(0, "policy", round)``."""
    digest = hashlib.sha256("\x1f".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
