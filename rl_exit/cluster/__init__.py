"""Sessions, resource plan and everything that reaches a Ray cluster (no torch at module level)."""

from __future__ import annotations

if __name__ != "rl_exit.cluster":
    raise ImportError("import 'rl_exit.cluster': the top-level link 'cluster' only gives the folder its place")
