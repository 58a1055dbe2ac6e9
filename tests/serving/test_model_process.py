"""A model in a process of its own: its answers, its end, what it is told that cannot be done."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from rl_exit import EarlyExitModel
from rl_exit.criteria import Fixed
from rl_exit.errors import ConfigError, UserError
from rl_exit.serving.model_process import ModelGone, ModelProcess, ModelSettings
from rl_exit.serving.schema import FULL_DEPTH, Wish

TEXTS = ["the old cat", "a hammer", "my red drill near the dog", "saw"]


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[ModelProcess]:
    made = ModelProcess(ModelSettings(str(folder)))
    yield made
    made.close()


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """The one from which the running process is asked."""
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture
def process(running: ModelProcess) -> Iterator[ModelProcess]:
    """The one that is running, as well after the test as before."""
    yield running
    assert not running._open and not gone(running.pid, seconds=0)


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process has ended, within some seconds."""
    until = time.monotonic() + seconds
    while True:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.05)


def test_answers_are_those_of_predict(process: ModelProcess, loop: asyncio.AbstractEventLoop, folder: Path) -> None:
    model = EarlyExitModel.from_pretrained(folder)

    async def ask() -> None:
        instances = process.texts.tokenised(TEXTS, None)
        wishes = [Wish(), Wish(threshold=0.2), Wish(operating_point=FULL_DEPTH)]
        found = await asyncio.gather(*(process.run(instances, wish) for wish in wishes))
        expected = [
            model.predict(TEXTS),
            model.predict(TEXTS, threshold=0.2),
            model.predict(TEXTS, criterion=Fixed(model.num_layers)),
        ]
        for (left, state), predictions in zip(found, expected, strict=True):
            for answer, one in zip(process.texts.told(left), predictions, strict=True):
                assert (answer["label"], answer["exit_layer"]) == (one.label, one.exit_layer)
                assert answer["probabilities"] == pytest.approx(list(one.probabilities), abs=1e-5)
            assert state["rows"] >= len(TEXTS)
        [[together, alone], _] = await process.together([(instances, Wish()), (instances, wishes[1])])
        assert [one.exit_layer for one in together] == [one.exit_layer for one in expected[0]]
        assert [one.exit_layer for one in alone] == [one.exit_layer for one in expected[1]]
        explained = await process.explain(process.texts.tokenised(TEXTS[:1], None), Wish())
        assert explained["exit_layer"] == expected[0][0].exit_layer
        with pytest.raises(ConfigError, match="unknown"):
            await process.run(instances, Wish(operating_point="unknown"))

    loop.run_until_complete(ask())


def test_who_gives_up_leaves_nothing_behind(process: ModelProcess, loop: asyncio.AbstractEventLoop) -> None:
    async def ask() -> None:
        before = (await process.state())["rows"]
        many = process.texts.tokenised(TEXTS * 500, None)
        waiting = [asyncio.create_task(process.run(many, Wish(operating_point=FULL_DEPTH))) for _ in range(4)]
        await asyncio.sleep(0)
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        _, state = await process.run(process.texts.tokenised(TEXTS, None), Wish())
        assert sum(state["waiting"]) == 0
        assert state["rows"] - before < 4000, "of 8000 texts at 3 layers each"
        assert not process._open

    loop.run_until_complete(ask())


def test_whoever_waits_when_it_dies_is_told(folder: Path) -> None:
    ends: list[int] = []
    process = ModelProcess(ModelSettings(str(folder)), gone=lambda: ends.append(1))

    async def ask() -> None:
        many = process.texts.tokenised(TEXTS * 500, None)
        waiting = asyncio.create_task(process.run(many, Wish(operating_point=FULL_DEPTH)))
        await asyncio.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ModelGone):
            await waiting
        with pytest.raises(ModelGone):
            await process.state()

    asyncio.run(ask())
    assert ends
    process.close()


@pytest.mark.slow
def test_closing_answers_what_is_inside(folder: Path) -> None:
    process = ModelProcess(ModelSettings(str(folder)))

    async def ask() -> None:
        waiting = asyncio.create_task(process.run(process.texts.tokenised(TEXTS * 20, None), Wish()))
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, process.close)
        left, _ = await waiting
        assert len(left) == 20 * len(TEXTS)

    asyncio.run(ask())
    assert gone(process.pid)


@pytest.mark.slow
def test_it_ends_with_those_who_started_it(folder: Path) -> None:
    process = ModelProcess(ModelSettings(str(folder)))
    process._pipe.close()  # as the kernel does for a process that is killed
    assert gone(process.pid)


def test_a_model_that_cannot_be_loaded_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing"):
        ModelProcess(ModelSettings(str(tmp_path / "nothing")))


def test_what_cannot_be_done_is_told_and_it_goes_on(process: ModelProcess, loop: asyncio.AbstractEventLoop) -> None:
    async def ask() -> None:
        with pytest.raises(RuntimeError, match="AttributeError"):
            await process._ask("unknown")
        left, _ = await process.run(process.texts.tokenised(TEXTS, None), Wish())
        assert len(left) == len(TEXTS)

    loop.run_until_complete(ask())


async def fill_the_pipes(process: ModelProcess) -> None:
    """More goes either way than a pipe holds, before anything is read; and one answer is more than it holds."""
    many = process.texts.tokenised(TEXTS * 500, None)
    asked = [process.run(many, Wish()) for _ in range(12)] + [process.state() for _ in range(2000)]
    async with asyncio.timeout(200):  # takes 3 s, on a busy machine a minute
        found = await asyncio.gather(*asked)
    assert all(len(left) == len(TEXTS) * 500 for left, _ in found[:12])  # type: ignore[misc]


def test_full_pipes_do_not_hold_each_other(process: ModelProcess, loop: asyncio.AbstractEventLoop) -> None:
    loop.run_until_complete(fill_the_pipes(process))


@pytest.mark.slow
def test_full_pipes_do_not_hold_each_other_on_uvloop(folder: Path) -> None:
    """Ray's actors run on it."""
    process = ModelProcess(ModelSettings(str(folder)))
    try:
        uvloop.run(fill_the_pipes(process))
    finally:
        process.close()
