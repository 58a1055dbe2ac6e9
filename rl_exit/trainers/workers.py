"""Who works for a run elsewhere: groups of workers that are kept through it, or come and go with their turns."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rl_exit.config import RunConfig
from rl_exit.trainers.exit_training import train_crew
from rl_exit.trainers.placement import await_room
from rl_exit.trainers.train_crew import TrainCrew

if TYPE_CHECKING:
    from rl_exit.trainers.store_workers import StoreCrew


class Workers:
    """The run's groups of workers; started when they are first needed, ended with the block.

    Args:
        config: Of the run.
        folder: For what Ray Train itself writes.
        kept: Keys (``task_step.num_workers``, ``store.num_workers``) of the groups that stay between their turns.
    """

    def __init__(self, config: RunConfig, folder: Path, kept: Collection[str] = ()) -> None:
        self._config, self._folder, self._kept = config, folder, kept
        self._train: TrainCrew | None = None
        self._store: StoreCrew | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None or issubclass(kind, Exception):  # an interruption does not wait for them: Ray ends them
            self._stop_train()
            self._stop_store()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def train(self) -> Iterator[TrainCrew | None]:
        """Ray Train workers for one training; None: it is done in this process."""
        step = self._config.task_step
        if step.num_workers and self._train is None:
            self._train = train_crew(step.num_workers, step.use_gpu, self._folder, self._config.placement.timeout)
        yield self._train
        if "task_step.num_workers" not in self._kept:
            self._stop_train()

    def begin_store(self) -> None:
        """Start builders that stay, so that they are up when the first store is built; does not wait for them."""
        if self._config.store.num_workers and "store.num_workers" in self._kept:
            self._store_crew().start()

    @contextmanager
    def store(self) -> Iterator[StoreCrew | None]:
        """Builders for one store; None: it is built in this process."""
        yield self._store_crew() if self._config.store.num_workers else None
        if "store.num_workers" not in self._kept:
            self._stop_store()

    def _store_crew(self) -> StoreCrew:
        if self._store is None:
            from rl_exit.trainers.store_workers import StoreCrew

            store = self._config.store
            self._store = StoreCrew(store.num_workers, store.use_gpu, self._config.placement.timeout)
        return self._store

    def await_policy_room(self) -> None:
        """Wait until learners and env runners can be placed.

        Raises:
            RunError: They cannot within ``placement.timeout``.
        """
        runners, learners = self._config.sampling.num_env_runners, self._config.learners
        gpus = learners.num_learners if learners.use_gpu else 0
        cpus = runners + learners.num_learners - gpus
        what = f"policy phase (sampling.num_env_runners={runners}, learners.num_learners={learners.num_learners})"
        await_room(what, self._config.placement.timeout, cpus, gpus)

    def _stop_train(self) -> None:
        if self._train is not None:
            self._train.stop()
            self._train = None

    def _stop_store(self) -> None:
        if self._store is not None:
            self._store.stop()
            self._store = None
