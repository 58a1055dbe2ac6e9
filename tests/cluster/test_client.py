"""What stands between a user and a cluster: one message each."""

from __future__ import annotations

import platform
import socket
import threading
from contextlib import suppress

import pytest
from dashboards import dashboard

from rl_exit.cluster import client
from rl_exit.cluster.address import Target
from rl_exit.cluster.client import connect
from rl_exit.errors import UserError


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def told(target: Target, **words: bool) -> str:
    with pytest.raises(UserError) as found:
        connect(target, **words)
    assert "\n" not in str(found.value) and "Traceback" not in str(found.value)
    return str(found.value)


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = told(Target(f"http://127.0.0.1:{port}", "--address"))
    assert f"http://127.0.0.1:{port} (--address): cannot be reached" in message and "refused" in message


def test_no_answer_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert "no answer" in told(Target(f"http://127.0.0.1:{silent.getsockname()[1]}", "RAY_ADDRESS"))


def test_an_unknown_host() -> None:
    assert "cannot be reached" in told(Target("http://no-such-host.invalid:8265", "--address"))


def test_another_web_server() -> None:
    with dashboard(html=True) as board:
        assert "no Ray dashboard" in told(Target(board.url, "--address"))


def test_a_port_that_speaks_otherwise() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def greet() -> None:
            with suppress(OSError):
                while True:
                    with server.accept()[0] as asked:
                        asked.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=greet, daemon=True).start()
        assert "8265" in told(Target(f"http://127.0.0.1:{server.getsockname()[1]}", "--address"))
    assert "8265" in told(Target("http://127.0.0.1/a b", "--address"))


def test_a_redirect_does_not_carry_the_token_away() -> None:
    with dashboard() as other, dashboard(moved=other.url) as board:
        assert "302" in told(Target(board.url, "--address", "secret"))
        assert other.seen == []


def test_no_token_and_a_wrong_one() -> None:
    with dashboard(token="right") as board:
        message = told(Target(board.url, "--address"))
        assert "401" in message and "ray get-auth-token" in message and "RAY_AUTH_TOKEN" in message
        message = told(Target(board.url, "--address", "wrong-token"))
        assert "403" in message and "wrong-token" not in message
        connect(Target(board.url, "--address", "right"), any_version=False)


def test_another_ray() -> None:
    with dashboard(ray_version="2.40.0") as board:
        message = told(Target(board.url, "--address"), any_version=False)
        assert "Ray 2.40.0" in message and "--any-version" in message
        connect(Target(board.url, "--address"))  # looking at jobs, or --any-version


def test_another_python() -> None:
    major, minor, _ = platform.python_version_tuple()
    with dashboard(python_version=f"{major}.{int(minor) + 1}.0") as board:
        message = told(Target(board.url, "--address"), any_version=False)
        assert f"Python {major}.{int(minor) + 1}.0" in message and platform.python_version() in message
    with dashboard(python_version=f"{major}.{minor}.99") as board:
        connect(Target(board.url, "--address"), any_version=False)  # a patch release is the same


def test_the_address_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with dashboard() as board:
        assert connect(Target(board.url, "--address")).get_address() == board.url
