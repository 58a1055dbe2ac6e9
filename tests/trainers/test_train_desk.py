"""The desk between driver and Ray Train workers, without Ray: what it may forget and what it never gives out twice."""

from __future__ import annotations

import asyncio

import pytest

from rl_exit.errors import UserError
from rl_exit.trainers import train_crew
from rl_exit.trainers.train_crew import Desk

ORDER = {"model": "a"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_crew, "LONG_POLL_SECONDS", 0.2)


def test_a_desk_that_is_started_anew_hears_again_how_the_order_ended() -> None:
    async def scene() -> None:
        desk = Desk()
        await desk.look(1, ORDER, False)
        assert await desk.next(0, None) == (1, ORDER)
        assert (await desk.look(1, ORDER, False))["outcome"] is None
        # Rank 0 is done and asks for more; the desk dies before the driver looks again.
        assert await desk.next(1, (None,)) is None
        assert (await desk.look(1, ORDER, False))["outcome"] == (None,)
        anew = Desk()
        assert (await anew.look(1, ORDER, False))["outcome"] is None
        assert await anew.next(1, None) is None  # another rank says nothing about it
        assert (await anew.look(1, ORDER, False))["outcome"] is None
        assert await anew.next(1, (None,)) is None
        assert (await anew.look(1, ORDER, False))["outcome"] == (None,)
        await anew.look(2, ORDER, False)
        assert await anew.next(1, (None,)) == (2, ORDER)

    asyncio.run(scene())


def test_an_order_that_has_ended_is_not_done_again_by_workers_that_are_started_anew() -> None:
    async def scene() -> None:
        desk = Desk()
        await desk.look(1, ORDER, False)
        assert await desk.next(0, None) == (1, ORDER)
        await desk.next(1, (None,))
        await desk.hello(0)  # a worker was lost between two trainings
        assert await desk.next(0, None) is None
        at = await desk.look(2, ORDER, False)
        assert at["losses"] == 0 and at["outcome"] is None
        assert await desk.next(0, None) == (2, ORDER)

    asyncio.run(scene())


def test_the_first_word_about_an_order_counts_and_the_end_is_told_to_all() -> None:
    async def scene() -> None:
        desk, error = Desk(), UserError("the loss is not finite")
        await desk.look(1, ORDER, False)
        await desk.next(1, (error,))
        await desk.next(1, (None,))
        assert (await desk.look(1, ORDER, False))["outcome"] == (error,)
        await desk.look(1, None, True)
        assert await desk.next(1, None) == (1, None)

    asyncio.run(scene())


def test_places_of_lost_workers_are_named_once() -> None:
    async def scene() -> None:
        desk = Desk()
        assert await desk.ping(0, "group a") is False
        await desk.ping(1, None)
        assert await desk.groups() == ["group a"]
        assert await desk.groups() == []

    asyncio.run(scene())
