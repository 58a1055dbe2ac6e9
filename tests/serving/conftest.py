"""What tests of serving share: the folder of a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_exit import EarlyExitModel


@pytest.fixture(scope="session")
def folder(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served") / "model"
    EarlyExitModel.from_backbone(str(tiny_backbone), ["animal", "tool"]).save_pretrained(made)
    return made
