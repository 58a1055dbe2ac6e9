"""A run as a job on a cluster: planned here in full, so that it can be shown, then sent."""

from __future__ import annotations

import re
import secrets
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rl_exit
from rl_exit.cluster.address import Target
from rl_exit.cluster.client import connect, telling
from rl_exit.cluster.package import CONFIG_NAME, DEFAULT_LIMIT, RAY_LIMIT, Package, build_package
from rl_exit.cluster.runtime_env import redacted
from rl_exit.config import RunConfig, dump_config
from rl_exit.errors import UserError

# The shell sees these words and nothing that a user has written.
_PYTHON = re.compile(r"[A-Za-z0-9_./-]+")
_LOCAL_PATHS = (("task", "path"), ("model", "backbone"), ("init", "model"))
METADATA = "rl_exit."
NO_AGENT = "No available agent"  # in Ray's words
AGENT_SECONDS = 60.0  # for which a head may say so
AGENT_WAIT = 1.0  # seconds before it is asked again


@dataclass(frozen=True)
class EntryPoint:
    """What the driver of a run, the process that the job starts, reserves for itself.

    Without any it runs on the head node, beside what is scheduled there.
    """

    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)

    def words(self) -> dict[str, Any]:
        """Arguments of Ray's ``submit_job``."""
        given = {
            "entrypoint_num_cpus": self.num_cpus,
            "entrypoint_num_gpus": self.num_gpus,
            "entrypoint_memory": self.memory,
            "entrypoint_resources": dict(self.resources) or None,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Submission:
    """A job that could be sent as it is.

    Attributes:
        config: As the cluster will read it.
        package: What is uploaded.
        runtime_env: Beside the working directory.
        entry_point: Resources of the driver.
        metadata: Shown by Ray's dashboard and by ``rl-exit jobs``.
        submission_id: Name of the job.
        python: The cluster's Python.
    """

    config: RunConfig
    package: Package
    runtime_env: Mapping[str, Any]
    entry_point: EntryPoint
    metadata: Mapping[str, str]
    submission_id: str
    python: str = "python"

    @property
    def entrypoint(self) -> str:
        """The command; a job that is sent again goes on with the run."""
        return f"{self.python} -m rl_exit train {CONFIG_NAME} --resume"

    def shown(self, address: str) -> dict[str, Any]:
        """Everything for people and programs, without secrets."""
        return {
            "address": address,
            "submission_id": self.submission_id,
            "entrypoint": self.entrypoint,
            "entry_point_resources": self.entry_point.words(),
            "runtime_env": redacted(self.runtime_env),
            "metadata": dict(self.metadata),
            "package": {
                "code": self.package.code,
                "sha256": self.package.digest(),
                "files": len(self.package.files),
                "bytes": self.package.size,
                "names": sorted(self.package.files),
            },
            "config": self.config.model_dump(mode="json"),
        }


def plan_submission(
    config: RunConfig,
    *,
    runtime_env: Mapping[str, Any] | None = None,
    entry_point: EntryPoint | None = None,
    metadata: Mapping[str, str] | None = None,
    code: str = "tree",
    working_dir: Path | None = None,
    excludes: tuple[str, ...] = (),
    max_upload: int = DEFAULT_LIMIT,
    python: str = "python",
) -> Submission:
    """Work out what a run needs on a cluster and check it.

    Relative paths in the configuration are this machine's and travel along; absolute ones are read on the cluster.

    Args:
        config: The run.
        runtime_env: From :func:`~rl_exit.cluster.runtime_env.build_runtime_env`.
        entry_point: Resources of the driver.
        metadata: Further words for the job.
        code: See :func:`~rl_exit.cluster.package.build_package`.
        working_dir: Files of the user's own.
        excludes: Patterns of names to leave out.
        max_upload: Most bytes that are sent.
        python: The cluster's Python, a name or a path.

    Raises:
        UserError: The results would be lost, the package is too large, or a word is not accepted.
    """
    if not _PYTHON.fullmatch(python):
        raise UserError(f"--python {python!r}: a name or path of letters, digits, '.', '_', '-' and '/' is accepted")
    if not 0 < max_upload <= RAY_LIMIT:
        raise UserError(f"--max-upload: at most {RAY_LIMIT // 2**20} MiB are accepted by Ray")
    _check_place(config)
    there, data = _travelling(config)
    package = build_package(dump_config(there), code=code, working_dir=working_dir, data=data, excludes=excludes)
    package.check_size(max_upload)
    own = {
        f"{METADATA}run": config.run_name,
        f"{METADATA}task": config.task.name,
        f"{METADATA}seed": str(config.seed),
        f"{METADATA}version": rl_exit.__version__,
        f"{METADATA}code": package.code,
        f"{METADATA}package": package.digest(),
        f"{METADATA}place": str(config.storage_path or config.output_dir),
    }
    taken = sorted(key for key in metadata or {} if key.startswith(METADATA))
    if taken:
        raise UserError(f"--metadata {taken[0]}: names that begin with '{METADATA}' are the run's own")
    return Submission(
        there,
        package,
        runtime_env or {},
        entry_point or EntryPoint(),
        {**(metadata or {}), **own},
        _name(config),
        python,
    )


def send(submission: Submission, target: Target, *, any_version: bool = False) -> str:
    """Upload what the cluster does not have yet and start the job.

    Returns:
        Name of the job.

    Raises:
        UserError: The cluster cannot be reached, lets nobody in, or does not fit.
    """
    client = connect(target, any_version=any_version)
    with tempfile.TemporaryDirectory(prefix="rl-exit-") as folder, telling(target):
        archive = submission.package.write(Path(folder))
        return _started(
            client,
            entrypoint=submission.entrypoint,
            submission_id=submission.submission_id,
            runtime_env={**submission.runtime_env, "working_dir": str(archive)},
            metadata=dict(submission.metadata),
            **submission.entry_point.words(),
        )


def _started(client: Any, **words: Any) -> str:
    """Start a job; the head of a cluster that has just been started knows no agent for some seconds, and says so.

    It says the same where the agent is slow to answer, so the job may have begun all the same.
    """
    until, tried = time.monotonic() + AGENT_SECONDS, False
    while True:
        try:
            return str(client.submit_job(**words))
        except RuntimeError as error:
            if tried and f"{words['submission_id']} already exists" in str(error):
                return str(words["submission_id"])
            if NO_AGENT not in str(error) or time.monotonic() >= until:
                raise
            tried = True
            time.sleep(AGENT_WAIT)


def parse_resources(words: list[str] | None) -> dict[str, float]:
    """``NAME=AMOUNT`` words.

    Raises:
        UserError: Another form.
    """
    found = {}
    for word in words or []:
        name, equals, amount = word.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            equals = ""
        if not equals or not name or not found[name] > 0 or name in ("CPU", "GPU", "memory"):
            raise UserError(f"--resource {word}: NAME=AMOUNT is accepted, e.g. accelerator_type:A100=0.01")
    return found


def parse_metadata(words: list[str] | None) -> dict[str, str]:
    """``KEY=VALUE`` words.

    Raises:
        UserError: Another form.
    """
    found = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"--metadata {word}: KEY=VALUE is accepted")
        found[key] = value
    return found


def _check_place(config: RunConfig) -> None:
    """The working directory of a job goes away with it."""
    if config.storage_path is None and not Path(config.output_dir).is_absolute():
        raise UserError(
            f"output_dir={config.output_dir} would lie in the job's own folder on the cluster, which goes away with "
            "it: give storage_path=... (a folder that all nodes share, or a URL such as s3://bucket/runs), or an "
            "absolute output_dir"
        )
    place = config.storage_path
    if place is not None and "://" not in place and not Path(place).is_absolute():
        raise UserError(f"storage_path={place}: on a cluster an absolute path or a URL is needed")


def _travelling(config: RunConfig) -> tuple[RunConfig, dict[str, Path]]:
    """The configuration with the names that its files have in the job's directory, and those files."""
    sections: dict[str, Any] = {}
    data: dict[str, Path] = {}
    for section, key in _LOCAL_PATHS:
        before = sections.get(section, getattr(config, section))
        value = getattr(before, key)
        if value is None or Path(value).is_absolute() or "://" in value or not Path(value).exists():
            continue
        name = f"rl-exit-data/{section}-{key}/{Path(value).resolve().name}"
        data[name] = Path(value)
        sections[section] = before.model_copy(update={key: name})
    return config.model_copy(update={**sections, "cluster": "auto", "name": config.run_name}), data


def _name(config: RunConfig) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", config.run_name.lower()).strip("-")[:40] or "run"
    return f"{words}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
