"""Lines between a front and models' processes: answers, choice, strangers, ends; and what goes over them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from rl_exit import EarlyExitModel
from rl_exit.criteria import Fixed
from rl_exit.errors import ConfigError, DataError
from rl_exit.serving import lines as module
from rl_exit.serving import wire
from rl_exit.serving.lines import Line, LineGone, Lines, Meeting, called
from rl_exit.serving.model_process import ModelGone, ModelProcess, ModelSettings
from rl_exit.serving.schema import FULL_DEPTH, Wish
from rl_exit.serving.texts import Left

TEXTS = ["the old cat", "a hammer", "my red drill near the dog", "saw"]


@pytest.fixture(scope="module")
def process(folder: Path) -> Iterator[ModelProcess]:
    made = ModelProcess(ModelSettings(str(folder)))
    yield made
    made.close()


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Coroutine[Any, Any, None]], None]]:
    """Runs on one event loop for all tests, uvloop's as in Ray's actors: the process is asked from one."""
    loop = uvloop.new_event_loop()
    yield lambda work: loop.run_until_complete(asyncio.wait_for(work, 100))
    loop.close()


async def until(what: Callable[[], Any]) -> None:
    ends = time.monotonic() + 30
    while not what():
        assert time.monotonic() < ends
        await asyncio.sleep(0.01)


async def on_line(lines: Lines, process: ModelProcess, *names: str) -> list[asyncio.Task[None]]:
    """The process calls once for each name."""
    before, meeting = len(lines.names()), await lines.listen("127.0.0.1")
    tasks = [asyncio.create_task(process.on_line(meeting, name)) for name in names]
    await until(lambda: len(lines.names()) == before + len(names))
    return tasks


def best(lines: Lines) -> Line:
    found = lines.best()
    assert found is not None
    return found


def test_answers_on_a_line_are_those_of_predict(process: ModelProcess, run: Any, folder: Path) -> None:
    model = EarlyExitModel.from_pretrained(folder)

    async def ask() -> None:
        counted: list[int] = []
        lines = Lines(counted.append)
        assert lines.best() is None
        [task] = await on_line(lines, process, "first")
        line = best(lines)
        instances = process.texts.tokenised(TEXTS, None)
        wishes = [Wish(), Wish(threshold=0.2), Wish(operating_point=FULL_DEPTH)]
        found = await asyncio.gather(*(line.run(instances, wish) for wish in wishes))
        expected = [
            model.predict(TEXTS),
            model.predict(TEXTS, threshold=0.2),
            model.predict(TEXTS, criterion=Fixed(model.num_layers)),
        ]
        for (left, state), predictions in zip(found, expected, strict=True):
            for answer, one in zip(process.texts.told(left), predictions, strict=True):
                assert (answer["label"], answer["exit_layer"]) == (one.label, one.exit_layer)
                assert answer["probabilities"] == pytest.approx(list(one.probabilities), abs=1e-5)
                assert answer["milliseconds"] > 0
            assert state["rows"] >= len(TEXTS) and len(state["waiting"]) == model.num_layers
        assert line.texts == 0
        assert (await line.run(instances.take([]), Wish()))[0] == []
        with pytest.raises(ConfigError, match="unknown"):
            await line.run(instances, Wish(operating_point="unknown"))
        with pytest.raises(RuntimeError, match="IndexError"):  # a token that the model does not know
            await line.run(replace(instances, tokens=np.full_like(instances.tokens, 10**6)), Wish())
        assert len((await line.run(instances, Wish()))[0]) == len(TEXTS), "it goes on"
        await lines.close()
        await task
        assert lines.best() is None and counted == [1, 0]
        with pytest.raises(LineGone):
            await line.run(instances, Wish())

    run(ask())


def test_texts_with_segments_keep_them() -> None:
    """As pairs have; over the line as before it."""
    instances = replace(
        wire.asked(np.arange(5, dtype=np.int32).tobytes(), np.array([2, 3], np.int32).tobytes(), None, 7, ())[0],
        token_types=np.array([0, 1, 0, 0, 1], np.int8),
    )
    number, kind, *words = msgpack.unpackb(wire.question(3, instances, Wish(threshold=0.5)), use_list=False)
    again, wish = wire.asked(*words)
    assert (number, kind, wish) == (3, wire.RUN, Wish(threshold=0.5))
    assert again.fingerprint == instances.fingerprint


@given(st.lists(st.tuples(st.integers(1, 99), st.floats(0, 1e6)), max_size=5), st.integers(1, 7))
def test_answers_come_back_as_they_were(rows: list[tuple[int, float]], classes: int) -> None:
    left = [Left(np.full(classes, layer / 7, np.float32), layer, seconds) for layer, seconds in rows]
    number, *parts = msgpack.unpackb(wire.answer(9, left, {"rows": 4}), use_list=False)
    found = wire.answered(*parts[:3])
    assert (number, parts[3]) == (9, {"rows": 4})
    assert [(one.exit_layer, one.seconds, one.logits.tolist()) for one in found] == [
        (one.exit_layer, one.seconds, one.logits.tolist()) for one in left
    ]


def test_errors_keep_their_kind_where_it_is_the_users() -> None:
    for error in (DataError("no text"), ConfigError("no point")):
        number, *parts = msgpack.unpackb(wire.refusal(2, error))
        again = wire.refused(*parts)
        assert (number, type(again), str(again)) == (2, type(error), str(error))
    _, *parts = msgpack.unpackb(wire.refusal(2, KeyError("x")))
    assert repr(wire.refused(*parts)) == "RuntimeError(\"KeyError: 'x'\")"


def test_the_line_with_the_fewest_open_texts_is_asked(process: ModelProcess, run: Any) -> None:
    async def ask() -> None:
        lines = Lines()
        tasks = await on_line(lines, process, "a", "b", "c")
        one, names = process.texts.tokenised(TEXTS[:1], None), []
        for _ in range(6):
            assert best(lines) is best(lines)
            names.append(best(lines).name)
            await best(lines).run(one, Wish())
        assert names[:3] == names[3:] and set(names) == {"a", "b", "c"}, "in turn"
        busy = best(lines)
        many = process.texts.tokenised(TEXTS * 100, None)
        waiting = asyncio.create_task(busy.run(many, Wish(operating_point=FULL_DEPTH)))
        await asyncio.sleep(0)
        assert busy.texts == 400
        assert best(lines) is not busy
        assert len((await waiting)[0]) == 400
        await lines.close()
        await asyncio.gather(*tasks)

    run(ask())


def test_who_gives_up_on_a_line_leaves_nothing_behind(process: ModelProcess, run: Any) -> None:
    async def ask() -> None:
        lines = Lines()
        tasks = await on_line(lines, process, "a")
        line, before = best(lines), (await process.state())["rows"]
        many = process.texts.tokenised(TEXTS * 500, None)
        waiting = [asyncio.create_task(line.run(many, Wish(operating_point=FULL_DEPTH))) for _ in range(4)]
        await asyncio.sleep(0)
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        _, state = await line.run(process.texts.tokenised(TEXTS, None), Wish())
        assert sum(state["waiting"]) == 0
        assert state["rows"] - before < 4000, "of 8000 texts at 3 layers each"
        assert not line._open and line.texts == 0
        # So does a front that hangs up: nobody computes for it any more.
        asyncio.create_task(line.run(many, Wish(operating_point=FULL_DEPTH))).add_done_callback(
            lambda one: one.exception()
        )
        await asyncio.sleep(0.05)
        await lines.close()
        await asyncio.gather(*tasks)
        ends = time.monotonic() + 5
        while sum((await process.state())["waiting"]):
            assert time.monotonic() < ends
        assert (await process.state())["rows"] - before < 6000

    run(ask())


@pytest.mark.slow
def test_more_than_sockets_hold_either_way(tiny_backbone: Path, tmp_path: Path, run: Any) -> None:
    """A front that reads nothing until it has asked everything: questions are taken all the same."""
    labels = [str(number) for number in range(200)]
    EarlyExitModel.from_backbone(str(tiny_backbone), labels).save_pretrained(tmp_path / "model")
    process = ModelProcess(ModelSettings(str(tmp_path / "model")))

    async def ask() -> None:
        with socket.socket() as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            door.bind(("127.0.0.1", 0))
            door.listen()
            task = asyncio.create_task(process.on_line(Meeting("127.0.0.1", door.getsockname()[1], b"secret"), "a"))
            line, reader = (await asyncio.to_thread(door.accept))[0], wire.reader()
        line.settimeout(60)

        def talk() -> int:
            line.sendall(wire.written(b"n" * wire.NONCE))
            reader.feed(line.recv(1000))
            [[_, _, nonce]] = list(reader)
            line.sendall(wire.written(wire.proof(b"secret", nonce, wire.FRONT)))
            many = process.texts.tokenised(TEXTS * 250, None)
            for number in range(1, 41):
                line.sendall(wire.question(number, many, Wish()))
            heard: set[int] = set()
            while len(heard) < 40:
                reader.feed(line.recv(1 << 20))
                heard |= {number for number, logits, *_ in reader if len(logits) == 4 * 200 * 1000}
            return len(heard)

        assert await asyncio.to_thread(talk) == 40
        line.close()
        await task

    run(ask())
    process.close()


@pytest.mark.slow
def test_one_that_lives_no_more_is_hung_up_on(folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine answers for it, so only silence tells."""
    monkeypatch.setattr(module, "BEAT", 0.1)
    process = ModelProcess(ModelSettings(str(folder)))

    async def ask() -> None:
        lines = Lines()
        [task] = await on_line(lines, process, "a")
        await asyncio.sleep(1.5)
        assert lines.names() == ["a"], "while it lives it says so"
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(LineGone):
            await best(lines).run(process.texts.tokenised(TEXTS, None), Wish())
        assert lines.best() is None
        os.kill(process.pid, signal.SIGCONT)
        await task
        assert [one.name async for one in again(lines, process)] == ["b"], "it can call again"
        await lines.close()

    run(ask())
    process.close()


async def again(lines: Lines, process: ModelProcess) -> AsyncIterator[Line]:
    await on_line(lines, process, "b")
    yield best(lines)


def test_lines_that_have_ended_leave_no_thread(process: ModelProcess, run: Any) -> None:
    async def ask() -> None:
        def threads() -> int:
            return psutil.Process(process.pid).num_threads()

        lines = Lines()
        await process.state()
        before = threads()
        tasks = await on_line(lines, process, *"abcde")
        assert threads() == before + 10
        await lines.close()
        await asyncio.gather(*tasks)
        await until(lambda: threads() == before)

    run(ask())


def test_a_question_right_behind_the_greeting_is_answered(process: ModelProcess, run: Any) -> None:
    async def ask() -> None:
        with socket.create_server(("127.0.0.1", 0)) as door:
            task = asyncio.create_task(process.on_line(Meeting("127.0.0.1", door.getsockname()[1], b"secret"), "a"))
            line, reader = (await asyncio.to_thread(door.accept))[0], wire.reader()
        line.settimeout(20)

        def talk() -> None:
            line.sendall(wire.written(bytes(wire.NONCE)))
            reader.feed(line.recv(1000))
            [[_, _, nonce]] = list(reader)
            question = wire.question(1, process.texts.tokenised(TEXTS, None), Wish())
            line.sendall(wire.written(wire.proof(b"secret", nonce, wire.FRONT)) + question)
            reader.feed(line.recv(10_000))
            [[number, *parts]] = list(reader)
            assert number == 1 and len(wire.answered(*parts[:3])) == len(TEXTS)

        await asyncio.to_thread(talk)
        line.close()
        await task

    run(ask())


def test_a_replica_that_calls_again_has_one_line(process: ModelProcess, run: Any) -> None:
    async def ask() -> None:
        lines = Lines()
        [first] = await on_line(lines, process, "a")
        line, meeting = best(lines), await lines.listen("127.0.0.1")
        second = asyncio.create_task(process.on_line(meeting, "a"))
        await first
        await until(lambda: best(lines) is not line)
        assert lines.names() == ["a"]
        await lines.close()
        await second

    run(ask())


def test_many_may_ask_at_once_where_to_call(run: Any) -> None:
    async def ask() -> None:
        lines = Lines()
        meetings = await asyncio.gather(*(lines.listen("127.0.0.1") for _ in range(4)))
        assert len({meeting.port for meeting in meetings}) == 1 and "secret" not in repr(meetings[0])
        await lines.close()

    run(ask())


def test_a_model_that_dies_is_told_to_those_who_wait(folder: Path, run: Any) -> None:
    process = ModelProcess(ModelSettings(str(folder)))

    async def ask() -> None:
        lines = Lines()
        [task] = await on_line(lines, process, "a")
        waiting = asyncio.create_task(best(lines).run(process.texts.tokenised(TEXTS * 500, None), Wish()))
        await asyncio.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(LineGone):
            await waiting
        assert lines.best() is None
        with pytest.raises(ModelGone):
            await task
        await lines.close()

    run(ask())
    process.close()


@pytest.mark.slow
def test_a_model_that_is_ended_answers_first_and_takes_nothing_more(folder: Path, run: Any) -> None:
    process = ModelProcess(ModelSettings(str(folder)))

    async def ask() -> None:
        lines = Lines()
        await on_line(lines, process, "a")
        line = best(lines)
        inside = [asyncio.create_task(line.run(process.texts.tokenised(TEXTS * 100, None), Wish())) for _ in range(3)]
        await asyncio.sleep(0.1)
        ended = asyncio.get_running_loop().run_in_executor(None, process.close)
        await until(lambda: lines.best() is None)
        late = asyncio.create_task(line.run(process.texts.tokenised(TEXTS, None), Wish()))
        assert [len(left) for left, _ in await asyncio.gather(*inside)] == [400] * 3
        with pytest.raises(LineGone):  # so that it is asked of another
            await late
        await ended
        await lines.close()

    run(ask())


def test_a_front_that_cannot_be_reached_is_told(process: ModelProcess, run: Any) -> None:
    async def ask() -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            port = nobody.getsockname()[1]
        with pytest.raises(RuntimeError, match="ConnectionRefusedError"):
            await process.on_line(Meeting("127.0.0.1", port, b""), "a")
        lines = Lines()
        meeting = await lines.listen("127.0.0.1")
        # One that does not know the secret is hung up on, and asked nothing.
        with pytest.raises(RuntimeError, match=r"it has hung up|reset"):
            await process.on_line(replace(meeting, secret=b"guessed"), "a")
        assert lines.names() == [] and not lines._strangers
        await lines.close()

    run(ask())


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"\xc1", msgpack.packb(None), msgpack.packb([b"", ""]), b"\x00" * 5000]
)
def test_a_stranger_is_hung_up_on(run: Any, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 60)

    async def ask() -> None:
        lines = Lines()
        meeting = await lines.listen("127.0.0.1")
        reader, writer = await asyncio.open_connection(meeting.host, meeting.port)
        nonce = msgpack.unpackb(await reader.read(100))
        assert len(nonce) == wire.NONCE
        writer.write(said)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        assert lines.names() == [] and not lines._strangers
        writer.close()
        await lines.close()

    run(ask())


def test_one_who_says_nothing_is_hung_up_on_and_so_is_a_crowd(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    monkeypatch.setattr(module, "STRANGERS", 2)

    async def ask() -> None:
        lines = Lines()
        meeting = await lines.listen("127.0.0.1")
        callers = [await asyncio.open_connection(meeting.host, meeting.port) for _ in range(4)]
        for reader, _ in callers[:2]:
            await reader.read(100)
            assert await reader.read() == b"", "those that have been silent for longest"
        await until(lambda: not lines._strangers)
        for _, writer in callers:
            writer.close()
        await lines.close()

    run(ask())


def test_many_strangers_at_once_are_bounded_too() -> None:
    """Their ends are seen later than their calls."""

    class Caller:
        closed = False

        def close(self) -> None:
            self.closed = True

    lines, callers = Lines(), [Caller() for _ in range(3 * module.STRANGERS)]
    for caller in callers:
        lines.came(caller)  # type: ignore[arg-type]
    assert [caller.closed for caller in callers] == [True] * 2 * module.STRANGERS + [False] * module.STRANGERS
    assert len(lines._strangers) == module.STRANGERS


def test_every_call_has_a_nonce_of_its_own(run: Any) -> None:
    """So that what was overheard once is worth nothing."""

    async def ask() -> None:
        lines = Lines()
        meeting = await lines.listen("127.0.0.1")
        nonces = set()
        for _ in range(3):
            reader, writer = await asyncio.open_connection(meeting.host, meeting.port)
            nonces.add(await reader.read(100))
            writer.close()
        assert len(nonces) == 3
        await lines.close()

    run(ask())


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\xa3abc",
        b"SSH-2.0",
        b"\xc1",
        b"\xda\xff\xff" + b"a" * 2000,
        wire.written(b"n" * 32) + wire.written(b"w" * 32),
    ],
    ids=["nothing", "text", "other", "damaged", "long", "wrong proof"],
)
def test_calling_one_who_is_no_front_is_told(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def answer() -> None:
            one, _ = other.accept()
            one.sendall(said)
            one.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                while one.recv(1000):
                    pass
            one.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConnectionError, match=f"127.0.0.1:{port} does not speak as a front"):
            called(Meeting("127.0.0.1", port, b"secret"), "a")
        thread.join()
