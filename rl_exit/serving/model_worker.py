"""The process of a model: told what to serve, says what it can, then answers.

``python -m rl_exit.serving.model_worker FD`` is started by :mod:`rl_exit.serving.model_process` and ends when that pipe
closes. Those who ask are :class:`_Asker`: the process that started it, over the pipe, and the front, on a line.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

from rl_exit.data.instances import Instances
from rl_exit.errors import ModelError, UserError
from rl_exit.serving import wire
from rl_exit.serving.lines import Meeting, called
from rl_exit.serving.model_process import ModelGone, ModelSettings, Request
from rl_exit.serving.schema import Wish
from rl_exit.serving.texts import Left, TextSide

READ = 1 << 16  # bytes of a line at a time
LAST_WORDS = 5.0  # seconds that a front may take at the end to read its answers
_ENDING, _PONG = wire.written((0, wire.ENDING)), wire.written((0, wire.PONG))


class _Asker:
    """Somebody who asks: what it waits for, and what it is told.

    Answers are sent by a thread of its own: while the other side does not read, questions are taken and the model runs
    all the same, or both sides could wait for each other, neither reading.

    Args:
        send: Sends a message.
        broken: Called where it cannot be sent.
    """

    def __init__(self, send: Callable[[Any], None], broken: Callable[[], None]) -> None:
        self.open: dict[int, Future[Any]] = {}
        self._send = send
        self._broken = broken
        self._messages: SimpleQueue[Any] = SimpleQueue()
        self._sender = Thread(target=self._send_all, name="rl-exit-answers", daemon=True)
        self._sender.start()

    def tell(self, message: Any) -> None:
        """Have a message sent."""
        self._messages.put(message)

    def when_done(self, number: int, answer: Future[Any], told: Callable[[Future[Any]], Any]) -> None:
        """Have sent what is told of an answer once it is there, unless it is cancelled."""
        self.open[number] = answer

        def done(answer: Future[Any]) -> None:
            self.open.pop(number, None)
            if not answer.cancelled():
                self.tell(told(answer))

        answer.add_done_callback(done)

    def cancel(self, number: int) -> None:
        """It waits for this answer no more."""
        answer = self.open.get(number)
        if answer is not None:
            answer.cancel()

    def leave(self) -> None:
        """It waits for nothing any more."""
        for answer in list(self.open.values()):
            answer.cancel()

    def finish(self, seconds: float | None = None) -> None:
        """Send what is there to be sent, then nothing more; returns when that is done, or after some seconds."""
        self._messages.put(None)
        self._sender.join(seconds)

    def _send_all(self) -> None:
        while (message := self._messages.get()) is not None:
            try:
                self._send(message)
            except OSError:
                self._broken()
                return


class _Worker:
    """The model, and those who ask it."""

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
        self._starter = _Asker(self._send, lambda: os._exit(0))
        self._lines: set[_Asker] = set()
        self._ending = False
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
                break
            number, method, words = message
            try:
                getattr(self, f"_{method}")(number, *words)
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                self._starter.tell((number, None, _plain(error)))
        self._ending = True
        lines = list(self._lines)
        for line in lines:
            line.tell(_ENDING)
        self.service.close()
        self._starter.finish()
        for line in lines:
            line.finish(LAST_WORDS)

    # What may be asked over the pipe.

    def _run(self, number: int, instances: Instances, wish: Wish) -> None:
        service = self.service
        answer = service.engine.submit(instances, service.rule_for(wish))
        self._answer(number, answer, lambda left: (left, service.state()))

    def _together(self, number: int, requests: Sequence[Request]) -> None:
        from rl_exit.serving.service import run_together

        service = self.service
        ruled = [(instances, service.rule_for(wish)) for instances, wish in requests]
        answer = service.engine.call(lambda: run_together(service.model, ruled))
        self._answer(number, answer, lambda left: (left, service.state()))

    def _explain(self, number: int, instances: Instances, wish: Wish) -> None:
        self._answer(number, self.service.explained(instances, wish), lambda found: found)

    def _state(self, number: int) -> None:
        if not self.service.engine.alive:
            raise ModelGone("the thread of the model has ended")
        self._starter.tell((number, self.service.state(), None))

    def _cancel(self, number: int) -> None:
        self._starter.cancel(number)

    def _line(self, number: int, meeting: Meeting, name: str) -> None:
        Thread(target=self._stay_on_line, args=(number, meeting, name), name="rl-exit-line", daemon=True).start()

    def _answer(self, number: int, answer: Future[Any], told: Callable[[Any], Any]) -> None:
        def message(answer: Future[Any]) -> Any:
            try:
                return (number, told(answer.result()), None)
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                return (number, None, _plain(error))

        self._starter.when_done(number, answer, message)

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - what cannot be sent is said to those who wait
            self._pipe.send((message[0], None, RuntimeError(f"the answer cannot be sent: {error!r}")))

    # What comes on a line.

    def _stay_on_line(self, number: int, meeting: Meeting, name: str) -> None:
        """Call the front and answer until it hangs up; then whoever asked for the line is told."""
        failed: Exception | None = None
        try:
            line = called(meeting, name)
            asker = _Asker(line.sendall, lambda: _hang_up(line))
            self._lines.add(asker)
            if self._ending:
                asker.tell(_ENDING)
            try:
                self._take_calls(line, asker)
            finally:
                self._lines.discard(asker)
                asker.leave()
                _hang_up(line)
                asker.finish()
                line.close()
        except Exception as error:  # noqa: BLE001 - whoever asked is told
            failed = _plain(error)
        self._starter.tell((number, None, failed))

    def _take_calls(self, line: socket.socket, asker: _Asker) -> None:
        reader = wire.reader()
        with suppress(OSError):  # as when the front hangs up
            while data := line.recv(READ):
                reader.feed(data)
                for number, what, *words in reader:
                    if what == wire.CANCEL:
                        asker.cancel(number)
                    elif what == wire.PING:
                        asker.tell(_PONG)
                    else:
                        self._called(asker, number, *words)

    def _called(self, asker: _Asker, number: int, *words: Any) -> None:
        service = self.service

        def message(answer: Future[list[Left]]) -> bytes:
            try:
                return wire.answer(number, answer.result(), service.state())
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                return wire.refusal(number, error)

        try:
            instances, wish = wire.asked(*words)
            answer = service.engine.submit(instances, service.rule_for(wish))
        except Exception as error:  # noqa: BLE001 - whoever asked is told
            asker.tell(wire.refusal(number, error, gone=service.engine.closing))
            return
        asker.when_done(number, answer, message)


def _hang_up(line: socket.socket) -> None:
    """Wake whoever reads from it."""
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


def _plain(error: Exception) -> Exception:
    """An error that survives the pipe."""
    return error if isinstance(error, UserError | ModelGone) else RuntimeError(f"{type(error).__name__}: {error}")


def main() -> None:
    """The process."""
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
    main()
