"""rl-exit serve with a decoder as users see it: texts, streams, a replica that dies midway, a client that leaves."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from headless_browser import browsing, found
from ray.exceptions import ActorDiedError, RayTaskError
from server_process import REPLICA, Server, free_port
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from rl_exit import EarlyExitModel
from rl_exit.cli import app
from rl_exit.cluster import replicas
from rl_exit.cluster.replicas import Asking, Writers
from rl_exit.errors import DataError
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.serving.schema import WriteRequest
from rl_exit.serving.web import Refusal

LONG = {"prompt": "w5 w6", "max_new_tokens": 700, "threshold": 0.5, "temperature": 1.0, "top_k": 0, "seed": 3}


class Breaking:
    """A deployment handle whose replicas die after some tokens, each of two texts of nine."""

    def __init__(self, dies_after: list[int]) -> None:
        self.dies_after = dies_after
        self.given: list[list[list[int]]] = []
        self.cancelled = 0

    @property
    def stream(self) -> Breaking:
        return self

    def options(self, stream: bool) -> Breaking:
        assert stream
        return self

    def remote(self, request: WriteRequest) -> Any:
        self.given.append([list(one) for one in request.given])
        return Response(self, [list(one) for one in request.given])


class Response:
    def __init__(self, handle: Breaking, given: list[list[int]]) -> None:
        self.handle = handle
        self.tokens = self._tokens(given)

    def __aiter__(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        return self.tokens

    def cancel(self) -> None:
        self.handle.cancelled += 1

    async def _tokens(self, given: list[list[int]]) -> AsyncGenerator[list[dict[str, Any]], None]:
        left = self.handle.dies_after.pop(0) if self.handle.dies_after else 99
        for number in range(9):
            part = [
                {"index": index, "token": number, "finish": "length" if number == 8 else None}
                for index in range(2)
                if number >= len(given[index])
            ]
            if not part:
                continue
            if not left:
                raise ActorDiedError()
            left -= 1
            yield part
        if left == 0:
            raise ActorDiedError()


async def _all(writers: Writers, request: WriteRequest) -> list[tuple[int, int]]:
    return [(token["index"], token["token"]) async for part in writers.stream(request) for token in part]


def test_a_stream_goes_on_at_another_replica_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "FIRST_WAIT", 0.0)
    whole = sorted((index, number) for index in range(2) for number in range(9))
    request = WriteRequest(["a", "b"], {}, 0)
    for dies_after in ([], [0], [3], [3, 2, 0, 1], [9]):
        handle, retries = Breaking(list(dies_after)), []
        asking = Asking(handle)
        asking.retried = lambda retries=retries: retries.append(1)  # type: ignore[misc]
        assert sorted(asyncio.run(_all(Writers(asking), request))) == whole, "every token once"
        deaths = 0 if dies_after == [9] else len(dies_after)
        assert len(retries) == deaths and len(handle.given) == deaths + 1 == handle.cancelled
        assert handle.given[-1] == [list(range(sum(dies_after) if deaths else 0))] * 2
    with pytest.raises(Refusal, match="30 times"):
        asyncio.run(_all(Writers(Asking(Breaking([0] * 99))), request))


class Waiting:
    """A deployment handle whose replica never answers, or raises what a task raised."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.cancelled = error, 0

    @property
    def whole(self) -> Waiting:
        return self

    def remote(self, *words: Any) -> Waiting:
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    def __await__(self) -> Any:
        if self.error is not None:
            raise self.error
        return asyncio.sleep(60).__await__()


def test_an_answer_that_nobody_waits_for_is_cancelled_at_the_replica() -> None:
    async def late(handle: Waiting) -> None:
        async with asyncio.timeout(0.01):
            await Asking(handle).ask("whole")

    handle = Waiting()
    with pytest.raises(TimeoutError):
        asyncio.run(late(handle))
    assert handle.cancelled == 1


def test_what_a_replica_raises_for_the_user_comes_in_its_words() -> None:
    for cause, kind in ((DataError("too long"), DataError), (KeyError("x"), RayTaskError)):
        raised = RayTaskError("ServeReplica.whole()", "Traceback ...", cause).as_instanceof_cause()
        with pytest.raises(kind) as found:
            asyncio.run(Asking(Waiting(raised)).ask("whole"))
        assert (str(found.value) == "too long") is (kind is DataError)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> EarlyExitCausalModel:
    """A tiny decoder with positions for a text that lasts long enough to be cut, and exits that are used."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, 61))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=None,
    )
    made = EarlyExitCausalModel.from_model(LlamaForCausalLM(config).eval(), tokenizer)
    with torch.no_grad():
        made.policy.weight_out.normal_(0.0, 3.0)
    folder = tmp_path_factory.mktemp("written") / "model"
    made.save_pretrained(folder)
    loaded: EarlyExitCausalModel = EarlyExitModel.from_pretrained(folder)
    return loaded.eval()


def test_what_fits_no_decoder_is_one_message(decoder: EarlyExitCausalModel) -> None:
    folder = str(decoder.config.name_or_path)
    done = CliRunner().invoke(app, ["serve", folder, "--batching", "plain", "--port", str(free_port())])
    assert done.exit_code == 2 and "for classifiers" in done.stderr
    done = CliRunner().invoke(app, ["serve", folder, "--goal-ms", "100", "--port", str(free_port())])
    assert done.exit_code == 2 and "for classifiers" in done.stderr
    done = CliRunner().invoke(app, ["serve", folder, "--max-context", "1", "--port", str(free_port())])
    assert done.exit_code == 2 and "max-context" in done.stderr


@pytest.fixture(scope="module")
def server(decoder: EarlyExitCausalModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(Path(decoder.config.name_or_path), tmp_path_factory.mktemp("log") / "serve.log")
    try:
        made.wait()
        yield made
    finally:
        if made.process.poll() is None:
            made.process.send_signal(signal.SIGTERM)
            made.process.wait(90)


class Stream:
    """A request whose events are read as they come."""

    def __init__(self, port: int, body: Any, stream: bool = True) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=100)
        sent = json.dumps({**body, "stream": stream}).encode()
        head = f"POST /v1/generate HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
        self.socket.sendall(head.encode() + sent)
        self.lines = self.socket.makefile("r", encoding="utf-8")

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        kind = "message"
        for line in self.lines:
            if line.startswith("event: "):
                kind = line[7:].strip()
            elif line.startswith("data: "):
                yield kind, json.loads(line[6:])
                kind = "message"

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


def _until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def _gauge(server: Server, name: str) -> float:
    lines = [line for line in server.get("/metrics").splitlines() if line.startswith(f"rl_exit_{name}")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@pytest.mark.ray
@pytest.mark.timeout(400)  # the server starts here
def test_texts_and_streams_are_those_of_generate(server: Server, decoder: EarlyExitCausalModel) -> None:
    prompts = ["w5 w6 w7", "w9"]
    expected = decoder.generate(prompts, max_new_tokens=20, threshold=0.5, batch_size=1)
    status, answer = server.post("/v1/generate", {"prompt": prompts, "max_new_tokens": 20, "threshold": 0.5})
    assert status == 200
    assert [one["text"] for one in answer["generations"]] == [one.text for one in expected]
    assert [one["exit_layers"] for one in answer["generations"]] == [one.exit_layers for one in expected]
    *events, (kind, end) = Stream(server.port, {"prompt": prompts[0], "max_new_tokens": 20, "threshold": 0.5})
    assert kind == "end" and end["generations"][0]["text"] == expected[0].text
    assert [data["token"] for _, data in events] == expected[0].tokens
    assert server.post("/v1/generate", {"prompt": 3})[0] == 422
    refused = server.post("/v1/generate", {"prompt": "w5 " * 1100, "max_new_tokens": 3})[1]
    assert refused["error"] == "refused" and refused["message"].startswith("a prompt of 1100 tokens")
    assert json.loads(server.get("/healthz")) == {"status": "ok"}
    assert _gauge(server, "tokens_total") == 60


@pytest.mark.ray
@pytest.mark.skipif(found() is None, reason="there is no chromium with chromedriver here")
def test_the_page_in_a_real_browser(server: Server, tmp_path: Path) -> None:
    with browsing(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait("return document.getElementById('point').options.length == 2")
        browser.type("#text", "w5 w6")
        browser.run("document.getElementById('count').value = 12; return 1")
        browser.click("#go")
        browser.wait("return document.getElementById('summary').textContent != ''")
        expected = server.post("/v1/generate", {"prompt": "w5 w6", "max_new_tokens": 12})[1]
        layers = browser.run("return [...document.querySelectorAll('.token sub')].map((one) => one.textContent)")
        assert layers == [str(layer) for layer in expected["exit_layers"]]
        shown = browser.run(
            "return [...document.querySelectorAll('.token')].map((one) => one.firstChild.data).join('')"
        )
        assert shown == expected["text"] and "12 tokens (length)" in browser.text("#summary")
        assert browser.errors() == []


@pytest.mark.ray
@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_row(streamed: bool, server: Server) -> None:
    before = _told_by_all(server)
    left = Stream(server.port, LONG, streamed)
    if streamed:
        events = iter(left)
        assert [next(events)[0] for _ in range(5)] == ["message"] * 5
    else:
        _until(lambda: _gauge(server, "texts_inside") == 1)
        time.sleep(0.2)  # it is being written
    left.close()
    _until(lambda: _gauge(server, "texts_inside") == 0)
    tokens = _told_by_all(server) - before
    assert _gauge(server, "replica_writing") == 0 and tokens < 600


def _told_by_all(server: Server) -> float:
    """Tokens that the replicas have written, after each of them has answered a short request and so told how it is."""
    seen = set(_replica_lines(server))
    for asked in range(1, 60):
        server.post("/v1/generate", {"prompt": "w5", "max_new_tokens": 2})
        now = _replica_lines(server)
        if len(now) == 2 and not set(now) & seen:
            return _gauge(server, "replica_tokens") - 2 * asked
    raise AssertionError("a replica has answered no request")


def _replica_lines(server: Server) -> list[str]:
    return [line for line in server.get("/metrics").splitlines() if line.startswith("rl_exit_replica_tokens{")]


@pytest.mark.ray
def test_a_stream_whose_replica_is_killed_goes_on(server: Server, decoder: EarlyExitCausalModel) -> None:
    """Drawn tokens: the text is that of one replica, token by token, however many have written at it."""
    words = {"do_sample": True, "temperature": 1.0, "top_k": 0, "seed": 3}
    [expected] = decoder.generate(LONG["prompt"], max_new_tokens=700, threshold=0.5, **words)
    assert len(set(expected.exit_layers)) >= 3
    before, used = server.retries(), {}
    events: list[tuple[str, Any]] = []
    for event in Stream(server.port, LONG):
        events.append(event)
        if len(events) == 10:
            used = {one: sum(one.cpu_times()[:2]) for one in server.wait_for(REPLICA, 2)}
        if len(events) == 200:  # kill the one that has worked since
            busy = max(used, key=lambda one: sum(one.cpu_times()[:2]) - used[one])
            busy.send_signal(signal.SIGKILL)
    tokens = [data for kind, data in events if kind == "message"]
    assert [one["token"] for one in tokens] == expected.tokens
    assert [one["exit_layer"] for one in tokens] == expected.exit_layers
    assert "".join(one["text"] for one in tokens) == expected.text and events[-1][0] == "end"
    assert server.retries() >= before + 1


@pytest.mark.ray
def test_sigterm_lets_a_stream_end(server: Server) -> None:
    """Last: the server is gone after it."""
    events: list[tuple[str, Any]] = []
    for event in Stream(server.port, {**LONG, "max_new_tokens": 200}):
        events.append(event)
        if len(events) == 5:
            server.process.send_signal(signal.SIGTERM)
    assert len(events) == 201 and events[-1][0] == "end"
    assert server.process.wait(90) == 0
    assert "ended; no open requests were left unanswered" in server.log.read_text()
