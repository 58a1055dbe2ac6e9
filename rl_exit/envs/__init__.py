"""The episode as Gymnasium environments, and the state store they read (no Ray here)."""

from __future__ import annotations

if __name__ != "rl_exit.envs":
    raise ImportError("import 'rl_exit.envs': the top-level link 'envs' only gives the folder its place")

import gymnasium

from rl_exit.envs.build import discard_partial, finish, write_shard, written_shards
from rl_exit.envs.checker import EnvironmentCheckError, check_early_exit_env
from rl_exit.envs.episode import CONTINUE, EXIT, EarlyExitEnv, RewardFunction
from rl_exit.envs.manifest import ShardInfo
from rl_exit.envs.shards import Layout, Records, StateBlock
from rl_exit.envs.sources import LayerwiseModel, LiveSource, Outcome, Source, StoreSource
from rl_exit.envs.state_store import StateStore, StateStoreWriter
from rl_exit.envs.vector import EarlyExitVectorEnv

__all__ = [
    "CONTINUE",
    "ENV_ID",
    "EXIT",
    "EarlyExitEnv",
    "EarlyExitVectorEnv",
    "EnvironmentCheckError",
    "LayerwiseModel",
    "Layout",
    "LiveSource",
    "Outcome",
    "Records",
    "RewardFunction",
    "ShardInfo",
    "Source",
    "StateBlock",
    "StateStore",
    "StateStoreWriter",
    "StoreSource",
    "check_early_exit_env",
    "discard_partial",
    "finish",
    "write_shard",
    "written_shards",
]

ENV_ID = "rl_exit/EarlyExit-v0"
"""``gymnasium.make(ENV_ID, source=...)`` and ``gymnasium.make_vec(ENV_ID, num_envs=..., source=...)``."""

gymnasium.register(
    ENV_ID,
    entry_point="rl_exit.envs.episode:EarlyExitEnv",
    vector_entry_point="rl_exit.envs.vector:EarlyExitVectorEnv",
)
