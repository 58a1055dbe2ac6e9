"""Starting a run from a model that another run has initialised, in place of training one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rl_exit.errors import ModelError
from rl_exit.models.early_exit import EarlyExitModel

FORGETTING = "forgetting.arrow"
CRITERIA = "criteria"


def take_initialised(source: str, start: Path, target: Path) -> dict[str, Any]:
    """Put the backbone and exits of an initialised model under the fresh policy of this run.

    The policy is that of ``start``, so a run that takes an initialisation equals, bit for bit, the run that trained it.
    What the initialisation left beside its model (the heads of learned criteria, the record of forgetting) comes along.

    Args:
        source: Folder of the initialised model, or the run directory that holds it in ``init/model``.
        start: This run's model before any training.
        target: Where the initialised model of this run is written; ``forgetting.arrow`` goes into the folder above.

    Raises:
        ModelError: No model there, or one of another task, backbone, tokenizer or pooling.
    """
    folder = _model_folder(Path(source))
    model = EarlyExitModel.from_pretrained(start)
    given = EarlyExitModel.from_pretrained(folder)
    _check_fits(source, given, model)
    model.backbone.load_state_dict(given.backbone.state_dict())
    model.exits.load_state_dict(given.exits.state_dict())
    model.save_pretrained(target)
    if (folder / CRITERIA).is_dir():
        shutil.copytree(folder / CRITERIA, target / CRITERIA, dirs_exist_ok=True)
    if (folder.parent / FORGETTING).is_file():
        shutil.copyfile(folder.parent / FORGETTING, target.parent / FORGETTING)
    return {"taken_from": source}


def _model_folder(source: Path) -> Path:
    """The folder itself, or ``init/model`` of a run directory."""
    inside = source / "init" / "model"
    return inside if not (source / "config.json").is_file() and inside.is_dir() else source


def _check_fits(source: str, given: EarlyExitModel, wanted: EarlyExitModel) -> None:
    pairs = {
        "classes": (_classes(given), _classes(wanted)),
        "pooling": (given.config.pooling, wanted.config.pooling),
        "kind of backbone": (given.config.backbone.get("model_type"), wanted.config.backbone.get("model_type")),
        "layers": (given.num_layers, wanted.num_layers),
        "hidden size": (given.exits.hidden_size, wanted.exits.hidden_size),
    }
    for what, (found, needed) in pairs.items():
        if found != needed:
            raise ModelError(f"init.model = {source}: {what} {_short(found)}; this run needs {_short(needed)}")
    if _shapes(given) != _shapes(wanted):
        raise ModelError(f"init.model = {source}: its weights have other names or shapes than those of model.backbone")
    if given.tokenizer.get_vocab() != wanted.tokenizer.get_vocab():
        raise ModelError(f"init.model = {source}: its tokenizer is not that of model.backbone")


def _classes(model: EarlyExitModel) -> list[str]:
    return [model.config.id2label[number] for number in range(model.config.num_labels)]


def _shapes(model: EarlyExitModel) -> dict[str, tuple[int, ...]]:
    state = {**model.backbone.state_dict(prefix="backbone."), **model.exits.state_dict(prefix="exits.")}
    return {name: tuple(value.shape) for name, value in state.items()}


def _short(value: object) -> str:
    if isinstance(value, list):
        return f"{value[:8]}" if len(value) <= 8 else f"{len(value)} of them, {value[:3]}, ..."
    return repr(value)
