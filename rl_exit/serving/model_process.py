"""A model in a process of its own, which answers over a pipe.

The model's thread takes up the interpreter's lock at each of some thirty operations a layer. In the process that also
speaks with the HTTP side it would wait there for every request that comes or goes, a fifth of its time with requests of
few texts. So it has a process to itself; tokenising and what answers look like are left to those who ask.

``python -m rl_exit.serving.model_process FD`` is that process; it ends when the pipe closes.
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

from rl_exit.data.instances import Instances
from rl_exit.errors import ModelError, UserError
from rl_exit.serving.schema import Wish
from rl_exit.serving.texts import Left, TextSide

ENDING = 10.0  # seconds that the process is waited for when it has been told to end

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
        words = [sys.executable, "-m", "rl_exit.serving.model_process", str(theirs.fileno())]
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

    def close(self) -> None:
        """End it. What is inside is answered first, and told where the event loop runs on meanwhile."""
        self._gone = lambda: None
        try:
            self._pipe.send(None)
            self._process.wait(ENDING)
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


class _Worker:
    """The side of the model."""

    def __init__(self, pipe: Connection, settings: ModelSettings) -> None:
        import torch

        from rl_exit.models.early_exit import EarlyExitModel
        from rl_exit.serving.engine import measure_rules
        from rl_exit.serving.service import ModelService

        torch.set_num_threads(settings.threads)
        sys.setswitchinterval(0.0005)  # those who ask and the model take turns more often than every 5 ms
        model = EarlyExitModel.from_pretrained(settings.model).eval()
        self.service = ModelService(model, measure_rules(model, settings.batch_size, settings.deadline, settings.goal))
        self._pipe = pipe
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._sender = Thread(target=self._send_answers, name="rl-exit-answers", daemon=True)
        self._sender.start()
        self._open: dict[int, Future[Any]] = {}
        gc.collect()
        gc.freeze()  # the model stays, so it need not be looked through at every collection

    def work(self) -> None:
        """Until told to end: then what is inside is answered. Ends at once where nobody is there any more."""
        while True:
            try:
                message = self._pipe.recv()
            except (EOFError, OSError):
                os._exit(0)
            if message is None:
                self.service.close()
                self._answers.put(None)
                self._sender.join()
                return
            number, method, words = message
            try:
                getattr(self, f"_{method}")(number, *words)
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                self._tell(number, None, error)

    def _run(self, number: int, instances: Instances, wish: Wish) -> None:
        service = self.service
        answer = service.engine.submit(instances, service.rule_for(wish))
        self._when_done(number, answer, lambda left: (left, service.state()))

    def _together(self, number: int, requests: Sequence[Request]) -> None:
        from rl_exit.serving.service import run_together

        service = self.service
        ruled = [(instances, service.rule_for(wish)) for instances, wish in requests]
        answer = service.engine.call(lambda: run_together(service.model, ruled))
        self._when_done(number, answer, lambda left: (left, service.state()))

    def _explain(self, number: int, instances: Instances, wish: Wish) -> None:
        self._when_done(number, self.service.explained(instances, wish), lambda found: found)

    def _state(self, number: int) -> None:
        if not self.service.engine.alive:
            raise ModelGone("the thread of the model has ended")
        self._tell(number, self.service.state())

    def _cancel(self, number: int) -> None:
        answer = self._open.get(number)
        if answer is not None:
            answer.cancel()

    def _when_done(self, number: int, answer: Future[Any], told: Callable[[Any], Any]) -> None:
        self._open[number] = answer

        def done(answer: Future[Any]) -> None:
            self._open.pop(number, None)
            if answer.cancelled():
                return
            try:
                self._tell(number, told(answer.result()))
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                self._tell(number, None, error)

        answer.add_done_callback(done)

    def _tell(self, number: int, answer: Any, error: BaseException | None = None) -> None:
        if error is not None and not isinstance(error, UserError | ModelGone):
            error = RuntimeError(f"{type(error).__name__}: {error}")  # any other may not survive the pipe
        self._answers.put((number, answer, error))

    def _send_answers(self) -> None:
        """In a thread of its own: while the other side does not read, questions are taken and the model runs all the
        same, or both sides could wait for each other with full pipes."""
        while (message := self._answers.get()) is not None:
            try:
                self._pipe.send(message)
            except OSError:
                os._exit(0)
            except Exception as error:  # noqa: BLE001 - what cannot be sent is said to those who wait
                self._pipe.send((message[0], None, RuntimeError(f"the answer cannot be sent: {error!r}")))


def main() -> None:
    """The process: told what to serve, says what it can, then answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who started it
    pipe = Connection(int(sys.argv[1]))
    settings = pipe.recv()
    try:
        worker = _Worker(pipe, settings)
    except UserError as error:
        pipe.send(error)
        return
    except Exception as error:
        pipe.send(ModelError(f"the model could not be made ready: {type(error).__name__}: {error}"))
        raise
    pipe.send(TextSide.of(worker.service.model))
    worker.work()


if __name__ == "__main__":
    # As the module that the other side imports, so that what goes over the pipe has the same classes on both.
    from rl_exit.serving import model_process

    model_process.main()
