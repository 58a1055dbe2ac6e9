from __future__ import annotations

from pathlib import Path

import pytest

from rl_exit.cluster.address import find_target, find_token
from rl_exit.errors import UserError


def test_the_command_line_wins_over_the_environment_and_ray_s_own_order_is_kept() -> None:
    both = {"RAY_API_SERVER_ADDRESS": "http://a:1", "RAY_ADDRESS": "http://b:2"}
    assert find_target("http://c:3", both).url == "http://c:3"
    assert find_target(None, both).url == "http://a:1" and find_target(None, both).origin == "RAY_API_SERVER_ADDRESS"
    assert find_target(None, {"RAY_ADDRESS": "http://b:2"}).url == "http://b:2"
    with pytest.raises(UserError, match="which cluster"):
        find_target(None, {})


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://head", "http://head:8265"),
        ("http://head:9000/", "http://head:9000"),
        ("https://head.example.org/ray/", "https://head.example.org/ray"),
        ("http://[::1]:8265", "http://[::1]:8265"),
        ("ray://head:10001", "ray://head:10001"),
        ("10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", "auto"),
    ],
)
def test_forms_of_an_address(given: str, url: str) -> None:
    assert find_target(given, {}).url == url


@pytest.mark.parametrize("given", ["ftp://head:1", "http://", "head", "http://he ad:1", "http://head:99999", "a;b:1"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"accepted|port is missing"):
        find_target(given, {})


def test_a_password_in_an_address_is_refused_and_not_shown() -> None:
    with pytest.raises(UserError) as told:
        find_target("http://me:secret@head:8265", {})
    assert "secret" not in str(told.value)


def test_where_a_token_is_found(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    (tmp_path / "file").write_text("file\n")
    home, file = {"HOME": str(tmp_path)}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "file")}
    assert find_token(home) is None  # not sent to any cluster unless asked for
    assert find_token({**home, "RAY_AUTH_MODE": "token"}) == "home"
    assert find_token({**home, **file}) == "file"
    assert find_token({**home, **file, "RAY_AUTH_TOKEN": "word"}) == "word"
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})


def test_a_token_is_never_shown() -> None:
    target = find_target("http://head", {"RAY_AUTH_TOKEN": "abc123"})
    assert target.headers == {"Authorization": "Bearer abc123"} and "abc123" not in repr(target)
