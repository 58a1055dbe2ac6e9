"""A decoder in a thread of its own, and what a replica of the server does with it: prompts in, tokens out.

The thread runs turns of a :class:`rl_exit.serving.decoding.ContinuousBatch`; every token goes to whoever asked for it
as soon as it is there. No HTTP and no Ray here.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

from rl_exit.criteria import Criterion, Fixed
from rl_exit.errors import ConfigError, DataError, ModelError
from rl_exit.generation.api import encode_prompts, the_rule
from rl_exit.generation.engine import Engine
from rl_exit.generation.loop import Event
from rl_exit.generation.sampling import settings_of
from rl_exit.models.pretrained import position_limit
from rl_exit.serving.decoding import ContinuousBatch, Order, Told, Writing
from rl_exit.serving.schema import FULL_DEPTH, Wish, WriteRequest, unknown_point

Tell = Callable[[Told], None]


@dataclass(eq=False)
class Ticket:
    """A text that was asked for: cancel it, and its row is free before the next token."""

    order: Order
    tell: Tell
    cancelled: bool = False
    writing: Writing | None = field(default=None, repr=False)

    def cancel(self) -> None:
        """Nobody waits any more."""
        self.cancelled = True


class WritingEngine:
    """A continuous batch in a thread of its own; :meth:`close` ends it.

    Args:
        batch: What the thread runs; nobody else may touch it.
    """

    def __init__(self, batch: ContinuousBatch) -> None:
        self._batch = batch
        self._wake = threading.Condition()
        self._arrived: list[Ticket] = []
        self._inside: dict[Writing, Ticket] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="rl-exit-writer", daemon=True)
        self._thread.start()

    def submit(self, orders: Sequence[Order], tell: Tell) -> list[Ticket]:
        """Ask for texts.

        Args:
            orders: What is wanted, each fitting into a row.
            tell: Called in the engine's thread with every event of these texts, or with what went wrong.

        Raises:
            RuntimeError: The engine is closed.
        """
        tickets = [Ticket(order, tell) for order in orders]
        with self._wake:
            if self._closing:
                raise RuntimeError("the engine is closed")
            self._arrived += tickets
            self._wake.notify()
        return tickets

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def state(self) -> dict[str, int]:
        """Texts that wait for a row and that have one, and what was done since the start."""
        batch = self._batch
        return {
            "waiting": batch.waiting + len(self._arrived),
            "writing": batch.inside,
            **asdict(batch.counts),
        }

    def close(self) -> None:
        """Write what is inside to its end, then end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._arrived or self._inside or self._closing):
                    self._wake.wait()
                arrived, self._arrived = self._arrived, []
            if not (arrived or self._inside):
                return
            for ticket in arrived:
                self._begin(ticket)
            for writing, ticket in list(self._inside.items()):
                if ticket.cancelled:
                    self._drop(writing)
            self._turn()

    def _begin(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            return
        try:
            self._inside[self._batch.add(ticket.order)] = ticket
        except Exception as error:  # noqa: BLE001 - whoever waits is told
            ticket.tell(error)

    def _turn(self) -> None:
        try:
            found = self._batch.turn()
        except Exception as error:  # noqa: BLE001 - those inside are told; the thread serves who comes next
            for writing, ticket in list(self._inside.items()):
                self._drop(writing)
                ticket.tell(error)
            return
        for writing, told in found:
            ticket = self._inside[writing]
            if isinstance(told, Exception) or told.finish is not None:
                del self._inside[writing]
            if not ticket.cancelled:
                ticket.tell(told)

    def _drop(self, writing: Writing) -> None:
        del self._inside[writing]
        self._batch.drop(writing)


class WritingService:
    """One decoder, its thread, and the rules that requests may ask for.

    Args:
        model: An :class:`rl_exit.models.causal.EarlyExitCausalModel` with its tokenizer.
        rows: Texts that are written at a time.
        max_context: Positions of a row: the tokens of a prompt and of what follows it.
    """

    def __init__(self, model: Any, rows: int, max_context: int) -> None:
        self.model = model.eval()
        self.capacity = context_of(model, max_context)
        self.engine = WritingEngine(ContinuousBatch(model, rows, self.capacity))
        self.rule_for = lru_cache(maxsize=64)(self._rule)

    async def stream(self, request: WriteRequest) -> AsyncGenerator[list[dict[str, Any]], None]:
        """Write; yields the tokens that have come since the last time, each a mapping.

        The tokens of ``request.given`` are not told again. A mapping has ``index`` (of the prompt), ``token``, ``text``
        (what can be shown now), ``exit_layer`` and ``finish`` (``"eos"``, ``"stop"``, ``"length"`` with the last token
        of a prompt, else None).

        Raises:
            UserError: A setting that is not accepted, or a prompt that is too long.
        """
        orders = self.orders(request)
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[Told] = asyncio.Queue()
        tickets = self.engine.submit(orders, lambda said: _hand_over(loop, told, said))
        skip = [len(order.given) for order in orders]
        open_texts = len(orders)
        try:
            while open_texts:
                said = [await told.get()]
                while not told.empty():
                    said.append(told.get_nowait())
                fresh = []
                for event in said:
                    if isinstance(event, Exception):
                        raise event
                    open_texts -= event.finish is not None
                    if skip[event.row]:
                        skip[event.row] -= 1
                    else:
                        fresh.append(_plain(event))
                if fresh:
                    yield fresh
        finally:
            for ticket in tickets:
                ticket.cancel()

    async def whole(self, request: WriteRequest) -> list[dict[str, Any]]:
        """Write to the end; all tokens as :meth:`stream` tells them, with ``seconds`` since the request came here.

        Raises:
            UserError: As :meth:`stream`.
        """
        started = time.monotonic()
        found: list[dict[str, Any]] = []
        async with aclosing(self.stream(request)) as parts:
            async for part in parts:
                seconds = time.monotonic() - started
                found += [{**token, "seconds": seconds} for token in part]
        return found

    async def states(self) -> dict[str, dict[str, Any]]:
        """The state of this one, by name, as several replicas would tell theirs."""
        return {"1": self.state()}

    def state(self) -> dict[str, Any]:
        """See :meth:`WritingEngine.state`."""
        return self.engine.state()

    def close(self) -> None:
        """Write what is inside to its end, then stop."""
        self.engine.close()

    def orders(self, request: WriteRequest) -> list[Order]:
        """What the engine is to write.

        Raises:
            UserError: A setting that is not accepted, or a prompt that is too long.
        """
        _, encoded = encode_prompts(self.model, request.prompts)
        given = request.given or [()] * len(encoded)
        rule = self.rule_for(request.wish)
        made = []
        for number, prompt in enumerate(encoded):
            settings, _ = settings_of(self.model.generation_config, None, request.options, len(prompt))
            room = self.capacity - len(prompt)
            if room < 1:
                raise DataError(
                    f"a prompt of {len(prompt)} tokens; accepted: up to {self.capacity - 1}, so that one can follow"
                )
            fitting = min(settings.max_new_tokens, room)
            settings = replace(settings, max_new_tokens=fitting, seed=request.seed + number)
            made.append(Order(number, prompt, settings, rule, given[number]))
        return made

    def _rule(self, wish: Wish) -> Criterion | None:
        if wish.operating_point is not None:
            if wish.operating_point != FULL_DEPTH:
                raise ConfigError(unknown_point(wish.operating_point, [FULL_DEPTH]))
            return the_rule(self.model, Fixed(self.model.num_exits), None)
        return the_rule(self.model, None, wish.threshold)


def context_of(model: Any, max_context: int) -> int:
    """Positions of a row: what is allowed, or what the model has, if that is less.

    Raises:
        ConfigError: Below 2.
    """
    if max_context < 2:
        raise ConfigError(f"max_context = {max_context}; accepted: a whole number from 2")
    limit = position_limit(model.backbone.model.config)
    return max_context if limit is None else min(max_context, limit)


def check_writer(model: Any, name: str) -> None:
    """Say at once what would fail at every request.

    Raises:
        ModelError: The model has no tokenizer, its family generates no text, or its weights are not finite numbers.
    """
    if model.tokenizer is None:
        raise ModelError(f"model '{name}' has no tokenizer, so it cannot read prompts")
    if not math.isfinite(float(model.head_weight.detach().sum())):
        raise ModelError(f"model '{name}': its weights are not finite numbers, it is damaged")
    Engine(model, 1, 2)


def _plain(event: Event) -> dict[str, Any]:
    return {
        "index": event.row,
        "token": event.token,
        "text": event.piece,
        "exit_layer": event.exit_layer,
        "finish": event.finish,
    }


def _hand_over(loop: asyncio.AbstractEventLoop, told: asyncio.Queue[Told], said: Told) -> None:
    """From the engine's thread to whoever waits; nobody does where the loop has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(told.put_nowait, said)
