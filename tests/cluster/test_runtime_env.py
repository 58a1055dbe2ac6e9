from __future__ import annotations

from pathlib import Path

import pytest

from rl_exit.cluster.runtime_env import ACCEPTED, build_runtime_env, redacted
from rl_exit.errors import ConfigError


def built(tmp_path: Path, text: str, *words: str) -> dict[str, object]:
    file = tmp_path / "env.yaml"
    file.write_text(text)
    return build_runtime_env(file, list(words))


def test_words_win_over_the_file(tmp_path: Path) -> None:
    found = built(tmp_path, "env_vars: {A: '1', B: '2'}\npip: [attrs]\n", "B=3", "C=a=b")
    assert found["env_vars"] == {"A": "1", "B": "3", "C": "a=b"} and found["pip"] == ["attrs"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("env_var: {A: b}", "Did you mean 'env_vars'"),
        ("pipp: [x]", "Did you mean 'pip'"),
        ("working_dir: .", "--working-dir"),
        ("py_executable: 'rm -rf /'", "shell command"),
        ("worker_process_setup_hook: a.b", "not accepted"),
        ("env_vars: {A: yes}", "in quotes"),
        ("env_vars: {'A B': x}", "no name of an environment variable"),
        ("env_vars: {LD_PRELOAD: x.so}", "cannot be set"),
        ("env_vars: {RAY_AUTH_TOKEN: x}", "cannot be set"),
        ("env_vars: [A]", "a mapping"),
        ("py_modules: [./mine]", "--working-dir"),
        ("pip: 3", "pip"),
        ("py_modules: 5", "a list of URLs"),
        ("image_uri: 5", "image_uri"),
        ("pip: [a]\nconda: {dependencies: [b]}", "pip"),
    ],
)
def test_what_ray_would_take_silently_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        built(tmp_path, text)


def test_accepted_keys_are_ray_s() -> None:
    from ray.runtime_env import RuntimeEnv

    assert set(ACCEPTED) <= RuntimeEnv.known_fields


def test_secrets_are_not_printed() -> None:
    shown = redacted({"env_vars": {"HF_TOKEN": "a", "AWS_SECRET_ACCESS_KEY": "b", "LANG": "C"}, "pip": ["x"]})
    assert shown == {"env_vars": {"HF_TOKEN": "***", "AWS_SECRET_ACCESS_KEY": "***", "LANG": "C"}, "pip": ["x"]}
