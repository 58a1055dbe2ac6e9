from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import FORKS
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from rl_exit.data.instances import Instances
from rl_exit.errors import RunError, UserError
from rl_exit.models.early_exit import AllExits
from rl_exit.models.exits import ExitHeads
from rl_exit.objectives import ObjectiveOptions, Shape, objective
from rl_exit.trainers import supervised
from rl_exit.trainers.forgetting import Visits, read_visits
from rl_exit.trainers.supervised import OptimSettings, Rank, fit

SETTINGS = OptimSettings(
    epochs=3,
    batch_size=4,
    lr=1e-2,
    head_lr=1e-2,
    warmup=0.1,
    weight_decay=0.01,
    clip=1.0,
    accumulate=2,
    precision="float32",
)
SHAPE = Shape(num_layers=3, hidden_size=8, num_classes=2)


class TinyBackbone(nn.Module):
    """Three layers over a bag of words, with dropout so that random draws matter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.dropout = nn.Dropout(0.2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = (self.embed(input_ids) * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        states = []
        for layer in self.layers:
            h = torch.tanh(layer(self.dropout(h)))
            states.append(h)
        return torch.stack(states, 1)


class TinyExits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = TinyBackbone()
        self.exits = ExitHeads(3, 8, 2, dropout=0.2)

    def all_exits(self, input_ids: Tensor, attention_mask: Tensor) -> AllExits:
        states = self.backbone(input_ids, attention_mask)
        return AllExits(states=states, logits=self.exits(states))


def instances(count: int = 22) -> Instances:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 6, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Instances(
        ids=np.arange(count, dtype=np.int64),
        labels=rng.integers(0, 2, count).astype(np.int64),
        tokens=rng.integers(1, 20, offsets[-1]).astype(np.int32),
        offsets=offsets,
        token_types=None,
        pad_token_id=0,
    )


def trained(
    folder: Path,
    settings: OptimSettings = SETTINGS,
    seed: int = 3,
    stop_at: int | None = None,
    word: str = "weighted",
    options: ObjectiveOptions | None = None,
) -> tuple[nn.Module, Visits]:
    torch.manual_seed(0)
    model = TinyExits()
    chosen = objective(word, SHAPE, settings.epochs, options)

    def on_update(done: int, total: int, epoch: float, values: dict[str, float]) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    visits = fit(model, chosen, instances(), settings, seed, folder / "checkpoint", on_update)
    return nn.ModuleList([model, *chosen.heads.values()]), visits


def same(a: tuple[nn.Module, Visits], b: tuple[nn.Module, Visits]) -> bool:
    weights = all(torch.equal(x, y) for x, y in zip(a[0].parameters(), b[0].parameters(), strict=True))
    return weights and bool((a[1].flags == b[1].flags).all())


def test_same_seed_same_weights_other_seed_others(tmp_path: Path) -> None:
    first = trained(tmp_path / "a")
    assert same(first, trained(tmp_path / "b"))
    assert not same(first, trained(tmp_path / "c", seed=4))


@pytest.mark.parametrize("stop_at", [1, 4, 5, 8])
def test_a_stopped_training_goes_on_exactly(tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path / "whole")
    monkeypatch.setattr("rl_exit.trainers.supervised.CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", stop_at=stop_at)
    assert (tmp_path / "stopped" / "checkpoint").exists() == (stop_at > 1)
    assert same(whole, trained(tmp_path / "stopped"))


@pytest.mark.parametrize("word", ["two_stage", "alternate", "cat", "jei"])
@pytest.mark.parametrize("stop_at", [5, 10, 12])  # 9 updates in the first phase, 3 in each further one
def test_every_phase_goes_on_exactly(tmp_path: Path, word: str, stop_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = 4 if word == "alternate" else 3
    words = {"word": word, "settings": replace(SETTINGS, epochs=epochs), "options": ObjectiveOptions(second_epochs=1)}
    whole = trained(tmp_path / "whole", **words)
    monkeypatch.setattr("rl_exit.trainers.supervised.CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", stop_at=stop_at, **words)
    position = json.loads((tmp_path / "stopped" / "checkpoint" / "position.json").read_text())
    assert position == {"updates": stop_at - 1}
    assert same(whole, trained(tmp_path / "stopped", **words))
    assert not same(whole, trained(tmp_path / "other", seed=4, **words))


@pytest.mark.parametrize("word", ["two_stage", "self_distillation", "cat", "jei"])
def test_later_phases_leave_full_depth_as_it_was(tmp_path: Path, word: str) -> None:
    first, visits = trained(tmp_path / "first", word=word, options=ObjectiveOptions(second_epochs=0))
    model, all_visits = trained(tmp_path / "all", word=word, options=ObjectiveOptions(second_epochs=1))
    for (name, before), after in zip(first[0].named_parameters(), model[0].parameters(), strict=True):
        if name.startswith("backbone"):
            assert torch.equal(before, after), name
        else:
            assert torch.equal(before[-1], after[-1]) and not torch.equal(before[:-1], after[:-1]), name
    # The first phase leaves the exits below the last as they were drawn, weight decay included.
    torch.manual_seed(0)
    assert torch.equal(TinyExits().exits.weight[:-1], first[0].exits.weight[:-1])
    # Only epochs that train the backbone can forget.
    assert all_visits.flags.shape == (3, 22) and bool((all_visits.flags == visits.flags).all())
    if len(model) > 1:
        assert not any(torch.equal(a, b) for a, b in zip(first[1].parameters(), model[1].parameters(), strict=True))


@pytest.mark.parametrize("word", ["self_distillation", "jei"])
def test_stored_states_are_those_of_the_backbone(tmp_path: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = trained(tmp_path / "stored", word=word, options=ObjectiveOptions(second_epochs=2))
    monkeypatch.setattr("rl_exit.trainers.frozen_states.MOST_BYTES", 0)
    again = trained(tmp_path / "again", word=word, options=ObjectiveOptions(second_epochs=2))
    other = trained(tmp_path / "other", word=word, options=ObjectiveOptions(second_epochs=1))

    def apart(a: nn.Module, b: nn.Module) -> float:
        return max(float((x - y).detach().abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))

    assert apart(stored[0], again[0]) < 1e-5 < apart(stored[0], other[0])


def test_epochs_and_updates_count_all_phases(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    torch.manual_seed(0)
    chosen = objective("cat", SHAPE, 2, ObjectiveOptions(second_epochs=1))
    report = lambda done, total, epoch, values: seen.append((done, total, epoch))  # noqa: E731
    fit(TinyExits(), chosen, instances(), SETTINGS, 0, tmp_path, report)
    assert chosen.epochs == 4 and seen == [(n, 12, n / 3) for n in range(1, 13)]


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = replace(SETTINGS, epochs=1, batch_size=24, accumulate=1, warmup=0.0)
    assert not same(trained(tmp_path / "a", plain), trained(tmp_path / "b", replace(plain, batch_size=12)))


def test_a_diverging_training_is_told(tmp_path: Path) -> None:
    model = TinyExits()
    with torch.no_grad():
        model.exits.weight[0].fill_(float("inf"))
    with pytest.raises(UserError, match="the training loss is nan at update 1"):
        fit(model, objective("weighted", SHAPE, 3), instances(), SETTINGS, 0, tmp_path / "c", lambda *_: None)


def test_fewer_instances_than_workers_need(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="22 training instances cannot be shared among 23 workers"):
        fit(
            TinyExits(),
            objective("weighted", SHAPE, 3),
            instances(),
            SETTINGS,
            0,
            tmp_path,
            lambda *_: None,
            Rank(0, 23),
        )


def test_every_visit_is_recorded_once_an_epoch(tmp_path: Path) -> None:
    still = replace(SETTINGS, lr=1e-12, head_lr=1e-12)
    model, visits = trained(tmp_path / "still", still)
    tiny = model[0]
    data = instances()
    with torch.no_grad():
        right = tiny.all_exits(**data.batch(np.arange(22))).logits[:, -1].argmax(-1).numpy() == data.labels
    # Nothing was learnt, so an answer differs from that in evaluation only by dropout.
    assert visits.flags.shape == (3, 22) and set(np.unique(visits.flags)) == {0, 1}
    assert np.mean(visits.flags == right) > 0.8 > np.mean(visits.flags == ~right)


def test_visits_are_written_and_read(tmp_path: Path) -> None:
    visits = Visits(4, 3)
    visits.record(0, np.array([0, 2]), np.array([1, 0]))
    visits.record(1, np.array([2, 0, 1]), np.array([1, 0, 1]))
    visits.save(tmp_path / "forgetting.arrow", np.array([10, 11, 12]))
    table = read_visits(tmp_path / "forgetting.arrow")
    assert table.column_names == ["id", "epoch", "correct"]
    assert table["id"].to_pylist() == [10, 12, 10, 11, 12]
    assert table["epoch"].to_pylist() == [1, 1, 2, 2, 2]
    assert table["correct"].to_pylist() == [True, False, False, True, True]
    with pytest.raises(RunError, match="no such file"):
        read_visits(tmp_path / "nowhere")
    (tmp_path / "bad").write_bytes(b"not arrow")
    with pytest.raises(RunError, match="cannot be read as a record of visits"):
        read_visits(tmp_path / "bad")


def one_of_two(index: int, folder: Path, stop_at: int | None) -> None:
    """A rank with a checkpoint folder of its own, as on a node that does not see the other's."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=2)
    torch.manual_seed(0)
    model = TinyExits()

    def on_update(number: int, *_: Any) -> None:
        if number == stop_at:
            raise KeyboardInterrupt

    chosen = objective("weighted", SHAPE, SETTINGS.epochs, None)
    supervised.CHECKPOINT_SECONDS = 0.0
    own, rank = folder / f"rank-{index}", Rank(index, 2)
    with suppress(KeyboardInterrupt):
        fit(model, chosen, instances(), SETTINGS, 3, own, on_update, rank, DistributedDataParallel)
    save_file(model.state_dict(), folder / f"weights-{index}")
    (folder / "meet").unlink(missing_ok=True)
    os._exit(0)  # gloo waits for a peer that has left


def test_ranks_with_different_checkpoints_begin_anew(tmp_path: Path) -> None:
    def run(folder: Path, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)
        ranks = [FORKS.Process(target=one_of_two, args=(index, folder, stop_at)) for index in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(100)
            assert rank.exitcode == 0
        return load_file(folder / "weights-0")

    whole = run(tmp_path / "whole")
    run(tmp_path / "stopped", stop_at=4)
    assert (tmp_path / "stopped" / "rank-0").is_dir() and not (tmp_path / "stopped" / "rank-1").exists()
    again = run(tmp_path / "stopped")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
