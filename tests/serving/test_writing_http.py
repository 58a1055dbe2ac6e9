"""The HTTP API of a decoder in this process: texts, streams, refusals, clients that go away, metrics, ending."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from test_decoding import worded

from rl_exit.serving.decoding import ContinuousBatch
from rl_exit.serving.schema import Limits, WriteRequest
from rl_exit.serving.writer import WritingService
from rl_exit.serving.writing_http import WritingFront, build_writing_app
from rl_exit.serving.writing_schema import WriterInfo

LIMITS = Limits(max_chars=200, max_texts=4, max_body=2000, max_waiting=8, timeout=20.0)
PROMPTS = ["w5 w6 w7", "w9", "w30 w31 w32 w33 w34 w35"]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def service() -> Iterator[WritingService]:
    made = WritingService(worded("llama", 2), 3, 4096)
    yield made
    made.close()


@pytest.fixture
def front(service: WritingService) -> WritingFront:
    model = service.model
    info = WriterInfo("tiny", 4, list(model.exit_layers), service.capacity, ["full-depth"], 0.5)
    return WritingFront(service, info, LIMITS)


@pytest.fixture
def client(front: WritingFront) -> Iterator[TestClient]:
    with TestClient(build_writing_app(front), raise_server_exceptions=False) as made:
        yield made


def events_of(text: str) -> list[tuple[str, Any]]:
    """What server-sent events say: kind and data of each."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((lines.get("event", "message"), json.loads(lines["data"])))
    return found


def test_texts_are_those_of_generate(client: TestClient, service: WritingService) -> None:
    expected = service.model.generate(PROMPTS, max_new_tokens=12, threshold=0.4, batch_size=1)
    body = {"max_new_tokens": 12, "threshold": 0.4}
    together = client.post("/v1/generate", json={"prompt": PROMPTS, **body})
    assert together.status_code == 200
    singles = [client.post("/v1/generate", json={"prompt": prompt, **body}).json() for prompt in PROMPTS]
    for answers in (together.json()["generations"], singles):
        for answer, one in zip(answers, expected, strict=True):
            for key in ("text", "tokens", "exit_layers", "finish", "mean_exit_layer"):
                assert answer[key] == getattr(one, key)
            assert 0 < answer["first_token_milliseconds"] <= answer["milliseconds"]
    assert len({layer for one in expected for layer in one.exit_layers}) >= 2


def test_drawn_texts_are_those_of_generate_with_the_seed(client: TestClient, service: WritingService) -> None:
    body = {"prompt": PROMPTS[:2], "max_new_tokens": 12, "temperature": 0.9, "top_k": 20, "threshold": 0.4}
    chosen = client.post("/v1/generate", json=body).json()["generations"]
    for prompt, answer in zip(PROMPTS, chosen, strict=False):
        words = {"temperature": 0.9, "top_k": 20, "do_sample": True, "seed": answer["seed"]}
        [one] = service.model.generate(prompt, max_new_tokens=12, threshold=0.4, **words)
        assert answer["text"] == one.text and answer["exit_layers"] == one.exit_layers
    assert chosen[1]["seed"] == chosen[0]["seed"] + 1
    again = client.post("/v1/generate", json={**body, "seed": chosen[0]["seed"]}).json()["generations"]
    assert [one["tokens"] for one in again] == [one["tokens"] for one in chosen]


def test_a_stream_is_the_text_token_by_token(client: TestClient) -> None:
    body = {"prompt": PROMPTS, "max_new_tokens": 12, "threshold": 0.4, "seed": 3}
    whole = client.post("/v1/generate", json=body).json()["generations"]
    streamed = client.post("/v1/generate", json={**body, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = events_of(streamed.text)
    for index, one in enumerate(whole):
        mine = [data for kind, data in events if kind == "message" and data["index"] == index]
        assert [data["token"] for data in mine] == one["tokens"]
        assert [data["exit_layer"] for data in mine] == one["exit_layers"]
        assert "".join(data["text"] for data in mine) == one["text"]
        assert [data["finish"] for data in mine] == [None] * (len(mine) - 1) + [one["finish"]]
    kind, end = events[-1]
    assert kind == "end" and [one["text"] for one in end["generations"]] == [one["text"] for one in whole]


def test_settings_of_a_request(client: TestClient, service: WritingService) -> None:
    def made(**words: Any) -> Any:
        return client.post("/v1/generate", json={"prompt": PROMPTS[0], "max_new_tokens": 8, **words}).json()

    assert set(made(threshold=0)["exit_layers"][1:]) == {1}
    assert set(made(threshold=1)["exit_layers"]) == {4} == set(made(operating_point="full-depth")["exit_layers"])
    word = made(threshold=0.4)["text"].split()[2]
    stopped = made(threshold=0.4, stop_strings=[f" {word}"])
    assert stopped["finish"] == "stop" and f" {word}" not in stopped["text"]
    longest = made(max_new_tokens=service.capacity - 1)
    assert len(longest["tokens"]) == service.capacity - 3, "a text ends where its positions do"
    assert made(prompt="")["error"] == "wrong_form"


BAD: dict[str, tuple[bytes, int, str]] = {
    "not JSON": (b"{prompt: cat}", 400, "not_json"),
    "not UTF-8": (b'{"prompt": "\xff"}', 400, "not_json"),
    "no prompt": (b"{}", 422, "wrong_form"),
    "no prompts": (b'{"prompt": []}', 422, "wrong_form"),
    "another type": (b'{"prompt": 3}', 422, "wrong_form"),
    "one of another type": (b'{"prompt": ["a", 3]}', 422, "wrong_form"),
    "unknown key": (b'{"prompt": "a", "max_tokens": 3}', 422, "wrong_form"),
    "no tokens": (b'{"prompt": "a", "max_new_tokens": 0}', 422, "wrong_form"),
    "half a token": (b'{"prompt": "a", "max_new_tokens": 1.5}', 422, "wrong_form"),
    "many tokens": (b'{"prompt": "a", "max_new_tokens": 1000000}', 422, "too_many_tokens"),
    "cold": (b'{"prompt": "a", "temperature": 0}', 422, "wrong_form"),
    "infinite": (b'{"prompt": "a", "temperature": Infinity}', 422, "wrong_form"),
    "top_p": (b'{"prompt": "a", "top_p": 1.5}', 422, "wrong_form"),
    "negative seed": (b'{"prompt": "a", "seed": -1}', 422, "wrong_form"),
    "drawn and not": (b'{"prompt": "a", "seed": 1, "do_sample": false}', 422, "wrong_form"),
    "blank stop": (b'{"prompt": "a", "stop_strings": [""]}', 422, "wrong_form"),
    "both": (b'{"prompt": "a", "threshold": 0.5, "operating_point": "full-depth"}', 422, "wrong_form"),
    "unknown point": (b'{"prompt": "a", "operating_point": "ful-depth"}', 422, "unknown_operating_point"),
    "stream of nothing": (b'{"prompt": "a", "stream": "yes"}', 422, "wrong_form"),
    "long prompt": (b'{"prompt": "' + b"a" * 201 + b'"}', 413, "text_too_long"),
    "large body": (b'{"prompt": "' + b"a" * 5000 + b'"}', 413, "body_too_large"),
    "many prompts": (json.dumps({"prompt": ["a"] * 5}).encode(), 413, "too_many_texts"),
    "many tokens in a prompt": (json.dumps({"prompt": "a " * 90, "max_new_tokens": 2}).encode(), 200, ""),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_answered_is_refused_with_a_reason(case: str, client: TestClient) -> None:
    body, status, error = BAD[case]
    answered = client.post("/v1/generate", content=body, headers=JSON)
    assert answered.status_code == status, answered.text
    if status != 200:
        assert answered.json()["error"] == error and len(answered.json()["message"]) > 10


def test_a_prompt_that_fills_all_positions_is_refused_before_a_stream_begins(service: WritingService) -> None:
    small = WritingService(service.model, 1, 8)
    info = WriterInfo("tiny", 4, [1, 2, 3, 4], small.capacity, ["full-depth"], 0.5)
    with TestClient(build_writing_app(WritingFront(small, info, LIMITS))) as client:
        for stream in (False, True):
            refused = client.post("/v1/generate", json={"prompt": "w5 " * 8, "max_new_tokens": 2, "stream": stream})
            assert refused.status_code == 422 and "up to 7" in refused.json()["message"]
        assert client.post("/v1/generate", json={"prompt": "w5 " * 7, "max_new_tokens": 2}).json()["finish"] == "length"
    small.close()


def test_the_schema_the_model_the_page_and_the_metrics(client: TestClient, service: WritingService) -> None:
    tree = client.get("/openapi.json").json()
    prompts = tree["components"]["schemas"]["Prompts"]["properties"]
    assert prompts["prompt"]["anyOf"][0]["maxLength"] == 200 and prompts["prompt"]["anyOf"][1]["maxItems"] == 4
    assert prompts["max_new_tokens"]["maximum"] == service.capacity - 1
    answers = tree["paths"]["/v1/generate"]["post"]["responses"]
    assert "text/event-stream" in answers["200"]["content"] and {"413", "422", "503", "504"} <= answers.keys()
    assert client.get("/v1/model").json()["kind"] == "decoder"
    for path in ("/", "/page.js", "/page.css"):
        page = client.get(path)
        assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
        assert "http://" not in page.text and "https://" not in page.text
    client.post("/v1/generate", json={"prompt": "w5", "max_new_tokens": 5, "threshold": 0})
    client.post("/v1/generate", json={"prompt": "w5", "max_new_tokens": 5, "threshold": 1, "stream": True})
    client.post("/v1/generate", json={})
    found = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert found['rl_exit_tokens_total{layer="1"}'] == "4.0" and found['rl_exit_tokens_total{layer="4"}'] == "6.0"
    assert found["rl_exit_first_token_seconds_count"] == "2.0" and found["rl_exit_tokens_per_second"] == "1.0"
    assert found['rl_exit_requests_total{path="/v1/generate",status="200"}'] == "2.0"
    assert found['rl_exit_requests_total{path="/v1/generate",status="422"}'] == "1.0"
    assert found['rl_exit_replica_writing{replica="1"}'] == "0.0"
    assert float(found['rl_exit_replica_row_layers{replica="1"}']) >= 4


async def call(app: Any, body: Any, gone: Callable[[list[Any]], bool] = lambda messages: False) -> list[dict[str, Any]]:
    """One request; the client goes away as soon as ``gone`` says so of what it has received."""
    messages: list[Any] = []
    left = asyncio.Event()
    sent = [json.dumps(body).encode()]
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/generate", "headers": headers, "query_string": b""}

    async def receive() -> dict[str, Any]:
        if sent:
            return {"type": "http.request", "body": sent.pop()}
        while not left.is_set() and not gone(messages):
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)

    await app(scope, receive, send)
    left.set()
    return messages


def test_a_client_that_goes_away_frees_its_row(front: WritingFront, service: WritingService) -> None:
    async def scenario() -> None:
        app = build_writing_app(front)
        for stream in (True, False):
            before = service.state()["tokens"]
            body = {"prompt": "w5", "max_new_tokens": 120, "stream": stream}
            messages = await call(app, body, lambda messages, b=before: service.state()["tokens"] > b + 5)
            until = time.monotonic() + 10
            while service.state()["writing"] and time.monotonic() < until:
                await asyncio.sleep(0.005)
            assert service.state()["writing"] == 0 and service.state()["tokens"] < before + 115
            assert stream or messages[0]["status"] == 499
            assert front.door.inside == front.door.open_requests == 0

    asyncio.run(scenario())


def test_ending_lets_streams_end_and_takes_no_more(front: WritingFront) -> None:
    async def scenario() -> tuple[list[Any], int, int]:
        app = build_writing_app(front)
        opened = asyncio.create_task(call(app, {"prompt": "w5", "max_new_tokens": 30, "stream": True}))
        while not front.door.inside:
            await asyncio.sleep(0)
        left = await front.door.drain(10.0)
        refused = (await call(app, {"prompt": "w5"}))[0]["status"]
        return await opened, left, refused

    messages, left, refused = asyncio.run(scenario())
    text = b"".join(message.get("body", b"") for message in messages).decode()
    assert len(events_of(text)) == 31 and left == 0 and refused == 503


class Slow:
    """A backend that says one token and then nothing, or fails."""

    def __init__(self, failure: Exception | None, at: int) -> None:
        self.failure = failure
        self.at = at
        self.closed = False

    async def stream(self, request: WriteRequest) -> AsyncGenerator[list[dict[str, Any]], None]:
        try:
            for number in range(9):
                if number == self.at:
                    if self.failure is not None:
                        raise self.failure
                    await asyncio.sleep(60)
                yield [{"index": 0, "token": 5, "text": "a", "exit_layer": 1, "finish": None}]
        finally:
            self.closed = True

    async def whole(self, request: WriteRequest) -> list[dict[str, Any]]:
        return [token async for part in self.stream(request) for token in part]

    async def states(self) -> dict[str, dict[str, Any]]:
        return {}


@pytest.mark.parametrize("failure", [None, ZeroDivisionError("secret")])
def test_what_fails_midway_is_told_in_the_stream(front: WritingFront, failure: Exception | None) -> None:
    front.door.limits = Limits(timeout=0.3)
    error, status = ("timeout", 504) if failure is None else ("internal", 500)
    with TestClient(build_writing_app(front), raise_server_exceptions=False) as client:
        for at in (0, 2):
            front.backend = slow = Slow(failure, at)  # type: ignore[assignment]
            answered = client.post("/v1/generate", json={"prompt": "w5", "stream": True})
            assert slow.closed and "secret" not in answered.text
            if at == 0:
                assert (answered.status_code, answered.json()["error"]) == (status, error)
            else:
                events = events_of(answered.text)
                assert [kind for kind, _ in events] == ["message", "message", "error"]
                assert events[-1][1]["error"] == error
        front.backend = Slow(failure, 2)  # type: ignore[assignment]
        answered = client.post("/v1/generate", json={"prompt": "w5"})
        assert (answered.status_code, answered.json()["error"]) == (status, error)


def test_too_many_texts_are_refused(front: WritingFront) -> None:
    front.door.limits = Limits(max_waiting=2)
    with TestClient(build_writing_app(front)) as client:
        busy = client.post("/v1/generate", json={"prompt": PROMPTS})
        assert (busy.status_code, busy.json()["error"], busy.headers["retry-after"]) == (503, "busy", "1")
        assert client.post("/v1/generate", json={"prompt": PROMPTS[:2], "max_new_tokens": 2}).status_code == 200


def test_a_failure_of_the_model_reaches_those_inside_and_the_thread_goes_on(
    service: WritingService, front: WritingFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any) -> Any:
        raise ZeroDivisionError("secret")

    with TestClient(build_writing_app(front), raise_server_exceptions=False) as client:
        with monkeypatch.context() as patch:
            patch.setattr(ContinuousBatch, "turn", broken)
            failed = client.post("/v1/generate", json={"prompt": PROMPTS})
            assert failed.status_code == 500 and "secret" not in failed.text
        assert client.post("/v1/generate", json={"prompt": "w5", "max_new_tokens": 2}).status_code == 200
        assert service.state()["writing"] == 0
