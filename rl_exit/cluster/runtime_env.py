"""The runtime environment of a job: keys checked before Ray gets them, which ignores what it does not know."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_exit.config import read_mapping
from rl_exit.errors import ConfigError, nearest

# Ray's own documented keys, less what submit sets itself. A hook runs code before any other; it is not let through.
ACCEPTED = ("pip", "uv", "conda", "env_vars", "py_modules", "image_uri", "config")
_OWN = {
    "working_dir": "rl-exit makes the working directory itself; add files with --working-dir",
    "excludes": "leave files out with --exclude",
    "worker_process_setup_hook": "code before the run's own is not accepted",
    "py_executable": "it is a shell command",
    "container": "deprecated by Ray; use image_uri",
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|KEY|AUTH", re.IGNORECASE)
# Ray's own settings of the cluster, and what would load other code into every process of the job.
_NOT_SET = re.compile(r"RAY_AUTH_\w*|RAY_ADDRESS|LD_PRELOAD|LD_LIBRARY_PATH|PYTHONSTARTUP|BASH_ENV|ENV")


def build_runtime_env(file: Path | None, variables: Sequence[str]) -> dict[str, Any]:
    """Read and check what the job needs beside its code.

    Args:
        file: YAML with keys of Ray's ``runtime_env``.
        variables: ``NAME=VALUE`` words, which win over the file's ``env_vars``.

    Raises:
        ConfigError: A key that is not accepted, or a value of the wrong form.
    """
    tree = read_mapping(file) if file is not None else {}
    where = str(file) if file is not None else "--env"
    for key in tree:
        if key in _OWN:
            raise ConfigError(f"{where}: '{key}' is not accepted: {_OWN[key]}")
        if key not in ACCEPTED:
            hint = nearest(str(key), ACCEPTED) or f" Accepted: {', '.join(ACCEPTED)}."
            raise ConfigError(f"{where}: unknown key '{key}' of a runtime_env.{hint}")
    given = tree.get("env_vars") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: env_vars is a mapping of names to texts")
    env = {_name(name, where): _text(name, value, where) for name, value in given.items()}
    for word in variables:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--env {word}: NAME=VALUE is accepted")
        env[_name(name, "--env")] = value
    modules = tree.get("py_modules") or []
    if not isinstance(modules, list):
        raise ConfigError(f"{where}: py_modules is a list of URLs")
    if not isinstance(tree.get("image_uri") or "", str):
        raise ConfigError(f"{where}: image_uri is a text")
    for module in modules:
        if "://" not in str(module):
            raise ConfigError(f"{where}: py_modules: '{module}' is no URL; send local code with --working-dir")
    found = {**tree, **({"env_vars": env} if env else {})}
    _let_ray_check(found, where)
    return found


def redacted(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The same for printing: values of variables that may be secrets are stars."""
    shown = dict(environment)
    if "env_vars" in shown:
        shown["env_vars"] = {name: "***" if _SECRET.search(name) else v for name, v in shown["env_vars"].items()}
    return shown


def _name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: '{name}' is no name of an environment variable")
    if _NOT_SET.fullmatch(name):
        raise ConfigError(f"{where}: {name} cannot be set for a job: it belongs to the cluster, or loads other code")
    return name


def _text(name: Any, value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigError(f"{where}: env_vars.{name} = {value!r}: a text is expected; put it in quotes")
    return str(value)


def _let_ray_check(environment: dict[str, Any], where: str) -> None:
    """Forms of the values, as Ray checks them; it resolves local requirement files on the way."""
    from ray.runtime_env import RuntimeEnv

    try:
        RuntimeEnv(**environment)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None
