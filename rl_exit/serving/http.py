"""The HTTP API of classifiers: a FastAPI application over whatever answers (:class:`Backend`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request

from rl_exit import __version__
from rl_exit.errors import ConfigError, DataError
from rl_exit.serving.metrics import Metrics
from rl_exit.serving.schema import (
    Answer,
    Answers,
    Explanation,
    Limits,
    ManyTexts,
    ModelAnswer,
    ModelInfo,
    OneText,
    Wish,
    unknown_point,
)
from rl_exit.serving.web import Door, Refusal, add_common, plain_schema, problems, unless_gone

PAGE = {
    "/": ("serve.html", "text/html"),
    "/page.js": ("serve.js", "text/javascript"),
    "/page.css": ("serve.css", "text/css"),
}
PATHS = frozenset({"/v1/predict", "/v1/predict/batch", "/v1/explain", "/v1/model", "/healthz", "/metrics", *PAGE})

Found = TypeVar("Found")


class Backend(Protocol):
    """Who answers: a :class:`rl_exit.serving.service.ModelService`, or replicas of it."""

    async def answer(self, texts: Sequence[str], pairs: Sequence[str] | None, wish: Wish) -> list[dict[str, Any]]:
        """See :meth:`rl_exit.serving.service.ModelService.answer`."""

    async def explain(self, text: str, pair: str | None, wish: Wish) -> dict[str, Any]:
        """See :meth:`rl_exit.serving.service.ModelService.explain`."""

    async def states(self) -> dict[str, dict[str, Any]]:
        """By replica, what :meth:`rl_exit.serving.service.ModelService.state` says; of those that can be asked."""


class Front:
    """The HTTP side: checks what comes in and hands it to the backend.

    Args:
        backend: Who answers.
        info: What clients are told.
        limits: What is accepted.

    Attributes:
        door: Who is inside.
    """

    def __init__(self, backend: Backend, info: ModelInfo, limits: Limits) -> None:
        self.backend = backend
        self.info = info
        self.metrics = Metrics(info.num_layers)
        self.door = Door(self.metrics, limits, PATHS)

    async def answers(self, texts: Sequence[str], pairs: Sequence[str] | None, wish: Wish) -> list[dict[str, Any]]:
        """Answers of the backend, within the limits.

        Raises:
            Refusal: Over a limit, or an unknown operating point.
        """
        self._check(texts, pairs, wish)
        found = await self._inside(len(texts), lambda: self.backend.answer(texts, pairs, wish))
        self.metrics.answered(found)
        return found

    async def explanation(self, text: str, pair: str | None, wish: Wish) -> dict[str, Any]:
        """The backend's explanation, within the limits.

        Raises:
            Refusal: As :meth:`answers`.
        """
        self._check([text], None if pair is None else [pair], wish)
        return await self._inside(1, lambda: self.backend.explain(text, pair, wish))

    def _check(self, texts: Sequence[str], pairs: Sequence[str] | None, wish: Wish) -> None:
        limits = self.door.limits
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

    async def _inside(self, count: int, work: Callable[[], Awaitable[Found]]) -> Found:
        timeout = self.door.limits.timeout
        with self.door.room(count):
            try:
                async with asyncio.timeout(timeout):
                    return await work()
            except TimeoutError:
                raise Refusal(504, "timeout", f"no answer within {timeout:g} seconds") from None
            except (ConfigError, DataError) as error:
                raise Refusal(422, "refused", str(error)) from None


def build_app(front: Front) -> FastAPI:
    """The application; its OpenAPI schema, with the limits, is at ``/openapi.json``."""
    app = FastAPI(
        title="rl-exit",
        version=__version__,
        description="Texts in, labels out, each from the layer at which it left the model.",
        docs_url=None,  # The usual page of documentation loads scripts from elsewhere.
        redoc_url=None,
    )
    refusals = problems(s422="JSON of another form, a blank text, or an unknown operating point.")

    @app.post("/v1/predict", response_model=Answer, responses=refusals, summary="Label a text")
    async def predict(body: OneText, request: Request) -> dict[str, Any]:
        pairs = None if body.text_pair is None else [body.text_pair]
        return (await unless_gone(front.answers([body.text], pairs, _wish(body)), request))[0]

    @app.post("/v1/predict/batch", response_model=Answers, responses=refusals, summary="Label several texts")
    async def predict_batch(body: ManyTexts, request: Request) -> dict[str, Any]:
        return {"predictions": await unless_gone(front.answers(body.texts, body.text_pairs, _wish(body)), request)}

    @app.post("/v1/explain", response_model=Explanation, responses=refusals, summary="A text, layer by layer")
    async def explain(body: OneText, request: Request) -> dict[str, Any]:
        return await unless_gone(front.explanation(body.text, body.text_pair, _wish(body)), request)

    @app.get("/v1/model", response_model=ModelAnswer, summary="The model and the limits")
    async def model() -> dict[str, Any]:
        limits = front.door.limits
        sizes = {"max_chars": limits.max_chars, "max_texts": limits.max_texts, "max_body": limits.max_body}
        return {**asdict(front.info), **sizes}

    add_common(app, front.door, lambda: front.backend, PAGE)
    app.openapi = lambda: _schema(app, front.door.limits)  # type: ignore[method-assign]
    return app


def _wish(body: OneText | ManyTexts) -> Wish:
    return Wish(body.operating_point, body.threshold, body.speed)


def _schema(app: FastAPI, limits: Limits) -> dict[str, Any]:
    """The OpenAPI schema with the limits of this server."""

    def limited(parts: dict[str, Any]) -> None:
        for found in (*parts["OneText"]["properties"].values(), *parts["ManyTexts"]["properties"].values()):
            _limit(found, limits)

    return plain_schema(app, limited)


def _limit(node: dict[str, Any], limits: Limits) -> None:
    for other in node.get("anyOf", ()):
        _limit(other, limits)
    if node.get("type") == "array":
        node["maxItems"] = limits.max_texts
        _limit(node["items"], limits)
    elif node.get("type") == "string" and "minLength" in node:
        node["maxLength"] = limits.max_chars
