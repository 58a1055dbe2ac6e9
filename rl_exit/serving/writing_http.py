"""The HTTP API of decoders: prompts in, text out, token by token where that is asked for (:class:`WritingBackend`)."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from rl_exit import __version__
from rl_exit.errors import ConfigError, DataError
from rl_exit.serving.metrics import WritingMetrics
from rl_exit.serving.schema import Limits, Problem, WriteRequest, unknown_point
from rl_exit.serving.web import (
    Door,
    Refusal,
    add_common,
    client_gone,
    end_all,
    plain_schema,
    problems,
    unless_gone,
)
from rl_exit.serving.writing_schema import ManyWritten, Prompts, WriterAnswer, WriterInfo, Written, WrittenToken

PAGE = {
    "/": ("write.html", "text/html"),
    "/page.js": ("write.js", "text/javascript"),
    "/page.css": ("serve.css", "text/css"),
}
PATHS = frozenset({"/v1/generate", "/v1/model", "/healthz", "/metrics", *PAGE})

Token = dict[str, Any]
Found = TypeVar("Found")


class WritingBackend(Protocol):
    """Who writes: a :class:`rl_exit.serving.writer.WritingService`, or replicas of it."""

    def stream(self, request: WriteRequest) -> AsyncGenerator[list[Token], None]:
        """See :meth:`rl_exit.serving.writer.WritingService.stream`."""

    async def whole(self, request: WriteRequest) -> list[Token]:
        """See :meth:`rl_exit.serving.writer.WritingService.whole`; each token with ``seconds`` since the beginning."""

    async def states(self) -> dict[str, dict[str, Any]]:
        """By replica, what :meth:`rl_exit.serving.writer.WritingService.state` says; of those that can be asked."""


class WritingFront:
    """The HTTP side: checks what comes in and hands it to the backend.

    Args:
        backend: Who writes.
        info: What clients are told.
        limits: What is accepted; ``max_texts`` and ``max_chars`` are those of prompts.

    Attributes:
        door: Who is inside.
    """

    def __init__(self, backend: WritingBackend, info: WriterInfo, limits: Limits) -> None:
        self.backend = backend
        self.info = info
        self.metrics = WritingMetrics(info.num_layers)
        self.door = Door(self.metrics, limits, PATHS)

    def request_of(self, body: Prompts) -> WriteRequest:
        """What the backend is asked.

        Raises:
            Refusal: Over a limit, or an unknown operating point.
        """
        limits, prompts = self.door.limits, body.prompts
        if len(prompts) > limits.max_texts:
            message = f"{len(prompts)} prompts; accepted: at most {limits.max_texts} in one request"
            raise Refusal(413, "too_many_texts", message, "prompt")
        for index, prompt in enumerate(prompts):
            where = "prompt" if isinstance(body.prompt, str) else f"prompt[{index}]"
            if len(prompt) > limits.max_chars:
                message = f"{where} has {len(prompt)} characters; accepted: at most {limits.max_chars}"
                raise Refusal(413, "text_too_long", message, where)
        if body.max_new_tokens >= self.info.max_context:
            message = f"max_new_tokens = {body.max_new_tokens}; accepted: at most {self.info.max_context - 1}"
            raise Refusal(422, "too_many_tokens", message, "max_new_tokens")
        if body.operating_point is not None and body.operating_point not in self.info.operating_points:
            message = unknown_point(body.operating_point, self.info.operating_points)
            raise Refusal(422, "unknown_operating_point", message, "operating_point")
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        return WriteRequest(prompts, body.options(), seed, body.wish())

    async def write(self, request: WriteRequest) -> list[dict[str, Any]]:
        """All texts of a request, within the limits.

        Raises:
            Refusal: No room, no answer in time, or refused by the backend.
        """
        started, timeout = time.monotonic(), self.door.limits.timeout
        with self.door.room(len(request.prompts)):
            tokens = await _in_time(self.backend.whole(request), timeout, timeout)
        self.metrics.written(tokens)
        whole = time.monotonic() - started
        writer = max((token["seconds"] for token in tokens), default=0.0)
        self.metrics.first_token.observe(min(token["seconds"] for token in tokens) + whole - writer)
        return [
            _summed(
                [token for token in tokens if token["index"] == index],
                request.seed + index,
                [token["seconds"] + whole - writer for token in tokens if token["index"] == index],
            )
            for index in range(len(request.prompts))
        ]

    async def events(self, request: WriteRequest) -> AsyncGenerator[str, None]:
        """A request's stream of server-sent events; what fails before the first token is raised, later it is told.

        Raises:
            Refusal: As :meth:`write`, before the first event.
        """
        started, timeout = time.monotonic(), self.door.limits.timeout
        texts: list[tuple[list[Token], list[float]]] = [([], []) for _ in request.prompts]
        with self.door.room(len(request.prompts)):
            async with aclosing(self.backend.stream(request)) as parts:
                while any(not tokens or tokens[-1]["finish"] is None for tokens, _ in texts):
                    left = timeout - (time.monotonic() - started)
                    try:
                        part = await _in_time(anext(parts), left, timeout)
                    except Exception as error:
                        if not any(tokens for tokens, _ in texts):
                            raise
                        yield _event("error", _told(error))
                        return
                    now = time.monotonic() - started
                    if not any(tokens for tokens, _ in texts):
                        self.metrics.first_token.observe(now)
                    self.metrics.written(part)
                    for token in part:
                        tokens, times = texts[token["index"]]
                        tokens.append(token)
                        times.append(now)
                        yield _event(None, token)
        ends = [_summed(tokens, request.seed + i, times) for i, (tokens, times) in enumerate(texts)]
        yield _event("end", {"generations": ends})


def build_writing_app(front: WritingFront) -> FastAPI:
    """The application; its OpenAPI schema, with the limits, is at ``/openapi.json``."""
    app = FastAPI(
        title="rl-exit",
        version=__version__,
        description="Prompts in, text out, every token from the layer at which it left the model.",
        docs_url=None,  # The usual page of documentation loads scripts from elsewhere.
        redoc_url=None,
    )
    refusals = problems(s422="JSON of another form, a setting out of range, or a prompt with more tokens than fit.")
    streamed = {
        "description": "One text, several, or with `stream` one event per token and an event `end`, or `error`.",
        "content": {EventStream.media_type: {"schema": {"type": "string"}}},
    }

    @app.post(
        "/v1/generate",
        response_model=Written | ManyWritten,
        responses={200: streamed, **refusals},
        summary="Go on from a prompt, or from several",
    )
    async def generate(body: Prompts, request: Request) -> Any:
        wanted = front.request_of(body)
        if body.stream:
            return await _begun(front.events(wanted), request)
        found = await unless_gone(front.write(wanted), request)
        return found[0] if isinstance(body.prompt, str) else {"generations": found}

    @app.get("/v1/model", response_model=WriterAnswer, summary="The model and the limits")
    async def model() -> dict[str, Any]:
        limits = front.door.limits
        sizes = {"max_chars": limits.max_chars, "max_texts": limits.max_texts, "max_body": limits.max_body}
        return {**asdict(front.info), **sizes}

    add_common(app, front.door, lambda: front.backend, PAGE)
    app.openapi = lambda: _schema(app, front)  # type: ignore[method-assign]
    return app


class EventStream(Response):
    """Server-sent events as they come; where the client goes away, their source is closed.

    Args:
        first: The first event.
        rest: The source of the others.
    """

    media_type = "text/event-stream"

    def __init__(self, first: str, rest: AsyncGenerator[str, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(client_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await end_all(sending, gone)
            await self._rest.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first.encode(), "more_body": True})
        async for event in self._rest:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _begun(events: AsyncGenerator[str, None], request: Request) -> Response:
    """A response once the first event is there, so that a refusal still has a status of its own."""
    return EventStream(await unless_gone(anext(events), request), events)


async def _in_time(work: Awaitable[Found], left: float, timeout: float) -> Found:
    try:
        # Not wait_for: in Python 3.11 it swallows the cancellation that comes together with a result.
        async with asyncio.timeout(max(left, 0.001)):
            return await work
    except TimeoutError:
        raise Refusal(504, "timeout", f"not written within {timeout:g} seconds") from None
    except (ConfigError, DataError) as error:
        raise Refusal(422, "refused", str(error)) from None


def _told(error: Exception) -> dict[str, Any]:
    problem = error.problem if isinstance(error, Refusal) else Problem(error="internal", message="the server failed")
    return problem.model_dump()


def _event(kind: str | None, data: Mapping[str, Any]) -> str:
    head = "" if kind is None else f"event: {kind}\n"
    return f"{head}data: {json.dumps(data)}\n\n"


def _summed(tokens: Sequence[Token], seed: int, times: Sequence[float]) -> dict[str, Any]:
    layers = [token["exit_layer"] for token in tokens]
    return {
        "text": "".join(token["text"] for token in tokens),
        "tokens": [token["token"] for token in tokens],
        "exit_layers": layers,
        "mean_exit_layer": sum(layers) / len(layers),
        "finish": tokens[-1]["finish"],
        "seed": seed,
        "first_token_milliseconds": 1000 * times[0],
        "milliseconds": 1000 * times[-1],
    }


def _schema(app: FastAPI, front: WritingFront) -> dict[str, Any]:
    """The OpenAPI schema with the limits of this server, and what an event of a stream holds."""

    def limited(parts: dict[str, Any]) -> None:
        found = parts["Prompts"]["properties"]
        for node in found["prompt"]["anyOf"]:
            text = node.get("items", node)
            text["maxLength"] = front.door.limits.max_chars
            if node is not text:
                node["maxItems"] = front.door.limits.max_texts
        found["max_new_tokens"]["maximum"] = front.info.max_context - 1
        parts["WrittenToken"] = WrittenToken.model_json_schema()

    return plain_schema(app, limited)
