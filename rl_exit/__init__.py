"""rl-exit: language models that stop early.

The two names most programs need are loaded on first use, so that ``import rl_exit`` stays quick::

    from rl_exit import EarlyExitModel
    model = EarlyExitModel.from_pretrained("runs/docstrings/model")
    model.predict(["Return the eigenvalues of a matrix."])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_exit.config import RunConfig, load_config
    from rl_exit.models.early_exit import EarlyExitModel

__version__ = "0.1.0"
__all__ = ["EarlyExitModel", "RunConfig", "__version__", "load_config"]

_LAZY = {
    "EarlyExitModel": "rl_exit.models.early_exit",
    "RunConfig": "rl_exit.config",
    "load_config": "rl_exit.config",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rl_exit' has no attribute {name!r}")
