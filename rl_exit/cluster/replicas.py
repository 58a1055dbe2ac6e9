"""Replicas of a model as one backend of the HTTP side: what one that died had begun goes to another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Any

from grpc import StatusCode
from grpc.aio import AioRpcError
from ray.exceptions import RayActorError, RayTaskError

from rl_exit.data.instances import Instances
from rl_exit.errors import UserError
from rl_exit.serving.lines import LineGone, Lines
from rl_exit.serving.schema import Wish, WriteRequest
from rl_exit.serving.texts import TextSide
from rl_exit.serving.web import Refusal

GIVEN_UP = 30  # times that a replica may be gone before a request is refused, after 26 seconds
AT_ONCE = 8192  # characters that take a few milliseconds to tokenise; others' requests need not wait for more
FIRST_WAIT = 0.05  # seconds before a request is given to another replica; doubles with every further death


class Asking:
    """Calls of a deployment whose replicas may die, and what they say of themselves.

    Args:
        handle: Of the deployment.

    Attributes:
        handle: The same.
        retried: Called for every request that goes to another replica.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.retried: Callable[[], None] = lambda: None
        self._states: dict[str, tuple[float, dict[str, Any]]] = {}

    async def ask(self, method: str, *words: Any, met: int = 0) -> Any:
        """The answer of some replica.

        Args:
            method: Of the deployment.
            words: Its arguments.
            met: Times that the request has met a replica that is gone.

        Raises:
            Refusal: It has met ``GIVEN_UP`` times a replica that is gone.
            UserError: What a replica raised for the user.
        """
        for attempt in range(met, GIVEN_UP):
            response = getattr(self.handle, method).remote(*words)
            try:
                return await response
            except (RayActorError, AioRpcError) as error:
                if not is_gone(error):
                    raise
                await self.another(attempt)
            except RayTaskError as error:
                raise in_words(error) from None
            finally:
                response.cancel()  # nothing, unless nobody waits any more: then the replica's work ends as well
        raise given_up()

    async def another(self, attempt: int) -> None:
        """A replica has died under a request: wait a little before the next is asked."""
        self.retried()
        await asyncio.sleep(min(FIRST_WAIT * 2**attempt, 1.0))

    def keep(self, found: dict[str, Any]) -> None:
        """Keep what a replica says of itself."""
        self._states[found["replica"]] = (time.monotonic(), found["state"])

    async def states(self) -> dict[str, dict[str, Any]]:
        """What the replicas last said; one of them is asked anew, and nothing is told where it does not answer."""
        response = self.handle.state.remote()
        try:
            self.keep(await asyncio.wait_for(response, 1.0))
        except Exception:  # noqa: BLE001 - whatever it is, this one does not answer
            return {}
        finally:
            response.cancel()
        now = time.monotonic()
        self._states = {name: (at, state) for name, (at, state) in self._states.items() if now - at < 60.0}
        return {name: state for name, (_, state) in self._states.items()}


class Replicas:
    """Replicas of a classifier; see :class:`rl_exit.serving.http.Backend`.

    Args:
        asking: Of the deployment.
        texts: Tokenizer and labels of the model.
        lines: Straight to the replicas' models; while there is none, replicas are asked through Ray.
    """

    def __init__(self, asking: Asking, texts: TextSide, lines: Lines) -> None:
        self._asking = asking
        self._texts = texts
        self._lines = lines

    async def answer(self, texts: Sequence[str], pairs: Sequence[str] | None, wish: Wish) -> list[dict[str, Any]]:
        """See :class:`rl_exit.serving.http.Backend`."""
        instances = await self._tokenised(texts, pairs) if self._lines.best() else None
        met = 0
        while instances is not None and met < GIVEN_UP and (line := self._lines.best()):
            try:
                left, state = await line.run(instances, wish)
            except LineGone:
                await self._asking.another(met)
                met += 1
                continue
            self._asking.keep({"replica": line.name, "state": state})
            return self._texts.told(left)
        found = await self._asking.ask("answer", texts, pairs, wish, met=met)
        self._asking.keep(found)
        answers: list[dict[str, Any]] = found["answers"]
        return answers

    async def _tokenised(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Instances:
        if sum(map(len, texts)) + sum(map(len, pairs or ())) <= AT_ONCE:
            return self._texts.tokenised(texts, pairs)
        return await asyncio.to_thread(self._texts.tokenised, texts, pairs)

    async def explain(self, text: str, pair: str | None, wish: Wish) -> dict[str, Any]:
        """See :class:`rl_exit.serving.http.Backend`."""
        found: dict[str, Any] = await self._asking.ask("explain", text, pair, wish)
        return found

    async def states(self) -> dict[str, dict[str, Any]]:
        """See :meth:`Asking.states`."""
        return await self._asking.states()


class Writers:
    """Replicas of a decoder; see :class:`rl_exit.serving.writing_http.WritingBackend`.

    Args:
        asking: Of the deployment.
    """

    def __init__(self, asking: Asking) -> None:
        self._asking = asking

    async def whole(self, request: WriteRequest) -> list[dict[str, Any]]:
        """See :class:`rl_exit.serving.writing_http.WritingBackend`; written anew where a replica dies."""
        found = await self._asking.ask("whole", request)
        self._asking.keep(found)
        tokens: list[dict[str, Any]] = found["tokens"]
        return tokens

    async def stream(self, request: WriteRequest) -> AsyncGenerator[list[dict[str, Any]], None]:
        """See :class:`rl_exit.serving.writing_http.WritingBackend`.

        Where a replica dies, another is given the tokens that have been told and goes on behind them: their keys and
        values are made again by the same steps (state copying makes them depend on every exit), nothing is told twice.
        """
        told: list[list[int]] = [list(given) for given in request.given] or [[] for _ in request.prompts]
        ended: set[int] = set()
        for attempt in range(GIVEN_UP):
            response = self._asking.handle.options(stream=True).stream.remote(replace(request, given=told))
            try:
                async for part in response:
                    for token in part:
                        told[token["index"]].append(token["token"])
                        if token["finish"] is not None:
                            ended.add(token["index"])
                    yield part
                return
            except RayActorError:
                if len(ended) == len(told):
                    return
                await self._asking.another(attempt)
            except RayTaskError as error:
                raise in_words(error) from None
            finally:
                response.cancel()
        raise given_up()

    async def states(self) -> dict[str, dict[str, Any]]:
        """See :meth:`Asking.states`."""
        return await self._asking.states()


def is_gone(error: RayActorError | AioRpcError) -> bool:
    """Whether the replica that was asked is no more, or is being ended."""
    return isinstance(error, RayActorError) or error.code() in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)


def in_words(error: RayTaskError) -> Exception:
    """What a replica raised for the user, without Ray's account of where; anything else as Ray tells it."""
    return error.cause if isinstance(error.cause, UserError) else error


def given_up() -> Refusal:
    """What a request is told that has met too many replicas that are gone."""
    message = f"no replica of the model answers; this request met {GIVEN_UP} times one that is gone"
    return Refusal(503, "no_replica", message)
