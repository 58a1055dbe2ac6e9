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
from dataclasses import dataclass
from typing import Any, cast

from rl_exit.data.instances import Instances
from rl_exit.serving import wire
from rl_exit.serving.schema import Wish
from rl_exit.serving.texts import Left

PATIENCE = 5.0  # seconds within which a caller must show who it is
STRANGERS = 64  # callers at a time of whom that is not known yet


class LineGone(RuntimeError):
    """The process at the other end has ended, or ends."""


@dataclass(frozen=True)
class Meeting:
    """Where a model's process calls, and what shows that it may."""

    host: str
    port: int
    secret: bytes


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

    async def run(self, instances: Instances, wish: Wish) -> tuple[list[Left], dict[str, Any]]:
        """How texts leave, and the state of the model afterwards.

        Raises:
            UserError: What the model's process raised for the user.
            LineGone: It has ended.
            RuntimeError: It failed at this request.
        """
        if self._transport.is_closing():
            raise LineGone
        self._number += 1
        number, count = self._number, len(instances)
        self.texts += count
        waiting = self._open[number] = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(wire.question(number, instances, wish))
            return await waiting
        except asyncio.CancelledError:
            if number in self._open and not self._transport.is_closing():
                self._transport.write(wire.written((number, wire.CANCEL)))
            raise
        finally:
            self.texts -= count
            self._open.pop(number, None)

    def close(self) -> None:
        """Hang up; who waits gets :class:`LineGone`."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody calls: ask who it is."""
        self._transport = cast(asyncio.Transport, transport)  # of uvloop, which has classes of its own
        wire.tune(transport.get_extra_info("socket"))
        self._transport.write(wire.written(self._nonce))
        self._late = asyncio.get_running_loop().call_later(PATIENCE, self.close)
        self._lines.came(self)

    def data_received(self, data: bytes) -> None:
        """Bytes of answers; who sends anything else is hung up on."""
        try:
            self._reader.feed(data)
            for message in self._reader:
                if self.name:
                    self._take(*message)
                else:
                    self._welcome(*message)
        except Exception:  # noqa: BLE001 - whatever it was, it was no answer
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Nothing comes any more."""
        self._late.cancel()
        self._lines.left(self)
        for waiting in self._open.values():
            if not waiting.done():
                waiting.set_exception(LineGone())

    def _welcome(self, shown: bytes, name: str) -> None:
        if not name or not hmac.compare_digest(shown, wire.proof(self._lines.secret, self._nonce)):
            self._transport.abort()
            return
        self.name = name
        self._reader = wire.reader()
        self._late.cancel()
        self._lines.known(self)

    def _take(self, number: int, *parts: Any) -> None:
        if number == 0:  # the process ends once it has answered what it was asked
            self._lines.left(self)
            return
        waiting = self._open.get(number)
        if waiting is None or waiting.done():
            return  # given up
        if len(parts) == 4:
            waiting.set_result((wire.answered(*parts[:3]), parts[3]))
        elif parts[0] == wire.GONE:
            waiting.set_exception(LineGone())
        else:
            waiting.set_exception(wire.refused(*parts))


class Lines:
    """All lines of a front.

    Attributes:
        secret: Known to those who may call.
    """

    def __init__(self) -> None:
        self.secret = secrets.token_bytes(32)
        self._strangers: set[Line] = set()
        self._known: list[Line] = []
        self._asked = 0
        self._server: asyncio.Server | None = None

    async def listen(self, host: str) -> Meeting:
        """Take calls from now on, at a free port.

        Raises:
            OSError: There is no such address here.
        """
        if self._server is None:
            self._server = await asyncio.get_running_loop().create_server(lambda: Line(self), host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return Meeting(host, port, self.secret)

    def best(self) -> Line | None:
        """The one with the fewest open texts, of these the one that was asked least lately; None: there is none."""
        if not self._known:
            return None
        found = min(self._known, key=lambda line: (line.texts, line.asked))
        self._asked += 1
        found.asked = self._asked
        return found

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
        self._strangers.add(line)
        if len(self._strangers) > STRANGERS:
            line.close()

    def known(self, line: Line) -> None:
        """And may be asked."""
        self._strangers.discard(line)
        self._known.append(line)

    def left(self, line: Line) -> None:
        """It may not be asked any more."""
        self._strangers.discard(line)
        if line in self._known:
            self._known.remove(line)


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
        reader = wire.reader(wire.FIRST_MOST)
        nonce = None
        while nonce is None:
            data = line.recv(wire.FIRST_MOST)
            if not data:
                raise ConnectionError(f"{meeting.host}:{meeting.port} has hung up")
            reader.feed(data)
            nonce = next(iter(reader), None)
        if not isinstance(nonce, bytes) or len(nonce) != wire.NONCE:
            raise ConnectionError(f"{meeting.host}:{meeting.port} is no front of rl-exit")
        line.sendall(wire.written((wire.proof(meeting.secret, nonce), name)))
        line.settimeout(None)
    except BaseException:
        line.close()
        raise
    return line
