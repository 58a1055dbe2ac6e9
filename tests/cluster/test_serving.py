"""rl-exit serve as its users see it: the command, the port, the page, a replica that dies, the end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from headless_browser import browsing, found
from ray.exceptions import ActorDiedError, ActorUnavailableError
from server_process import FRONT, MODEL, REPLICA, Server, free_port
from typer.testing import CliRunner

from rl_exit import EarlyExitModel
from rl_exit.cli import app
from rl_exit.cluster import replicas
from rl_exit.cluster.replicas import Asking, Replicas
from rl_exit.cluster.serving import ServeOptions, check_address
from rl_exit.errors import ConfigError, UserError
from rl_exit.serving.lines import LineGone, Lines
from rl_exit.serving.schema import Wish
from rl_exit.serving.texts import TextSide
from rl_exit.serving.web import Refusal

TEXTS = ["the old cat", "a hammer", "my red drill near the dog", "saw"]


ENDS = (
    ActorDiedError(),
    ActorUnavailableError("gone", None),
    AioRpcError(StatusCode.CANCELLED, Metadata(), Metadata(), "the server is ending"),
)


class Dying:
    """A deployment handle of which the first calls meet replicas that die."""

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths
        self.calls = 0
        self.answer = self

    def remote(self, *words: Any) -> Dying:
        return self

    def cancel(self) -> None:
        return

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> dict[str, Any]:
        self.calls += 1
        if self.calls <= self.deaths:
            raise ENDS[self.calls % len(ENDS)]
        return {"answers": [{"label": "cat"}], "replica": "1", "state": {}}


class Words(TextSide):
    """Texts that are read and answered as they are."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def tokenised(self, texts: Any, pairs: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        return list(texts)

    def told(self, left: Any) -> list[dict[str, Any]]:
        return [{"label": one} for one in left]


class Straight(Lines):
    """Lines of which the first are gone when they are asked; then one answers, where there is one."""

    def __init__(self, gone: int, then: bool) -> None:
        self.name, self.gone, self.then, self.asked = "2", gone, then, 0

    def best(self) -> Any:
        return self if self.asked < self.gone or self.then else None

    async def run(self, instances: Any, wish: Wish) -> Any:
        self.asked += 1
        if self.asked <= self.gone:
            raise LineGone
        return instances, {"rows": 5}


def test_lines_are_asked_first_then_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "FIRST_WAIT", 0.0)
    handle, words, retries = Dying(0), Words(), []
    asking = Asking(handle)
    asking.retried = lambda: retries.append(1)
    straight = Replicas(asking, words, Straight(gone=2, then=True))
    assert asyncio.run(straight.answer(["dog"], None, Wish())) == [{"label": "dog"}]
    assert (handle.calls, len(retries), len(words.threads)) == (0, 2, 1), "tokenised once"
    assert asking._states["2"][1] == {"rows": 5}
    assert asyncio.run(Replicas(asking, words, Straight(1, then=False)).answer(["dog"], None, Wish())) == [
        {"label": "cat"}
    ]
    assert (handle.calls, len(retries)) == (1, 3)
    asyncio.run(straight.answer(["dog " * 9000], None, Wish()))
    assert words.threads[0] == "MainThread" != words.threads[-1], "what takes long does not hold up the event loop"


def test_a_request_whose_replica_dies_goes_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "FIRST_WAIT", 0.0)
    retries: list[int] = []
    handle = Dying(3)
    asking = Asking(handle)
    asking.retried = lambda: retries.append(1)
    backend = Replicas(asking, Words(), Lines())
    assert asyncio.run(backend.answer(["cat"], None, Wish())) == [{"label": "cat"}]
    assert handle.calls == 4 and len(retries) == 3
    with pytest.raises(Refusal, match="30 times"):
        asyncio.run(Replicas(Asking(Dying(99)), Words(), Lines()).answer(["cat"], None, Wish()))


@pytest.mark.parametrize(
    "words",
    [
        {"port": 0},
        {"replicas": 0},
        {"batch_size": 0},
        {"deadline": -1.0},
        {"batching": "other"},
        {"goal": 0.0},
        {"goal": float("nan")},
        {"goal": 0.1, "deadline": 0.01},
        {"goal": 0.1, "batching": "plain"},
    ],
)
def test_options_out_of_range_are_refused(words: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="accepted"):
        ServeOptions("model", **words)


def test_a_goal_that_cannot_be_had_is_one_message() -> None:
    done = CliRunner().invoke(app, ["serve", "nowhere", "--goal-ms", "100", "--batching", "plain"])
    assert done.exit_code == 2 and "a goal with 'pooled'" in done.stderr and "Traceback" not in done.stderr


def test_an_address_that_cannot_be_used_is_one_message() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: Address already in use; choose another with --port"):
            check_address("127.0.0.1", port)
        done = CliRunner().invoke(app, ["serve", "nowhere", "--port", str(port)])
        assert done.exit_code == 2 and "already in use" in done.stderr
    check_address("127.0.0.1", port)
    for host in ("192.0.2.1", "a..b", "a" * 64):
        with pytest.raises(UserError, match=f"cannot listen at {host[:10]}.*choose another"):
            check_address(host, 8000)


def test_a_model_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(tmp_path / "nothing"), "--port", str(free_port())])
    assert done.exit_code == 2 and "nothing" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def model_folder(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    EarlyExitModel.from_backbone(str(tiny_backbone), ["animal", "tool"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(model_folder, tmp_path_factory.mktemp("log") / "serve.log")
    try:
        made.wait()
        yield made
    finally:
        if made.process.poll() is None:
            made.process.send_signal(signal.SIGTERM)
            made.process.wait(90)


@pytest.mark.ray
@pytest.mark.timeout(400)  # the server starts here
def test_answers_are_those_of_predict(server: Server, model_folder: Path) -> None:
    expected = EarlyExitModel.from_pretrained(model_folder).predict(TEXTS)
    status, answers = server.post("/v1/predict/batch", {"texts": TEXTS})
    assert status == 200
    for answer, one in zip(answers["predictions"], expected, strict=True):
        assert (answer["label"], answer["exit_layer"]) == (one.label, one.exit_layer)
        assert answer["probabilities"] == pytest.approx(one.probabilities, abs=1e-5)
    assert json.loads(server.get("/healthz")) == {"status": "ok"}
    assert 'rl_exit_texts_left_total{layer="3"}' in server.get("/metrics")
    assert server.post("/v1/predict", {"text": 3})[0] == 422
    assert server.post("/v1/predict", {"text": "a" * 1_100_000})[0] == 413
    assert server.post("/v1/predict/batch", {"texts": ["cat"] * 10_000})[0] == 413


@pytest.mark.ray
@pytest.mark.skipif(found() is None, reason="there is no chromium with chromedriver here")
def test_the_page_in_a_real_browser(server: Server, tmp_path: Path) -> None:
    with browsing(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait("return document.getElementById('point').options.length == 2")
        assert "3 layers, animal, tool" in browser.text("#about")
        browser.type("#text", "the old cat <b>near</b> my saw")
        browser.click("#go")
        browser.wait("return !document.getElementById('answer').hidden")
        expected = server.post("/v1/explain", {"text": "the old cat <b>near</b> my saw"})[1]
        assert browser.text("#label") == expected["label"]
        assert browser.text("#layer") == str(expected["exit_layer"])
        assert browser.text("#rows tr.exit td") == str(expected["exit_layer"])
        meters = browser.run("return [...document.querySelectorAll('#rows meter')].map((meter) => meter.value)")
        assert meters == pytest.approx([layer["exit_probability"] for layer in expected["layers"]], abs=1e-4)
        assert "ms at full depth" in browser.text("#time") and "times as fast" in browser.text("#time")
        browser.run("document.getElementById('point').value = 'full-depth'; return 1")
        browser.click("#go")
        browser.wait("return document.getElementById('layer').textContent == '3'")
        assert browser.errors() == []
        browser.run("document.getElementById('text').value = '   '; return 1")
        browser.click("#go")
        browser.wait("return !document.getElementById('problem').hidden")
        assert "blank" in browser.text("#problem")


def told(server: Server) -> set[str]:
    """Replicas that have answered within the last minute."""
    lines = server.get("/metrics").splitlines()
    return {line.split("}")[0] for line in lines if line.startswith("rl_exit_replica_rows{")}


@pytest.mark.ray
def test_a_replica_killed_under_load_loses_no_request(server: Server) -> None:
    """Of the replica's own process, and of its model's: both end the replica."""
    answers: list[tuple[int, Any]] = []
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            answers.append(server.post("/v1/predict/batch", {"texts": TEXTS * 64, "threshold": 1}))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for word in (REPLICA, MODEL):
            time.sleep(1)
            victims, known = server.wait_for(word, 2), told(server)
            oldest = min(victims, key=lambda one: one.create_time())  # not one that is being started
            oldest.send_signal(signal.SIGKILL)
            oldest.wait(10)
            until = time.monotonic() + 120
            while not told(server) - known:  # the one in its place answers
                assert time.monotonic() < until
                time.sleep(0.5)
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    assert len(answers) > 16
    assert {status for status, _ in answers} == {200}
    assert all(len(found["predictions"]) == 256 for _, found in answers)


def asked_straight(server: Server) -> int:
    """Models on a line to the front, as it says and as their connections show."""
    line = next(line for line in server.get("/metrics").splitlines() if line.startswith("rl_exit_lines "))
    said = round(float(line.split()[1]))
    front = server.processes(FRONT)[0]
    ports = {found.laddr.port for found in front.net_connections("tcp") if found.status == psutil.CONN_LISTEN}
    found = [
        one
        for one in server.processes(MODEL)
        if any(
            found.status == psutil.CONN_ESTABLISHED and found.raddr.port in ports
            for found in one.net_connections("tcp")
        )
    ]
    assert len(found) >= said
    return said


@pytest.mark.ray
def test_models_are_asked_straight_and_call_a_new_front(server: Server) -> None:
    server.wait_for(MODEL, 2)
    until = time.monotonic() + 60
    while asked_straight(server) < 2:
        assert time.monotonic() < until
        time.sleep(0.2)
    [front] = server.processes(FRONT)
    front.send_signal(signal.SIGKILL)
    front.wait(10)
    while True:
        try:
            if asked_straight(server) == 2:
                break
        except (OSError, IndexError, psutil.NoSuchProcess):
            pass  # nobody listens yet
        assert time.monotonic() < until + 60
        time.sleep(0.5)
    assert server.post("/v1/predict/batch", {"texts": TEXTS})[0] == 200


@pytest.mark.ray
def test_sigterm_answers_open_requests_and_ends_with_code_0(server: Server) -> None:
    """Last: the server is gone after it."""
    answers: list[tuple[int, Any]] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(server.post("/v1/predict/batch", {"texts": TEXTS * 64, "threshold": 1}))
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 30
    while "rl_exit_texts_inside 0" in server.get("/metrics") and not answers and time.monotonic() < until:
        pass
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert [status for status, _ in answers if status != 503] and {status for status, _ in answers} <= {200, 503}
    assert server.process.wait(90) == 0
    assert "ended; no open requests were left unanswered" in server.log.read_text()
    with pytest.raises(OSError):
        server.get("/healthz")
