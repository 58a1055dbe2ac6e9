"""Lines from the front straight to the models' processes.

A call of a Serve deployment costs as much processor time, at both of its ends, as half the layers of a short text. So
the processes of the models call the front, once, and stay on the line: a request is a message there, an answer another.
Whoever is on no line yet is asked through Ray.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import msgpack

from rl_exit.data.instances import Instances
from rl_exit.serving import wire
from rl_exit.serving.schema import Wish
from rl_exit.serving.texts import Left

PATIENCE = 5.0  # seconds within which a caller must show who it is
BEAT = 2.0  # seconds between two questions whether one on a line is alive
MISSED = 5  # of them without a word, and it is not
GREETING = len(wire.written(bytes(wire.NONCE)))  # bytes of what a front says before it asks anything
STRANGERS = 64  # callers at a time of whom that is not known yet


class LineGone(RuntimeError):
    """The process at the other end has ended, or ends."""


@dataclass(frozen=True)
class Meeting:
    """Where a model's process calls, and what shows that it may."""

    host: str
    port: int
    secret: bytes = field(repr=False)


class Line(asyncio.Protocol):
    """One model's process, seen from the front; used in one event loop.

    Args:
        lines: Whose it is.

    Attributes:
        name: Of its replica; empty until it is known.
        texts: Not answered yet.
        asked: When it was last asked, by number.
    """

    def __init__(self, lines: Lines) -> None:
        self.name = ""
        self.texts = 0
        self.asked = 0
        self._lines = lines
        self._nonce = secrets.token_bytes(wire.NONCE)
        self._reader = wire.reader(wire.FIRST_MOST)
        self._open: dict[int, asyncio.Future[tuple[list[Left], dict[str, Any]]]] = {}
        self._number = 0
        self._silent = 0

    async def run(self, instances: Instances, wish: Wish) -> tuple[list[Left], dict[str, Any]]:
        """How texts leave, and the state of the model afterwards.

        Raises:
            UserError: What the model's process raised for the user.
            LineGone: It has ended.
            RuntimeError: It failed at this request.
        """
        if self.closing:
            raise LineGone
        self.asked = self._lines.turn()
        self._number += 1
        number, count = self._number, len(instances)
        self.texts += count
        waiting = self._open[number] = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(wire.question(number, instances, wish))
            return await waiting
        except asyncio.CancelledError:
            if number in self._open and not self.closing:
                self._transport.write(wire.written((number, wire.CANCEL)))
            raise
        finally:
            self.texts -= count
            self._open.pop(number, None)

    @property
    def closing(self) -> bool:
        """Whether nothing can be asked on it any more."""
        return self._transport.is_closing()

    def close(self) -> None:
        """Hang up; who waits gets :class:`LineGone`."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody calls: ask who it is."""
        self._transport = cast(asyncio.Transport, transport)  # of uvloop, which has classes of its own
        wire.tune(transport.get_extra_info("socket"))
        self._transport.write(wire.written(self._nonce))
        self._timer = asyncio.get_running_loop().call_later(PATIENCE, self.close)
        self._lines.came(self)

    def data_received(self, data: bytes) -> None:
        """Bytes of answers; who sends anything else is hung up on."""
        try:
            self._silent = 0
            self._reader.feed(data)
            for message in self._reader:
                if self.name:
                    self._take(*message)
                else:
                    self._welcome(*message)
        except Exception:  # noqa: BLE001 - whatever it was, it was no answer
            self._transport.abort()

    def eof_received(self) -> None:
        """The other end has hung up: not even what is still to be written will be read."""
        self._lines.left(self)
        self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Nothing comes any more."""
        self._timer.cancel()
        self._lines.left(self)
        for waiting in self._open.values():
            if not waiting.done():
                waiting.set_exception(LineGone())

    def _welcome(self, shown: bytes, name: str, nonce: bytes) -> None:
        secret = self._lines.secret
        if not name or not hmac.compare_digest(shown, wire.proof(secret, self._nonce, wire.MODEL)):
            self._transport.abort()
            return
        self.name = name
        self._reader = wire.reader()
        self._transport.write(wire.written(wire.proof(secret, nonce, wire.FRONT)))
        self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(BEAT, self._beat)
        self._lines.known(self)

    def _beat(self) -> None:
        """Hang up on one that lives no more though its machine does; counted, as this process may have slept itself."""
        if self._silent >= MISSED:
            self._transport.abort()
            return
        self._silent += 1
        self._transport.write(wire.written((0, wire.PING)))
        self._timer = asyncio.get_running_loop().call_later(BEAT, self._beat)

    def _take(self, number: int, *parts: Any) -> None:
        if number == 0:
            if parts[0] == wire.ENDING:  # once it has answered what it was asked
                self._lines.left(self)
            return
        waiting = self._open.get(number)
        if waiting is None or waiting.done():
            return  # given up
        if len(parts) == 4:
            waiting.set_result((wire.answered(*parts[:3]), parts[3]))
        elif parts[0] == wire.GONE:
            self._lines.left(self)
            waiting.set_exception(LineGone())
        else:
            waiting.set_exception(wire.refused(*parts))


class Lines:
    """All lines of a front.

    Args:
        counted: Told how many models can be asked, whenever that changes.

    Attributes:
        secret: Known to those who may call.
    """

    def __init__(self, counted: Callable[[int], None] = lambda _: None) -> None:
        self.secret = secrets.token_bytes(32)
        self._counted = counted
        self._strangers: dict[Line, None] = {}  # by age
        self._known: list[Line] = []
        self._asked = 0
        self._opening = asyncio.Lock()
        self._server: asyncio.Server | None = None

    async def listen(self, host: str) -> Meeting:
        """Take calls from now on, at a free port.

        Raises:
            OSError: There is no such address here.
        """
        async with self._opening:
            if self._server is None:
                self._server = await asyncio.get_running_loop().create_server(lambda: Line(self), host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return Meeting(host, port, self.secret)

    def best(self) -> Line | None:
        """The one with the fewest open texts, of these the one that was asked least lately; None: there is none."""
        usable = (line for line in self._known if not line.closing)
        return min(usable, key=lambda line: (line.texts, line.asked), default=None)

    def turn(self) -> int:
        """A number that grows with every request."""
        self._asked += 1
        return self._asked

    def names(self) -> list[str]:
        """Replicas whose process is on a line."""
        return [line.name for line in self._known]

    async def close(self) -> None:
        """Take no more calls, and hang up."""
        if self._server is not None:
            self._server.close()
        for line in (*self._strangers, *self._known):
            line.close()

    def came(self, line: Line) -> None:
        """Somebody calls."""
        self._strangers[line] = None
        if len(self._strangers) > STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.close()

    def known(self, line: Line) -> None:
        """And may be asked."""
        self._strangers.pop(line, None)
        for other in [other for other in self._known if other.name == line.name]:
            other.close()  # its end has not been seen here, or it would not call again
        self._known.append(line)
        self._counted(len(self._known))

    def left(self, line: Line) -> None:
        """It may not be asked any more."""
        self._strangers.pop(line, None)
        if line in self._known:
            self._known.remove(line)
            self._counted(len(self._known))


def called(meeting: Meeting, name: str) -> socket.socket:
    """Call the front, from a model's process.

    Args:
        meeting: Where, and the secret.
        name: Of the replica.

    Returns:
        The line, on which questions come.

    Raises:
        OSError: Nobody is there, or does not speak as the front does.
    """
    line = socket.create_connection((meeting.host, meeting.port), timeout=PATIENCE)
    try:
        wire.tune(line)
        own = secrets.token_bytes(wire.NONCE)
        nonce = _heard(line)
        line.sendall(wire.written((wire.proof(meeting.secret, nonce, wire.MODEL), name, own)))
        if not hmac.compare_digest(_heard(line), wire.proof(meeting.secret, own, wire.FRONT)):
            raise ConnectionError("it does not know the secret")
        line.settimeout(None)
    except Exception as error:
        line.close()
        raise ConnectionError(f"{meeting.host}:{meeting.port} does not speak as a front of rl-exit: {error}") from error
    return line


def _heard(line: socket.socket) -> bytes:
    """The next message, of 32 bytes, and nothing of what may follow it."""
    data = b""
    while len(data) < GREETING:
        found = line.recv(GREETING - len(data))
        if not found:
            raise ConnectionError("it has hung up")
        data += found
    said = msgpack.unpackb(data)
    if not isinstance(said, bytes) or len(said) != wire.NONCE:
        raise ConnectionError("it says something else")
    return said
