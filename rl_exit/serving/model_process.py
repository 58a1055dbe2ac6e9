"""A model in a process of its own, which answers over a pipe.

The model's thread takes up the interpreter's lock at each of some thirty operations a layer. In the process that also
speaks with the HTTP side it would wait there for every request that comes or goes, a fifth of its time with requests of
few texts. So it has a process to itself; tokenising and what answers look like are left to those who ask.

The other end is :mod:`rl_exit.serving.model_worker`. Requests of the front come to it on a line of their own
(:mod:`rl_exit.serving.lines`); over the pipe goes the rest.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from threading import Thread
from typing import Any

from rl_exit.data.instances import Instances
from rl_exit.serving.lines import Meeting
from rl_exit.serving.schema import Wish
from rl_exit.serving.texts import Left, TextSide

ENDING = 10.0  # seconds that the process is waited for when it has been told to end, if nothing else is said

Request = tuple[Instances, Wish]
State = dict[str, Any]


@dataclass(frozen=True)
class ModelSettings:
    """What the process is given.

    Attributes:
        model: A model folder or a hub id.
        threads: Torch threads.
        batch_size: Most rows in a step.
        deadline: Seconds, as in :class:`rl_exit.serving.pool.PoolRules`.
        goal: Likewise.
    """

    model: str
    threads: int = 1
    batch_size: int = 32
    deadline: float = 0.0
    goal: float = math.inf


class ModelGone(RuntimeError):
    """The model's process has ended while somebody waited for it."""


class ModelProcess:
    """The side of those who ask; used from one event loop.

    Args:
        settings: What is served.
        gone: Called when the process ends without having been told to; everybody who waits gets :class:`ModelGone`.

    Attributes:
        texts: Tokenizer and labels of the model.
        pid: Of the process.

    Raises:
        UserError: The model cannot be loaded.
        ModelGone: The process ended before it was ready.
    """

    def __init__(self, settings: ModelSettings, gone: Callable[[], None] = lambda: None) -> None:
        self._pipe, theirs = Pipe()
        words = [sys.executable, "-m", "rl_exit.serving.model_worker", str(theirs.fileno())]
        self._process = subprocess.Popen(words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self.pid = self._process.pid
        self._gone = gone
        self._open: dict[int, asyncio.Future[Any]] = {}
        self._asked = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            self._pipe.send(settings)
            ready = self._pipe.recv()
        except (EOFError, OSError):
            raise ModelGone(f"the model's process ended before it was ready (code {self._process.wait()})") from None
        if isinstance(ready, Exception):
            self._process.wait()
            raise ready
        self.texts: TextSide = ready

    async def run(self, instances: Instances, wish: Wish) -> tuple[list[Left], State]:
        """How texts leave, those of all who ask together; and the state of the model afterwards.

        Raises:
            ConfigError: There is no such operating point.
            ModelGone: The process has ended.
        """
        found: tuple[list[Left], State] = await self._ask("run", instances, wish)
        return found

    async def together(self, requests: Sequence[Request]) -> tuple[list[list[Left]], State]:
        """Plain batching; see :func:`rl_exit.serving.service.run_together`."""
        found: tuple[list[list[Left]], State] = await self._ask("together", list(requests))
        return found

    async def explain(self, instances: Instances, wish: Wish) -> dict[str, Any]:
        """See :meth:`rl_exit.serving.service.ModelService.explain`; one instance."""
        found: dict[str, Any] = await self._ask("explain", instances, wish)
        return found

    async def state(self) -> State:
        """See :meth:`rl_exit.serving.service.ModelService.state`.

        Raises:
            ModelGone: The process, or its thread, has ended.
        """
        found: State = await self._ask("state")
        return found

    async def on_line(self, meeting: Meeting, name: str) -> None:
        """Let it call the front and answer there, under this name; returns when that line has ended.

        Raises:
            RuntimeError: The front cannot be reached.
            ModelGone: The process has ended.
        """
        await self._ask("line", meeting, name)

    def close(self, patience: float = ENDING) -> None:
        """End it. What is inside is answered first, and told where the event loop runs on meanwhile.

        Args:
            patience: Seconds that this may take.
        """
        self._gone = lambda: None
        try:
            self._pipe.send(None)
            self._process.wait(patience)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    async def _ask(self, method: str, *words: Any) -> Any:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            Thread(target=self._read, name="rl-exit-answers", daemon=True).start()
        self._asked += 1
        number = self._asked
        answer = self._open[number] = self._loop.create_future()
        try:
            self._send((number, method, words))
            return await answer
        except asyncio.CancelledError:
            if number in self._open:
                self._send((number, "cancel", ()))
            raise
        finally:
            self._open.pop(number, None)

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            self._ended()

    def _read(self) -> None:
        """In a thread of its own, and not by the event loop's readers: uvloop's make the pipe one that does not block,
        so that an answer of which the first part is there would fail as if the process were gone."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            try:
                while True:
                    self._loop.call_soon_threadsafe(self._hand_out, *self._pipe.recv())
            except (EOFError, OSError):
                self._loop.call_soon_threadsafe(self._ended)

    def _hand_out(self, number: int, answer: Any, error: Exception | None) -> None:
        waiting = self._open.get(number)
        if waiting is None or waiting.done():
            return  # given up
        if error is None:
            waiting.set_result(answer)
        else:
            waiting.set_exception(error)

    def _ended(self) -> None:
        for waiting in self._open.values():
            if not waiting.done():
                waiting.set_exception(ModelGone("the model's process has ended"))
        self._gone()
