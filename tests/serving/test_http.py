"""The HTTP API over a model in this process: answers, limits, refusals, metrics, ending."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from rl_exit import EarlyExitModel
from rl_exit.criteria import Fixed
from rl_exit.errors import ConfigError
from rl_exit.serving.http import Front, build_app
from rl_exit.serving.pool import PoolRules
from rl_exit.serving.schema import Limits, ModelInfo
from rl_exit.serving.service import ModelService, run_together

LIMITS = Limits(max_chars=200, max_texts=4, max_body=2000, max_waiting=8, timeout=20.0)


@pytest.fixture(scope="module")
def service(tiny_backbone: Path) -> Iterator[ModelService]:
    made = ModelService(EarlyExitModel.from_backbone(str(tiny_backbone), ["animal", "tool"]), PoolRules())
    yield made
    made.close()


@pytest.fixture
def front(service: ModelService) -> Front:
    model = service.model
    info = ModelInfo("tiny", ["animal", "tool"], model.num_layers, model.max_length, service.operating_points, 0.5)
    return Front(service, info, LIMITS)


@pytest.fixture
def client(front: Front) -> Iterator[TestClient]:
    with TestClient(build_app(front), raise_server_exceptions=False) as made:
        yield made


def test_answers_are_those_of_predict(client: TestClient, service: ModelService) -> None:
    texts = ["the old cat", "a hammer", "my red drill near the dog"]
    expected = service.model.predict(texts)
    batch = client.post("/v1/predict/batch", json={"texts": texts})
    assert batch.status_code == 200
    singles = [client.post("/v1/predict", json={"text": text}).json() for text in texts]
    for answers in (batch.json()["predictions"], singles):
        for answer, one in zip(answers, expected, strict=True):
            assert (answer["label"], answer["label_id"], answer["exit_layer"]) == (
                one.label,
                one.label_id,
                one.exit_layer,
            )
            assert answer["probabilities"] == pytest.approx(one.probabilities, abs=1e-5)
            assert answer["milliseconds"] > 0


def test_settings_of_a_request(client: TestClient, service: ModelService) -> None:
    def layer(**words: Any) -> int:
        return client.post("/v1/predict", json={"text": "cat", **words}).json()["exit_layer"]

    assert layer(threshold=0) == 1 and layer(threshold=1) == service.model.num_layers
    assert layer(operating_point="full-depth") == service.model.num_layers
    pair = {"text": "cat", "text_pair": "saw", "threshold": 1}
    expected = service.model.predict(["cat"], ["saw"], threshold=1.0)[0].probabilities
    assert client.post("/v1/predict", json=pair).json()["probabilities"] == pytest.approx(expected, abs=1e-5)


def test_an_explanation_adds_up(client: TestClient, service: ModelService) -> None:
    found = client.post("/v1/explain", json={"text": "the old cat", "threshold": 0.4}).json()
    assert [layer["layer"] for layer in found["layers"]] == [1, 2, 3]
    assert sum(layer["leaves_here"] for layer in found["layers"]) == pytest.approx(1)
    first = next(layer["layer"] for layer in found["layers"] if layer["exit_probability"] > 0.4)
    assert found["exit_layer"] == first
    assert found["label"] == service.model.predict(["the old cat"], threshold=0.4)[0].label
    assert found["milliseconds"] > 0 and found["full_depth_milliseconds"] > 0


BAD = {
    "not JSON": (b"{text: cat}", 400, "not_json"),
    "cut off": (b'{"text": "ca', 400, "not_json"),
    "nothing": (b"", 422, "wrong_form"),
    "not UTF-8": (b'{"text": "\xff\xfe"}', 400, "not_json"),
    "nested": (b"[" * 900, 400, "not_json"),
    "a number too long": (b'{"text": ' + b"1" * 1500 + b"}", 422, "wrong_form"),
    "another type": (b'{"text": 3}', 422, "wrong_form"),
    "null": (b"null", 422, "wrong_form"),
    "a list": (b'["cat"]', 422, "wrong_form"),
    "empty": (b'{"text": ""}', 422, "wrong_form"),
    "blank": (b'{"text": " \\n"}', 422, "blank_text"),
    "no text": (b"{}", 422, "wrong_form"),
    "unknown key": (b'{"text": "cat", "txt": 1}', 422, "wrong_form"),
    "lone surrogate": (b'{"text": "\\ud800"}', 422, "wrong_form"),
    "lone surrogate as key": (b'{"\\ud800": "cat"}', 422, "wrong_form"),
    "long text": (b'{"text": "' + b"a" * 201 + b'"}', 413, "text_too_long"),
    "large body": (b'{"text": "' + b"a" * 5000 + b'"}', 413, "body_too_large"),
    "unknown point": (b'{"text": "cat", "operating_point": "ful-depth"}', 422, "unknown_operating_point"),
    "both": (b'{"text": "cat", "operating_point": "full-depth", "threshold": 0.5}', 422, "wrong_form"),
    "no dial": (b'{"text": "cat", "speed": 0.5}', 422, "no_dial"),
    "threshold as text": (b'{"text": "cat", "threshold": "0.5"}', 422, "wrong_form"),
    "threshold too high": (b'{"text": "cat", "threshold": 1.5}', 422, "wrong_form"),
    "not a number": (b'{"text": "cat", "threshold": NaN}', 422, "wrong_form"),
    "true": (b'{"text": "cat", "threshold": true}', 422, "wrong_form"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_answered_is_refused_with_a_reason(case: str, client: TestClient) -> None:
    body, status, error = BAD[case]
    refused = client.post("/v1/predict", content=body, headers={"content-type": "application/json"})
    assert (refused.status_code, refused.json()["error"]) == (status, error), refused.text
    assert len(refused.json()["message"]) > 10
    assert client.post("/v1/predict", json={"text": "cat"}).status_code == 200, "the service goes on"


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({"texts": []}, 422, "wrong_form"),
        ({"texts": "cat"}, 422, "wrong_form"),
        ({"texts": ["cat", None]}, 422, "wrong_form"),
        ({"texts": ["cat"] * 5}, 413, "too_many_texts"),
        ({"texts": ["cat", " "]}, 422, "blank_text"),
        ({"texts": ["cat", "dog"], "text_pairs": ["saw"]}, 422, "wrong_form"),
        ({"texts": ["cat"] * 600}, 413, "body_too_large"),
    ],
)
def test_batches_that_cannot_be_answered(client: TestClient, body: dict[str, Any], status: int, error: str) -> None:
    refused = client.post("/v1/predict/batch", json=body)
    assert (refused.status_code, refused.json()["error"]) == (status, error), refused.text


def test_messages_say_where_and_what_is_accepted(client: TestClient) -> None:
    message = client.post("/v1/predict/batch", json={"texts": ["cat", 3]}).json()
    assert message["where"] == "texts[1]" and "string" in message["message"]
    message = client.post("/v1/predict", json={"text": "cat", "operating_point": "ful-depth"}).json()
    assert "accepted: full-depth" in message["message"] and "Did you mean 'full-depth'?" in message["message"]


def test_other_types_paths_and_methods(client: TestClient) -> None:
    assert client.post("/v1/predict", content=b"text=cat").status_code == 415
    assert client.post("/v1/predict", data={"text": "cat"}).json()["error"] == "wrong_type"
    assert client.get("/v1/nothing").json()["error"] == "not_found"
    assert client.get("/v1/predict").json()["error"] == "wrong_method"
    assert client.post("/", json={}).status_code == 405


def test_the_schema_names_the_limits(client: TestClient) -> None:
    tree = client.get("/openapi.json").json()
    one, many = (tree["components"]["schemas"][name]["properties"] for name in ("OneText", "ManyTexts"))
    assert one["text"]["maxLength"] == LIMITS.max_chars
    assert many["texts"]["maxItems"] == LIMITS.max_texts and many["texts"]["items"]["maxLength"] == LIMITS.max_chars
    assert {"400", "413", "422"} <= tree["paths"]["/v1/predict"]["post"]["responses"].keys()
    assert client.get("/v1/model").json()["max_texts"] == LIMITS.max_texts


def test_metrics_count_layers_latency_and_queue(client: TestClient) -> None:
    for threshold in (0, 0, 1):
        client.post("/v1/predict", json={"text": "cat", "threshold": threshold})
    client.post("/v1/predict", json={})
    found = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert found['rl_exit_texts_left_total{layer="1"}'] == "2.0"
    assert found['rl_exit_texts_left_total{layer="3"}'] == "1.0"
    assert found['rl_exit_requests_total{path="/v1/predict",status="200"}'] == "3.0"
    assert found['rl_exit_requests_total{path="/v1/predict",status="422"}'] == "1.0"
    assert found['rl_exit_request_seconds_count{path="/v1/predict"}'] == "4.0"
    assert found['rl_exit_texts_waiting{layer="1",replica="1"}'] == "0.0"
    assert float(found['rl_exit_replica_steps{replica="1"}']) >= 5


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    for path in ("/", "/page.js", "/page.css"):
        assert "http://" not in client.get(path).text and "https://" not in client.get(path).text


def test_too_many_waiting_texts_are_refused_and_late_ones_given_up(front: Front, service: ModelService) -> None:
    front.door.limits = Limits(max_waiting=2, timeout=0.2)
    with TestClient(build_app(front)) as client:
        free = threading.Event()
        service.engine.call(lambda: free.wait(10))
        late: list[Any] = []
        thread = threading.Thread(
            target=lambda: late.append(client.post("/v1/predict/batch", json={"texts": ["a", "b"]}))
        )
        thread.start()
        until = time.monotonic() + 5
        while not front.door.inside and time.monotonic() < until:
            time.sleep(0.01)
        busy = client.post("/v1/predict", json={"text": "cat"})
        assert (busy.status_code, busy.json()["error"], busy.headers["retry-after"]) == (503, "busy", "1")
        thread.join()
        free.set()
        assert late[0].status_code == 504
        front.door.limits = LIMITS
        assert client.post("/v1/predict", json={"text": "cat"}).status_code == 200


def test_ending_answers_what_is_open_and_takes_no_more(front: Front) -> None:
    async def scenario() -> tuple[int, int, int]:
        sent: list[dict[str, Any]] = []

        async def call(path: str, method: str, body: bytes = b"") -> int:
            messages: list[Any] = []
            scope = {
                "type": "http",
                "method": method,
                "path": path,
                "headers": [(b"content-type", b"application/json")],
                "query_string": b"",
                "http_version": "1.1",
            }

            parts = [{"type": "http.request", "body": body}]

            async def receive() -> dict[str, Any]:
                if not parts:
                    await asyncio.sleep(60)  # the client stays
                return parts.pop()

            async def send(message: Any) -> None:
                messages.append(message)

            await app(scope, receive, send)
            sent.append(messages[-1])
            return int(messages[0]["status"])

        app = build_app(front)
        opened = asyncio.create_task(call("/v1/predict", "POST", json.dumps({"text": "cat"}).encode()))
        while not front.door.open_requests:
            await asyncio.sleep(0)
        left = await front.door.drain(5.0)
        refused = await call("/v1/predict", "POST", b'{"text": "cat"}')
        assert await call("/healthz", "GET") == 503
        return await opened, left, refused

    assert asyncio.run(scenario()) == (200, 0, 503)


@pytest.mark.parametrize("announced", [True, False])
def test_a_client_that_sends_too_much_reads_why(front: Front, announced: bool) -> None:
    """It sends all before it reads anything: closed earlier, it would see a broken pipe."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(front), lifespan="off", log_config=None))
    thread = threading.Thread(target=lambda: server.run([listening]), daemon=True)
    thread.start()
    body = b'{"text": "' + b"a" * 6_000_000 + b'"}'
    if announced:
        size = b"content-length: %d" % len(body)
    else:
        size, body = b"transfer-encoding: chunked", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    head = b"POST /v1/predict HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"  # as urllib does
    head += b"content-type: application/json\r\n%s\r\n\r\n" % size
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    with socket.create_connection(listening.getsockname(), timeout=20) as client:
        client.sendall(head)
        for start in range(0, len(body), 100_000):
            client.sendall(body[start : start + 100_000])
            time.sleep(0.001)
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(listening.getsockname(), timeout=20) as client:
        client.sendall(head.replace(b"host", b"expect: 100-continue\r\nhost") if announced else head + body)
        assert client.recv(100).startswith(b"HTTP/1.1 413 "), "who asks before sending is told at once"
    server.should_exit = True
    thread.join(20)


@pytest.mark.parametrize("leaves", [False, True])
def test_a_body_that_does_not_end_is_given_up(front: Front, leaves: bool) -> None:
    front.door.limits = Limits(timeout=0.05)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"100")]
    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": headers, "query_string": b""}
    messages: list[Any] = []
    parts = [{"type": "http.request", "body": b'{"text"', "more_body": True}]

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await asyncio.sleep(0 if leaves else 60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(build_app(front)(scope, receive, send))
    assert front.door.open_requests == 0
    counted = 'rl_exit_requests_total{path="/v1/predict",status="%d"} 1.0'
    if leaves:
        assert messages == [] and counted % 499 in front.metrics.text().decode()
    else:
        assert messages[0]["status"] == 408 and json.loads(messages[1]["body"])["error"] == "slow_body"
        assert counted % 408 in front.metrics.text().decode()


def test_plain_batching_gives_the_same_answers(service: ModelService) -> None:
    from rl_exit.serving.schema import Wish

    texts = [["the old cat", "a"], ["my red drill near the dog"], ["saw"]]
    rules = [service.rule_for(Wish(threshold=t)) for t in (0.4, 0.4, 1.0)]
    found = run_together(
        service.model, [(service.texts.tokenised(part, None), rule) for part, rule in zip(texts, rules, strict=True)]
    )
    for part, threshold, left in zip(texts, (0.4, 0.4, 1.0), found, strict=True):
        for answer, one in zip(service.texts.told(left), service.model.predict(part, threshold=threshold), strict=True):
            assert answer["exit_layer"] == one.exit_layer
            assert answer["probabilities"] == pytest.approx(one.probabilities, abs=1e-5)


def test_limits_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_texts = 0"):
        Limits(max_texts=0)


def test_a_failure_of_the_model_is_a_500_with_a_message_and_no_details(front: Front) -> None:
    class Broken:
        async def answer(self, *words: Any) -> Any:
            raise ZeroDivisionError("secret")

    front.backend = Broken()  # type: ignore[assignment]
    with TestClient(build_app(front), raise_server_exceptions=False) as client:
        failed = client.post("/v1/predict", json={"text": "cat"})
    assert failed.status_code == 500 and failed.json()["error"] == "internal" and "secret" not in failed.text


def test_a_client_that_leaves_is_not_worked_for(front: Front, service: ModelService) -> None:
    free = threading.Event()
    service.engine.call(lambda: free.wait(20))
    body = json.dumps({"texts": ["the old cat", "saw"]}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/predict/batch", "headers": headers, "query_string": b""}
    sent: list[Any] = []

    async def ask() -> None:
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            part = next(parts, None)
            if part is None:
                while front.door.inside == 0:
                    await asyncio.sleep(0.01)
                return {"type": "http.disconnect"}
            return part

        async def send(message: Any) -> None:
            sent.append(message)

        async with asyncio.timeout(10):
            await build_app(front)(scope, receive, send)

    before = service.engine.counts.rows
    asyncio.run(ask())
    assert front.door.inside == 0 and sent[0]["status"] == 499
    free.set()
    assert service.engine.submit(service.texts.tokenised(["the old cat"], None), Fixed(1)).result(10)
    assert service.engine.counts.rows == before + 1, "its texts were dropped"
