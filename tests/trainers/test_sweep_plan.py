from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl_exit.config import describe_keys, dump_config, load_config
from rl_exit.errors import ConfigError, RunError
from rl_exit.trainers.run_directory import changed_keys
from rl_exit.trainers.sweep_plan import (
    LONGEST_NAME,
    SweepPlan,
    check_resumable,
    decides_init,
    parse_over,
    plan_sweep,
    short_keys,
    trial_name,
)


def plan(*over: str, seeds: int = 1, words: tuple[str, ...] = (), output: Path | None = None) -> SweepPlan:
    return plan_sweep(None, ["task.name=sst2", *words], over, seeds, output)


def test_every_combination_with_every_seed() -> None:
    found = plan("alpha=0.1,0.2", "policy.epochs=3,5", seeds=2, words=("seed=4",))
    assert [trial.name for trial in found.trials] == [
        f"alpha-{alpha}-epochs-{epochs}-seed-{seed}" for alpha in (0.1, 0.2) for epochs in (3, 5) for seed in (4, 5)
    ]
    for trial in found.trials:
        config = trial.config
        assert trial.settings == {"reward.alpha": config.reward.alpha, "policy.epochs": config.policy.epochs}
        assert config.run_dir == found.folder / trial.name and config.task.name == "sst2"
    assert found.folder == Path("runs/sst2-alpha-epochs") and found.seeds == (4, 5)


def test_one_initialisation_per_seed_where_nothing_else_decides_it() -> None:
    found = plan("alpha=0.1,0.2,0.3", "model.policy_width=8,16", seeds=3)
    assert len(found.trials) == 18
    assert [start.name.rpartition("-")[0] for start in found.initialisations] == ["seed-0", "seed-1", "seed-2"]
    for trial in found.trials:
        assert trial.initialisation is not None
        assert trial.initialisation.config.seed == trial.config.seed
        assert trial.config.init.model == str(found.folder / ".init" / trial.initialisation.name / "init" / "model")


def test_what_decides_the_initialisation_has_one_of_its_own() -> None:
    found = plan("init.lr=1e-5,2e-5", "alpha=0.1,0.2", seeds=2)
    assert [start.name.rpartition("-")[0] for start in found.initialisations] == [
        f"lr-{lr}-seed-{seed}" for lr in ("1e-05", "2e-05") for seed in (0, 1)
    ]
    for start in found.initialisations:
        assert start.config.inference == load_config().inference  # what it does not depend on is left at the defaults
        assert start.config.task.name == "sst2" and start.config.init.model is None
    by_name = {start.name: start.config for start in found.initialisations}
    for trial in found.trials:
        assert trial.initialisation is not None
        assert by_name[trial.initialisation.name].init.lr == trial.config.init.lr


def test_recipes_that_train_on_other_instances_share_no_initialisation() -> None:
    found = plan("recipe=evidence,paper", words=("policy.epochs=3",))
    evidence, paper = found.trials
    assert evidence.config.policy.holdout != paper.config.policy.holdout
    assert evidence.initialisation != paper.initialisation and len(found.initialisations) == 2
    assert {start.config.policy.holdout for start in found.initialisations} == {
        trial.config.policy.holdout for trial in found.trials
    }


def test_a_sweep_that_grows_keeps_what_is_there() -> None:
    small, large = plan("alpha=0.1"), plan("alpha=0.1,0.2", seeds=2)
    assert small.folder == large.folder
    both = {trial.name: trial.config for trial in large.trials}
    for trial in small.trials:
        assert changed_keys(trial.config, both[trial.name]) == ""
    starts = {start.name: start.config for start in large.initialisations}
    assert all(changed_keys(start.config, starts[start.name]) == "" for start in small.initialisations)


def test_seeds_alone_and_seeds_by_name() -> None:
    assert [trial.name for trial in plan(seeds=2).trials] == ["seed-0", "seed-1"]
    assert plan(seeds=2).folder == Path("runs/sst2-seeds")
    assert [trial.config.seed for trial in plan("seed=7,3").trials] == [7, 3]


@pytest.mark.parametrize("seeds", ["a,b", "[1],2", "1.5,2", "true,2"])
def test_a_seed_is_a_whole_number(seeds: str) -> None:
    with pytest.raises(ConfigError, match="no whole number"):
        plan(f"seed={seeds}")


def test_a_model_that_is_given_is_no_shared_initialisation() -> None:
    found = plan("alpha=0.1,0.2", words=("init.model=somewhere/model",))
    assert found.initialisations == ()
    assert {(trial.initialisation, trial.config.init.model) for trial in found.trials} == {(None, "somewhere/model")}


def test_every_key_is_known_to_decide_the_initialisation_or_not() -> None:
    """A new key that the initialisation does not depend on is to be named in sweep_plan: else it is done more often."""
    deciding = {key for key, _, _ in describe_keys() if decides_init(key)}
    sections = {key.partition(".")[0] for key in deciding}
    assert sections <= {"seed", "task", "model", "init", "task_step", "policy"}
    assert {
        "seed",
        "task.name",
        "model.backbone",
        "init.objective",
        "policy.holdout",
        "task_step.num_workers",
    } <= deciding
    assert not deciding & {"reward.alpha", "policy.lr", "task_step.lr", "store.dtype", "init.model", "algorithm"}


def test_values_are_yaml() -> None:
    grid = parse_over(["task_step.lora.targets=[query, value],null", "alpha=1e-3,0", "reward.name=hardness,vanilla"])
    assert grid == {
        "task_step.lora.targets": (["query", "value"], None),
        "reward.alpha": ("1e-3", 0),
        "reward.name": ("hardness", "vanilla"),
    }
    lora = plan("task_step.lora.targets=[query, value],null")
    assert [trial.config.task_step.lora.targets for trial in lora.trials] == [("query", "value"), None]
    assert plan("alpha=1e-3").trials[0].config.reward.alpha == 1e-3


def test_names_are_short_and_apart() -> None:
    assert short_keys(["init.lr", "policy.lr", "reward.alpha"]) == {
        "init.lr": "init.lr",
        "policy.lr": "policy.lr",
        "reward.alpha": "alpha",
    }
    assert trial_name({"alpha": 0.05, "use": True, "targets": ["a", "b"], "none": None}) == (
        "alpha-0.05-use-true-targets-a+b-none-none"
    )
    assert trial_name({"path": "a/b"}) != trial_name({"path": "a_b"})
    assert "/" not in trial_name({"path": "a/b"})
    long = [trial_name({"path": "x" * 300 + end}) for end in "ab"]
    assert len(set(long)) == 2 and all(len(name) <= LONGEST_NAME for name in long)


@pytest.mark.parametrize(
    ("over", "said"),
    [
        (("alpha",), "the form is key=value"),
        (("alpha=",), "the form is key=value"),
        (("reward.alhpa=1",), "unknown key 'reward.alhpa'. Did you mean 'reward.alpha'"),
        (("alpha=0.1", "reward.alpha=0.2"), "given twice"),
        (("alpha=0.1,0.1",), "a value is given twice"),
        (("alpha=1e-3,0.001",), "a value is given twice"),
        (("alpha=[",), "not valid YAML"),
        (("alpha=-1",), "reward.alpha = -1"),
        (("name=a,b",), "cannot be swept over"),
        (("init.model=a",), "cannot be swept over"),
        ((), "nothing to sweep over"),
    ],
)
def test_bad_sweeps(over: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(*over)
    assert said in str(raised.value)


def test_seeds_given_twice() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        plan("seed=1,2", seeds=2)


def test_only_a_sweep_of_the_same_configuration_is_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    found = plan("alpha=0.1,0.2", words=("policy.epochs=5",), output=folder)
    check_resumable(found)
    folder.mkdir()
    check_resumable(found)  # an empty folder is as good as none
    trial = found.trials[0].config
    trial.run_dir.mkdir()
    (trial.run_dir / "config.yaml").write_text(dump_config(trial))
    with pytest.raises(RunError, match="is no sweep"):
        check_resumable(found)
    (folder / "sweep.json").write_text(json.dumps({}))
    check_resumable(found)
    with pytest.raises(RunError, match=r"policy.epochs \(5 there, 9 given\)"):
        check_resumable(plan("alpha=0.1,0.2", words=("policy.epochs=9",), output=folder))


def test_trials_are_kept_below_the_sweep_s_name_and_share_their_initialisation_all_the_same() -> None:
    words = ["storage_path=s3://bucket/runs", "placement.timeout=5"]
    plan = plan_sweep(None, words, ["alpha=0.01,0.02"], 2)
    assert {trial.config.storage_path for trial in plan.trials} == {"s3://bucket/runs/docstrings-alpha"}
    plain = plan_sweep(None, [], ["alpha=0.01,0.02"], 2)
    assert [start.config for start in plan.initialisations] == [start.config for start in plain.initialisations]
    with pytest.raises(ConfigError, match="cannot be swept over"):
        plan_sweep(None, [], ["storage_path=/a,/b"])
