from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rl_exit.config import load_config
from rl_exit.criteria.heads import make_head
from rl_exit.criteria.learned import read_learned
from rl_exit.criteria.registry import load_criterion
from rl_exit.data.instances import Instances
from rl_exit.errors import UserError
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.objectives import ObjectiveOptions
from rl_exit.trainers.exit_training import ExitTraining, LoraSettings, objective_options, train_crew, train_exits
from rl_exit.trainers.forgetting import read_visits
from rl_exit.trainers.supervised import OptimSettings
from rl_exit.trainers.train_crew import TrainCrew

SETTINGS = OptimSettings(
    epochs=1,
    batch_size=8,
    lr=1e-3,
    head_lr=1e-3,
    warmup=0.0,
    weight_decay=0.0,
    clip=1.0,
    accumulate=1,
    precision="float32",
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> ExitTraining:
    """A small training without dropout, so that one and two workers compute the same."""
    folder = tmp_path_factory.mktemp("job")
    model = EarlyExitModel.from_backbone(str(tiny_backbone), ["a", "b"], policy_width=4, dropout=0.0, max_length=32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.backbone |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model.save_pretrained(folder / "start")
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 9, 64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    Instances(
        ids=np.arange(64, dtype=np.int64),
        labels=rng.integers(0, 2, 64).astype(np.int64),
        tokens=rng.integers(4, 25, offsets[-1]).astype(np.int32),
        offsets=offsets,
        token_types=None,
        pad_token_id=0,
    ).save(folder / "train.arrow")
    return ExitTraining(
        model=str(folder / "start"),
        instances=str(folder / "train.arrow"),
        output=str(folder / "out"),
        checkpoint=str(folder / "checkpoint"),
        weights="weighted",
        settings=SETTINGS,
        lora=LoraSettings(),
        seed=5,
    )


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def changed(before: str, after: str) -> set[str]:
    a, b = weights(before), weights(after)
    return {name for name in a if not torch.equal(a[name], b[name])}


def run(job: ExitTraining, tmp_path: Path, name: str, crew: TrainCrew | None = None, **changes: object) -> str:
    job = replace(job, output=str(tmp_path / name), checkpoint=str(tmp_path / f"{name}-checkpoint"), **changes)
    seen: list[int] = []
    train_exits(job, lambda done, total, epoch, values: seen.append(done), crew=crew)
    assert seen and seen == sorted(seen)
    return job.output


def test_initialisation_leaves_the_policy_alone(job: ExitTraining, tmp_path: Path) -> None:
    names = changed(job.model, run(job, tmp_path, "out"))
    assert any(name.startswith("backbone") for name in names) and any(name.startswith("exits") for name in names)
    assert not any(name.startswith("policy") for name in names)


@pytest.mark.parametrize("draw", ["sample", "expected"])
def test_task_step_freezes_the_policy(job: ExitTraining, tmp_path: Path, draw: str) -> None:
    names = changed(job.model, run(job, tmp_path, "out", weights=draw))
    assert names and not any(name.startswith("policy") for name in names)


@pytest.mark.parametrize(
    ("word", "criterion"), [("alternate", "lte"), ("cat", "cat"), ("pondernet", "palbert"), ("jei", "jei")]
)
def test_heads_are_saved_as_criteria(job: ExitTraining, tmp_path: Path, word: str, criterion: str) -> None:
    out = run(job, tmp_path, "out", weights=word, options=ObjectiveOptions(second_epochs=1))
    rule = load_criterion(Path(out) / "criteria", criterion)
    assert read_learned(Path(out) / "criteria", criterion).notes["objective"] == word
    model = EarlyExitModel.from_pretrained(out)
    assert {p.exit_layer for p in model.predict(["the old cat", "a saw"], criterion=rule)} <= {1, 2, 3}
    fresh = make_head(criterion, 3, 32, 2).state_dict()
    learned = read_learned(Path(out) / "criteria", criterion).tensors
    assert learned.keys() == fresh.keys()


@pytest.mark.parametrize("word", ["uniform", "self_distillation"])
def test_objectives_without_heads_leave_no_criteria(job: ExitTraining, tmp_path: Path, word: str) -> None:
    out = run(job, tmp_path, "out", weights=word, options=ObjectiveOptions(second_epochs=1, distillation=0.5))
    assert not (Path(out) / "criteria").exists()
    assert any(name.startswith("exits") for name in changed(job.model, out))


def test_settings_reach_the_loss(job: ExitTraining, tmp_path: Path) -> None:
    plain = run(job, tmp_path, "plain", weights="expected")
    for name, options in (("a", ObjectiveOptions(anchor=0.5)), ("d", ObjectiveOptions(distillation=0.5))):
        assert changed(plain, run(job, tmp_path, name, weights="expected", options=options))


def test_options_come_from_the_section_that_has_them() -> None:
    words = ["init.second_epochs=4", "init.gate_price=0.1", "task_step.anchor=0.3", "task_step.temperature=3.0"]
    config = load_config(None, words)
    assert objective_options(config.init) == ObjectiveOptions(
        second_epochs=4, distillation=0.5, temperature=2.0, gate_price=0.1
    )
    assert objective_options(config.task_step) == ObjectiveOptions(temperature=3.0, anchor=0.3)


def test_lora_is_merged_and_spares_the_embeddings(job: ExitTraining, tmp_path: Path) -> None:
    out = run(job, tmp_path, "out", lora=LoraSettings(rank=2, alpha=4.0))
    names = changed(job.model, out)
    assert weights(out).keys() == weights(job.model).keys()
    assert any("attention" in name for name in names) and not any("embeddings" in name for name in names)


def test_workers_with_another_working_directory_find_the_files(
    job: ExitTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rl_exit.trainers.exit_training import absolute_paths

    monkeypatch.chdir(tmp_path)
    given = replace(job, model="runs/a/init/start", output="runs/a/init/model", visits=None)
    found = absolute_paths(given)
    assert found["model"] == str(tmp_path / "runs/a/init/start")
    assert found["output"] == str(tmp_path / "runs/a/init/model")
    assert found["instances"] == job.instances and "visits" not in found


def test_errors_for_the_user_come_through(job: ExitTraining, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the training loss is"):
        run(job, tmp_path, "out", settings=replace(SETTINGS, lr=1e30, head_lr=1e30, clip=1e30, epochs=4))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def crew(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainCrew]:
    """Two workers that stay for all trainings."""
    workers = train_crew(2, False, tmp_path_factory.mktemp("train"))
    yield workers
    workers.stop()


@pytest.mark.ray
def test_two_workers_are_one_with_twice_the_batch(job: ExitTraining, tmp_path: Path, crew: TrainCrew) -> None:
    one = weights(run(job, tmp_path, "one", settings=replace(SETTINGS, batch_size=16)))
    two = weights(run(job, tmp_path, "two", crew=crew))
    other = weights(run(job, tmp_path, "other", settings=replace(SETTINGS, batch_size=16), seed=6))

    def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return max(float((a[name] - b[name]).abs().max()) for name in a if a[name].is_floating_point())

    assert apart(one, two) < 1e-4 < apart(one, other)


@pytest.mark.ray
def test_two_workers_follow_every_phase(job: ExitTraining, tmp_path: Path, crew: TrainCrew) -> None:
    options = ObjectiveOptions(second_epochs=1)
    words = {"weights": "jei", "options": options, "settings": replace(SETTINGS, batch_size=16)}
    one = run(job, tmp_path, "one", **words, visits=str(tmp_path / "one.arrow"))
    words["settings"] = SETTINGS
    two = run(job, tmp_path, "two", crew=crew, **words, visits=str(tmp_path / "two.arrow"))
    a, b = weights(one), weights(two)
    assert max(float((a[name] - b[name]).abs().max()) for name in a if a[name].is_floating_point()) < 1e-4
    heads = [read_learned(Path(out) / "criteria", "jei").tensors for out in (one, two)]
    assert all(torch.allclose(heads[0][name], heads[1][name], atol=1e-4) for name in heads[0])
    # Each of the 64 instances was seen by one of the two workers; dropout is off, so the answers are the same.
    assert read_visits(tmp_path / "one.arrow").equals(read_visits(tmp_path / "two.arrow"))


@pytest.mark.ray
def test_a_worker_tells_its_error(job: ExitTraining, tmp_path: Path, crew: TrainCrew) -> None:
    with pytest.raises(UserError, match="the training loss is"):
        run(job, tmp_path, "out", crew=crew, settings=replace(SETTINGS, lr=1e30, head_lr=1e30, clip=1e30, epochs=4))
