from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rl_exit.config import RunConfig, describe_keys, dump_config, load_config, parse_config
from rl_exit.errors import ConfigError


def test_defaults_round_trip_through_yaml(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(RunConfig()))
    assert load_config(file) == RunConfig()


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("policy:\n  epochs: 7\n  lr: 1e-3\n")
    config = load_config(file, ["policy.epochs=2", "task.labels=[cold, warm]", "reward.alpha=0"])
    assert (config.policy.epochs, config.policy.lr, config.reward.alpha) == (2, 1e-3, 0.0)
    assert config.task.labels == ("cold", "warm")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("polcy.lr=1", "unknown key 'polcy'. Did you mean 'policy'?"),
        ("policy.epoch=1", "unknown key 'policy.epoch'. Did you mean 'epochs'?"),
        ("policy.epochs=many", "policy.epochs = 'many' (str): input should be a valid integer"),
        ("policy.epochs=1.5", "policy.epochs = 1.5 (float): input should be a valid integer"),
        ("policy.epochs=true", "policy.epochs = True (bool): input should be a valid integer"),
        ("seed=-1", "seed = -1 (int): input should be greater than or equal to 0"),
        ("init.lr=.nan", "init.lr = nan (float)"),
        (
            "reward.name=fast",
            "reward.name = 'fast' (str): input should be 'hardness', 'vanilla', 'correctness', 'agreement' or "
            "'fidelity'",
        ),
        ("policy.trajectories=1", "policy.trajectories = 1 (int): input should be greater than or equal to 2"),
        ("policy.epsilon_final=0.5", "policy.epsilon_final must not exceed policy.epsilon"),
        ("storage_path=sftp://me:secret@host/runs", "storage_path: a password"),
        ("policy.answer_on=all", "policy.answer_on = 'all' needs policy.instances = 'all'"),
        ("name=a/b", "name: a plain folder name is accepted"),
        ("name=" + "x" * 300, "name: 300 bytes; at most 200"),
        ('name="a\\0b"', "control characters"),
        ("output_dir=a\udcff", "the value is not valid YAML"),  # a byte that is no UTF-8
        ("task=sst2", "task = 'sst2' (str): a section is expected, e.g. task.name=..."),
        ("task.labels=[1, 2]", "task.labels"),
        ("task.labels=a", "input should be a list"),
        ("seed=[1]", "seed = [1] (list)"),
        ("seed", "overrides have the form key=value"),
        ("seed.x=[", "the value is not valid YAML"),
        ("name=2020-13-45", "the value is not valid YAML"),
        ("seed=0x_", "the value is not valid YAML"),
        ("seed=" + "9" * 5000, "the value is not valid YAML"),
        ("seed=!!bool x", "the value is not valid YAML"),
        ("seed=&a [*a]", "an alias that holds itself"),
        ("seed=1", None),
    ],
)
def test_bad_words_are_refused_in_words(word: str, said: str | None) -> None:
    if said is None:
        load_config(None, [word])
        return
    with pytest.raises(ConfigError) as error:
        load_config(None, [word])
    assert said in str(error.value)


def test_every_problem_of_a_file_is_listed_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("sed: 1\npolicy:\n  epochs: x\n  lrate: 2\n")
    with pytest.raises(ConfigError) as error:
        load_config(file)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and all(line.startswith(str(file)) for line in lines)


@pytest.mark.parametrize(
    "text", ["[1, 2]", "a: [", "just text", "\0", "name: 2020-13-45", "- " * 5000, "a: &a [*a]", "1: 2", "\xff"]
)
def test_files_that_are_no_mapping(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(file)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("policy:\n  lr: 1e-3\nseed: 1\npolicy:\n  epochs: 3\n")
    with pytest.raises(ConfigError, match=r"'policy' is given twice.* line 4"):
        load_config(file)


@pytest.mark.parametrize("text", ["1:30", "1:30.5"])
def test_a_number_of_base_sixty_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "time.yaml"
    file.write_text(f"seed: {text}\n")
    with pytest.raises(ConfigError, match=rf"'{text}' is no number.* line 1"):
        load_config(file)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config("nowhere.yaml")


def test_every_key_says_what_it_does() -> None:
    keys = list(describe_keys())
    assert len(keys) > 60 and not [key for key, _, text in keys if len(text) < 10]


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_are_valid(file: Path) -> None:
    load_config(file)


def test_the_paper_as_published_is_one_word() -> None:
    default, paper = load_config(), load_config(None, ["recipe=paper", "policy.holdout=0.3"])
    assert (default.policy.inputs, default.policy.holdout, default.reward.name) == ("answers", 0.1, "correctness")
    assert (paper.policy.inputs, paper.reward.name, paper.policy.baseline) == ("state", "hardness", "mean")
    assert paper.policy.holdout == 0.3  # what is given is kept
    assert paper.inference.threshold == 0.5
    written = parse_config(yaml.safe_load(dump_config(paper)), "config.yaml")
    assert written == paper


def test_the_price_of_a_layer_has_the_unit_of_its_reward() -> None:
    assert load_config().reward.alpha == 0.01
    assert load_config(None, ["reward.name=vanilla"]).reward.alpha == 0.1
    assert load_config(None, ["reward.name=vanilla", "reward.alpha=0.02"]).reward.alpha == 0.02
