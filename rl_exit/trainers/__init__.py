"""Initialisation, policy phase (RLlib), task phase (Ray Train) and their alternation."""

from __future__ import annotations

if __name__ != "rl_exit.trainers":
    raise ImportError("import 'rl_exit.trainers': the top-level link 'trainers' only gives the folder its place")
