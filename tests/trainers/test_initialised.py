"""A run that starts from an initialised model is the run that trains it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rl_exit.config import load_config
from rl_exit.errors import ModelError
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.progress import Silent
from rl_exit.trainers.alternation import initialise
from rl_exit.trainers.initialised import take_initialised


def saved(folder: Path, backbone: Path, seed: int, names: tuple[str, ...] = ("a", "b"), **options: object) -> Path:
    options = {"policy_width": 8, "pooling": "cls", **options}
    EarlyExitModel.from_backbone(str(backbone), names, seed=seed, **options).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def test_backbone_and_exits_are_taken_and_the_policy_is_the_runs_own(tiny_backbone: Path, tmp_path: Path) -> None:
    start = saved(tmp_path / "start", tiny_backbone, 0, policy_width=16)
    given = saved(tmp_path / "other" / "init" / "model", tiny_backbone, 1)
    (given / "criteria").mkdir()
    (given / "criteria" / "lte.json").write_text("{}")
    (given.parent / "forgetting.arrow").write_text("visits")
    for source in (given, tmp_path / "other"):  # the folder itself, or the run that holds it
        target = tmp_path / "run" / "init" / "model"
        assert take_initialised(str(source), start, target) == {"taken_from": str(source)}
        made, first, second = (load_file(folder / "model.safetensors") for folder in (target, start, given))
        assert made.keys() == first.keys()
        for name, value in made.items():
            assert torch.equal(value, (first if name.startswith("policy.") else second)[name]), name
        assert any(not torch.equal(value, first[name]) for name, value in made.items())
        assert (target / "criteria" / "lte.json").is_file()
        assert (target.parent / "forgetting.arrow").read_text() == "visits"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"names": ("b", "a")}, "classes ['b', 'a']; this run needs ['a', 'b']"),
        ({"names": tuple(f"class {i}" for i in range(20))}, "classes 20 of them"),
        ({"pooling": "mean"}, "pooling 'mean'; this run needs 'cls'"),
    ],
)
def test_another_model_is_refused(tiny_backbone: Path, tmp_path: Path, options: dict[str, object], said: str) -> None:
    start = saved(tmp_path / "start", tiny_backbone, 0)
    other = saved(tmp_path / "other", tiny_backbone, 1, **options)  # type: ignore[arg-type]
    with pytest.raises(ModelError) as raised:
        take_initialised(str(other), start, tmp_path / "target")
    assert said in str(raised.value) and str(other) in str(raised.value)
    assert not (tmp_path / "target").exists()


def test_no_model_there(tiny_backbone: Path, tmp_path: Path) -> None:
    start = saved(tmp_path / "start", tiny_backbone, 0)
    with pytest.raises(ModelError, match="nowhere"):
        take_initialised(str(tmp_path / "nowhere"), start, tmp_path / "target")


def test_the_run_equals_the_one_that_trains_it(tiny_run: list[str]) -> None:
    """Whatever follows the initialisation depends on its model and on the configuration alone."""
    words = [*tiny_run, "init.epochs=1", "task.max_train=32"]
    whole = load_config(None, [*words, "model.policy_width=4", "policy.epochs=9"])
    model = initialise(whole, Silent())
    assert model == whole.run_dir / "init" / "model" and initialise(whole, Silent()) == model
    assert not (whole.run_dir / "init" / "start").exists() and not (whole.run_dir / "rounds").exists()
    for width, same in ((4, True), (8, False)):  # a setting that the initialisation does not depend on
        own = load_config(None, [*words, f"name=own-{width}", f"model.policy_width={width}", f"init.model={model}"])
        here, there = (load_file(folder / "model.safetensors") for folder in (initialise(own, Silent()), model))
        for name in here:
            if same or not name.startswith("policy."):
                assert torch.equal(here[name], there[name]), name
        marker = json.loads((own.run_dir / "steps" / "init.json").read_text())
        assert marker["results"] == {"taken_from": str(model)}
        assert (own.run_dir / "init" / "forgetting.arrow").is_file()
