"""The HTTP API and the page at ``/``: a FastAPI application over whatever answers (:class:`Backend`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rl_exit import __version__
from rl_exit.errors import ConfigError, DataError
from rl_exit.pages import asset
from rl_exit.serving.metrics import Metrics
from rl_exit.serving.schema import (
    Answer,
    Answers,
    Explanation,
    Health,
    Limits,
    ManyTexts,
    ModelAnswer,
    ModelInfo,
    OneText,
    Problem,
    Wish,
    unknown_point,
)

PAGE = {
    "/": ("serve.html", "text/html"),
    "/page.js": ("serve.js", "text/javascript"),
    "/page.css": ("serve.css", "text/css"),
}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'"
WORDS = {404: "not_found", 405: "wrong_method"}


class Backend(Protocol):
    """Who answers: a :class:`rl_exit.serving.service.ModelService`, or replicas of it."""

    async def answer(self, texts: Sequence[str], pairs: Sequence[str] | None, wish: Wish) -> list[dict[str, Any]]:
        """See :meth:`rl_exit.serving.service.ModelService.answer`."""

    async def explain(self, text: str, pair: str | None, wish: Wish) -> dict[str, Any]:
        """See :meth:`rl_exit.serving.service.ModelService.explain`."""

    async def states(self) -> dict[str, dict[str, Any]]:
        """By replica, what :meth:`rl_exit.serving.service.ModelService.state` says; of those that can be asked."""


class Refusal(Exception):
    """A request that is answered with a status and a :class:`Problem`."""

    def __init__(self, status: int, error: str, message: str, where: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.problem = Problem(error=error, message=message, where=where)


class Front:
    """State of the HTTP side: what is inside, and whether the server ends.

    Args:
        backend: Who answers.
        info: What clients are told.
        limits: What is accepted.
    """

    def __init__(self, backend: Backend, info: ModelInfo, limits: Limits) -> None:
        self.backend = backend
        self.info = info
        self.limits = limits
        self.metrics = Metrics(info.num_layers)
        self.draining = False
        self.open_requests = 0
        self._texts_inside = 0

    async def drain(self, timeout: float) -> int:
        """Let no further request in, wait for those inside; returns how many are left after ``timeout`` seconds."""
        self.draining = True
        until = time.monotonic() + timeout
        while self.open_requests and time.monotonic() < until:
            await asyncio.sleep(0.02)
        return self.open_requests

    async def answers(self, texts: Sequence[str], pairs: Sequence[str] | None, wish: Wish) -> list[dict[str, Any]]:
        """Answers of the backend, within the limits.

        Raises:
            Refusal: Over a limit, or an unknown operating point.
        """
        self._check(texts, pairs, wish)
        found = await self._inside(len(texts), self.backend.answer(texts, pairs, wish))
        self.metrics.answered(found)
        return found

    async def explanation(self, text: str, pair: str | None, wish: Wish) -> dict[str, Any]:
        """The backend's explanation, within the limits.

        Raises:
            Refusal: As :meth:`answers`.
        """
        self._check([text], None if pair is None else [pair], wish)
        return await self._inside(1, self.backend.explain(text, pair, wish))

    def _check(self, texts: Sequence[str], pairs: Sequence[str] | None, wish: Wish) -> None:
        limits = self.limits
        if len(texts) > limits.max_texts:
            message = f"{len(texts)} texts; accepted: at most {limits.max_texts} in one request"
            raise Refusal(413, "too_many_texts", message, "texts")
        for name, found in (("text", texts), ("text_pair", pairs or ())):
            for index, text in enumerate(found):
                where = name if len(texts) == 1 else f"{name}s[{index}]"
                if len(text) > limits.max_chars:
                    message = f"{where} has {len(text)} characters; accepted: at most {limits.max_chars}"
                    raise Refusal(413, "text_too_long", message, where)
                if not text.strip():
                    raise Refusal(422, "blank_text", f"{where} is blank; a text is expected", where)
        if wish.operating_point is not None and wish.operating_point not in self.info.operating_points:
            message = unknown_point(wish.operating_point, self.info.operating_points)
            raise Refusal(422, "unknown_operating_point", message, "operating_point")
        if wish.speed is not None and not self.info.has_dial:
            raise Refusal(422, "no_dial", "speed: this model has no dial; 'rl-exit dial' trains one", "speed")

    async def _inside(self, count: int, work: Any) -> Any:
        if self._texts_inside + count > self.limits.max_waiting:
            work.close()
            raise Refusal(503, "busy", f"{self._texts_inside} texts are waiting; try again later")
        self._texts_inside += count
        self.metrics.inside.set(self._texts_inside)
        try:
            return await asyncio.wait_for(work, self.limits.timeout)
        except TimeoutError:
            raise Refusal(504, "timeout", f"no answer within {self.limits.timeout:g} seconds") from None
        except (ConfigError, DataError) as error:
            raise Refusal(422, "refused", str(error)) from None
        finally:
            self._texts_inside -= count
            self.metrics.inside.set(self._texts_inside)


def build_app(front: Front) -> FastAPI:
    """The application; its OpenAPI schema, with the limits, is at ``/openapi.json``."""
    app = FastAPI(
        title="rl-exit",
        version=__version__,
        description="Texts in, labels out, each from the layer at which it left the model.",
        docs_url=None,  # The usual page of documentation loads scripts from elsewhere.
        redoc_url=None,
    )
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": text}
        for status, text in (
            (400, "Not JSON, or not UTF-8."),
            (413, "Longer or more than accepted."),
            (415, "Not application/json."),
            (422, "JSON of another form, a blank text, or an unknown operating point."),
            (503, "Too many texts are waiting, or the server ends."),
            (504, "Not answered in time."),
        )
    }

    @app.post("/v1/predict", response_model=Answer, responses=problems, summary="Label a text")
    async def predict(body: OneText) -> dict[str, Any]:
        pairs = None if body.text_pair is None else [body.text_pair]
        return (await front.answers([body.text], pairs, _wish(body)))[0]

    @app.post("/v1/predict/batch", response_model=Answers, responses=problems, summary="Label several texts")
    async def predict_batch(body: ManyTexts) -> dict[str, Any]:
        return {"predictions": await front.answers(body.texts, body.text_pairs, _wish(body))}

    @app.post("/v1/explain", response_model=Explanation, responses=problems, summary="A text, layer by layer")
    async def explain(body: OneText) -> dict[str, Any]:
        return await front.explanation(body.text, body.text_pair, _wish(body))

    @app.get("/v1/model", response_model=ModelAnswer, summary="The model and the limits")
    async def model() -> dict[str, Any]:
        limits = front.limits
        sizes = {"max_chars": limits.max_chars, "max_texts": limits.max_texts, "max_body": limits.max_body}
        return {**asdict(front.info), **sizes}

    @app.get("/healthz", response_model=Health, responses={503: {"model": Health}}, summary="Whether texts are taken")
    async def health(response: Response) -> dict[str, str]:
        if front.draining:
            response.status_code = 503
            return {"status": "draining"}
        if not await front.backend.states():
            response.status_code = 503
            return {"status": "no replica answers"}
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, summary="Metrics for Prometheus")
    async def metrics() -> Response:
        for name, state in (await front.backend.states()).items():
            front.metrics.replica(name, state)
        return Response(front.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, (file, kind) in PAGE.items():
        app.add_api_route(path, _page(file, kind), include_in_schema=False)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _other)
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(404, _other)
    app.add_exception_handler(405, _other)
    app.openapi = lambda: _schema(app, front.limits)  # type: ignore[method-assign]
    app.add_middleware(_Gate, front=front)
    return app


def _wish(body: OneText | ManyTexts) -> Wish:
    return Wish(body.operating_point, body.threshold, body.speed)


def _page(file: str, kind: str) -> Callable[[], Any]:
    content = asset(file)

    async def page() -> Response:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(content, media_type=kind, headers=headers)

    return page


def _problem(status: int, problem: Problem) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(problem.model_dump(), status, headers)


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


def _schema(app: FastAPI, limits: Limits) -> dict[str, Any]:
    """The OpenAPI schema with the limits of this server."""
    from fastapi.openapi.utils import get_openapi

    if app.openapi_schema is None:
        tree = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        parts = tree["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            parts.pop(unused, None)
        for found in (*parts["OneText"]["properties"].values(), *parts["ManyTexts"]["properties"].values()):
            _limit(found, limits)
        app.openapi_schema = tree
    return app.openapi_schema


def _limit(node: dict[str, Any], limits: Limits) -> None:
    for other in node.get("anyOf", ()):
        _limit(other, limits)
    if node.get("type") == "array":
        node["maxItems"] = limits.max_texts
        _limit(node["items"], limits)
    elif node.get("type") == "string" and "minLength" in node:
        node["maxLength"] = limits.max_chars


class _Gate:
    """Reads the body up to the limit before anything else does, refuses at once what is too large, and counts."""

    def __init__(self, app: ASGIApp, front: Front) -> None:
        self._app = app
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        front, started, status = self._front, time.perf_counter(), 500
        front.open_requests += 1

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
            if body is not None:
                await self._app(scope, _replay(body, receive), watched)
        finally:
            front.open_requests -= 1
            path = scope["path"] if scope["path"] in _COUNTED else "other"
            front.metrics.requests.labels(path, str(status)).inc()
            if path.startswith("/v1"):
                front.metrics.seconds.labels(path).observe(time.perf_counter() - started)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None where the client went away."""
        front, most = self._front, self._front.limits.max_body
        if front.draining:
            raise Refusal(503, "ending", "the server ends and takes no further requests")
        headers = dict(scope["headers"])
        given = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if scope["path"] in _COUNTED and scope["method"] == "POST" and given != b"application/json":
            shown = given.decode("latin-1")[:60] or "none"
            raise Refusal(415, "wrong_type", f"content type {shown}; accepted: application/json")
        too_large = Refusal(413, "body_too_large", f"the body is larger than the {most} bytes that are accepted")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)


_COUNTED = frozenset({"/v1/predict", "/v1/predict/batch", "/v1/explain", "/v1/model", "/healthz", "/metrics", *PAGE})


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
