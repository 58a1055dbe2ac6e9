"""What every HTTP side has: refusals, the gate that reads bodies within limits and counts, the page, ending."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rl_exit.pages import asset
from rl_exit.serving.metrics import RequestMetrics
from rl_exit.serving.schema import Health, Limits, Problem

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'"
WORDS = {404: "not_found", 405: "wrong_method"}
GONE = 499  # the client went away
DROPPED = 64 << 20  # bytes of a refused body that are read all the same
DROPPING = 5.0  # seconds that they may take

Found = TypeVar("Found")


class Refusal(Exception):
    """A request that is answered with a status and a :class:`Problem`."""

    def __init__(self, status: int, error: str, message: str, where: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.problem = Problem(error=error, message=message, where=where)


class Gone(Exception):
    """The client went away; nobody reads an answer."""


class Door:
    """Who is inside, and whether the server ends.

    Args:
        metrics: Where requests are counted.
        limits: What is accepted.
        paths: Paths that are counted by name.

    Attributes:
        draining: Whether no further requests are let in.
        open_requests: Requests that are not answered yet.
        inside: Texts that are not answered yet.
    """

    def __init__(self, metrics: RequestMetrics, limits: Limits, paths: frozenset[str]) -> None:
        self.metrics = metrics
        self.limits = limits
        self.paths = paths
        self.draining = False
        self.open_requests = 0
        self.inside = 0

    async def drain(self, timeout: float) -> int:
        """Let no further request in, wait for those inside; returns how many are left after ``timeout`` seconds."""
        self.draining = True
        until = time.monotonic() + timeout
        while self.open_requests and time.monotonic() < until:
            await asyncio.sleep(0.02)
        return self.open_requests

    @contextmanager
    def room(self, count: int) -> Iterator[None]:
        """Room for some texts as long as this lasts.

        Raises:
            Refusal: There is none.
        """
        if self.inside + count > self.limits.max_waiting:
            raise Refusal(503, "busy", f"{self.inside} texts are waiting; try again later")
        self._change(count)
        try:
            yield
        finally:
            self._change(-count)

    def _change(self, count: int) -> None:
        self.inside += count
        self.metrics.inside.set(self.inside)


class Asked(Protocol):
    """A backend that can be asked how its replicas stand."""

    async def states(self) -> dict[str, dict[str, Any]]:
        """By replica, what it says of itself; of those that can be asked."""


def add_common(app: FastAPI, door: Door, backend: Callable[[], Asked], page: Mapping[str, tuple[str, str]]) -> None:
    """Health, metrics, the page, what errors look like, and the gate.

    Args:
        app: Where to.
        door: Of this server.
        backend: Gives who answers.
        page: Path to file in ``templates/`` and its content type.
    """

    @app.get("/healthz", response_model=Health, responses={503: {"model": Health}}, summary="Whether texts are taken")
    async def health(response: Response) -> dict[str, str]:
        if door.draining:
            response.status_code = 503
            return {"status": "draining"}
        if not await backend().states():
            response.status_code = 503
            return {"status": "no replica answers"}
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, summary="Metrics for Prometheus")
    async def metrics() -> Response:
        for name, state in (await backend().states()).items():
            door.metrics.replica(name, state)
        return Response(door.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, (file, kind) in page.items():
        app.add_api_route(path, _page(file, kind), include_in_schema=False)
    app.add_exception_handler(Gone, _nobody)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _other)
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(404, _other)
    app.add_exception_handler(405, _other)
    app.add_middleware(_Gate, door=door)


def problems(**more: str) -> dict[int | str, dict[str, Any]]:
    """What the schema says of refusals; ``more`` by status in words of this server, e.g. ``s422="..."``."""
    said = {
        "s400": "Not JSON, or not UTF-8.",
        "s408": "The body did not come in time.",
        "s413": "Longer or more than accepted.",
        "s415": "Not application/json.",
        "s503": "Too many texts are waiting, or the server ends.",
        "s504": "Not answered in time.",
        **more,
    }
    return {int(status[1:]): {"model": Problem, "description": text} for status, text in sorted(said.items())}


def plain_schema(app: FastAPI, finish: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The OpenAPI schema of an application, made once.

    Args:
        app: Whose.
        finish: Given the schemas by name, to add what pydantic does not know.
    """
    if app.openapi_schema is None:
        tree = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        parts = tree["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            parts.pop(unused, None)
        finish(parts)
        app.openapi_schema = tree
    return app.openapi_schema


def _page(file: str, kind: str) -> Callable[[], Any]:
    content = asset(file)

    async def page() -> Response:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(content, media_type=kind, headers=headers)

    return page


def _problem(status: int, problem: Problem) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(problem.model_dump(), status, headers)


async def unless_gone(work: Awaitable[Found], request: Request) -> Found:
    """Wait for work as long as the client does; ends the work where it goes away.

    Raises:
        Gone: It did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(client_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        await end_all(task, gone)


async def client_gone(receive: Receive) -> None:
    """Until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def end_all(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)  # seen by the metrics alone


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _problem(error.status, error.problem)


async def _invalid(request: Request, error: Exception) -> Response:
    """What pydantic found, without the input: it may be long, or no valid text."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return _problem(400, Problem(error="not_json", message=f"the body is not JSON: {reason}"))
    where = ""
    for part in first["loc"][1:]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    where = where.encode("utf-8", "replace").decode()[:100]
    more = len(error.errors()) - 1
    message = f"{where or 'body'}: {first['msg'].removeprefix('Value error, ')}" + (
        f" (and {more} more)" if more else ""
    )
    return _problem(422, Problem(error="wrong_form", message=message, where=where or None))


async def _other(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    if status == 400:  # the body could not be read: not UTF-8, nested too deeply, a number too long
        return _problem(400, Problem(error="not_json", message="the body is not JSON in UTF-8"))
    return _problem(
        status, Problem(error=WORDS.get(status, "refused"), message=str(getattr(error, "detail", "refused")))
    )


async def _failed(request: Request, error: Exception) -> Response:
    """Our own fault; what exactly is in the log, not in the answer."""
    return _problem(500, Problem(error="internal", message="the server failed at this request"))


class _Gate:
    """Reads the body up to the limit before anything else does, refuses what is too large, and counts.

    What is refused by its head alone is still read and dropped, within limits: a client that sends while the connection
    is closed sees a broken pipe in place of the answer.
    """

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        door, started, status = self._door, time.perf_counter(), 500
        door.open_requests += 1

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["method"] in ("GET", "HEAD"):
                await self._app(scope, receive, watched)
                return
            try:
                body = await self._body(scope, receive)
            except Refusal as refusal:
                await _problem(refusal.status, refusal.problem)(scope, receive, watched)
                return
            if body is None:
                status = GONE  # seen by the metrics alone
                return
            await self._app(scope, _replay(body, receive), watched)
        finally:
            door.open_requests -= 1
            path = scope["path"] if scope["path"] in door.paths else "other"
            door.metrics.requests.labels(path, str(status)).inc()
            if path.startswith("/v1"):
                door.metrics.seconds.labels(path).observe(time.perf_counter() - started)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None where the client went away."""
        most, headers = self._door.limits.max_body, dict(scope["headers"])
        refusal = self._refused(scope, headers)
        waits = headers.get(b"expect", b"").lower() == b"100-continue"
        if refusal is not None and (waits or _length(headers) > DROPPED):
            raise refusal  # the client waits for word before it sends, or sends more than is worth reading
        patience = self._door.limits.timeout
        try:
            async with asyncio.timeout(patience if refusal is None else min(patience, DROPPING)):
                body = await self._read(receive, most if refusal is None else 0)
        except TimeoutError:
            message = f"the body was not there within {patience:g} seconds"
            raise refusal or Refusal(408, "slow_body", message) from None
        if body is None:
            return None
        if refusal is not None or len(body) > most:
            raise refusal or _too_large(most)
        return body

    def _refused(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Refusal | None:
        """Why a request is refused by its head alone."""
        door = self._door
        if door.draining:
            return Refusal(503, "ending", "the server ends and takes no further requests")
        given = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if scope["path"] in door.paths and scope["method"] == "POST" and given != b"application/json":
            shown = given.decode("latin-1")[:60] or "none"
            return Refusal(415, "wrong_type", f"content type {shown}; accepted: application/json")
        return _too_large(door.limits.max_body) if _length(headers) > door.limits.max_body else None

    @staticmethod
    async def _read(receive: Receive, most: int) -> bytes | None:
        """The body, of one that is larger than ``most`` its beginning, more than that; None where the client left."""
        body, dropped = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            if len(body) > most:
                dropped += len(part)
            else:
                body += part
            if dropped > DROPPED or not message.get("more_body", False):
                return bytes(body)


def _length(headers: Mapping[bytes, bytes]) -> int:
    """Bytes that the head of a request announces; 0: it does not say."""
    length = headers.get(b"content-length", b"0")
    return int(length) if length.isdigit() else 0


def _too_large(most: int) -> Refusal:
    return Refusal(413, "body_too_large", f"the body is larger than the {most} bytes that are accepted")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then whatever comes after it (that the client went away)."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
