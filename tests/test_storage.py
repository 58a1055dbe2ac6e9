"""Folders anywhere: whole files only, patience while a storage is away, no writing under a mount that is gone."""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from pathlib import Path

import pytest

from rl_exit.errors import UserError
from rl_exit.storage import Storage


@pytest.fixture(params=["path", "file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A path, a URL of this machine, and an object store (in memory)."""
    places = {
        "path": str(tmp_path / "kept"),
        "file": f"file://{tmp_path / 'kept'}",
        "memory": f"memory://{uuid.uuid4().hex}/kept",
    }
    found = Storage(places[request.param], patience=1.0)
    found.open()
    return found


def test_files_go_and_come(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "big.bin"
    source.write_bytes(b"abc" * 5_000_000)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert storage.upload(source, "a/b/big.bin") == (15_000_000, digest)
    storage.download("a/b/big.bin", tmp_path / "back" / "big.bin", digest)
    assert (tmp_path / "back" / "big.bin").read_bytes() == source.read_bytes()
    storage.write_json("a/about.json", {"x": [1]})
    assert storage.read_json("a/about.json") == {"x": [1]} and storage.exists("a/b/big.bin")
    assert storage.read("none") is None and not storage.exists("a/none") and storage.read_json("none") is None
    assert storage.folders() == ["a"] and storage.files() == [] and storage.below("a").files() == ["about.json"]
    assert storage.below("a").folders() == ["b"]
    assert storage.below("a").read_json("about.json") == {"x": [1]}
    storage.remove("a/b")
    assert not storage.exists("a/b/big.bin") and storage.exists("a/about.json")
    storage.remove("a/b")


def test_a_failure_is_not_an_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}/kept", patience=5.0)
    storage.open()
    storage.write_json("a/x.json", {"x": 1})
    whole, failures = storage._fs.info, []

    def failing(path: str, **words: object) -> object:
        if len(failures) < 2:
            failures.append(path)
            raise ConnectionError("reset")
        return whole(path, **words)

    for asked, expected in (
        (lambda: storage.exists("a/x.json"), True),
        (lambda: storage.read_json("a/x.json"), {"x": 1}),
        (storage.folders, ["a"]),
    ):
        failures.clear()
        with monkeypatch.context() as patch:
            patch.setattr(type(storage._fs), "info", lambda _, path, **words: failing(path, **words))
            assert asked() == expected and len(failures) == 2


def test_damaged_content_is_found(storage: Storage, tmp_path: Path) -> None:
    storage.write("x", b"one")
    with pytest.raises(UserError, match="its content is not what the run has written"):
        storage.download("x", tmp_path / "x", hashlib.sha256(b"two").hexdigest())
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x.*"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path / "kept"), patience=0.0)
    storage.open()
    storage.write("x", b"old")
    (tmp_path / "source").write_bytes(b"new")

    def full(given: object, out: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rl_exit.storage._copy", full)
    with pytest.raises(UserError, match=r"cannot write x \(.*No space left.*--resume"):
        storage.upload(tmp_path / "source", "x")
    assert storage.read("x") == b"old"
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [".rl-exit-storage", "x"]


def test_a_storage_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "kept"), patience=30.0)
    storage.open()
    (tmp_path / "kept").rename(tmp_path / "away")

    def back() -> None:
        time.sleep(1.0)
        (tmp_path / "away").rename(tmp_path / "kept")

    thread = threading.Thread(target=back)
    thread.start()
    storage.write("x", b"1")
    thread.join()
    assert storage.read("x") == b"1"


def test_nothing_is_written_where_the_storage_was(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "kept"), patience=0.0)
    storage.open()
    (tmp_path / "kept").rename(tmp_path / "away")
    (tmp_path / "kept").mkdir()  # an empty mount point
    with pytest.raises(UserError, match="the storage is away"):
        storage.write("x", b"1")
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nosuch://x/y", "nosuch"),
        ("s3://bucket/runs", "s3fs|credential|region|bucket"),
    ],
)
def test_what_cannot_be_used_is_said(url: str, said: str) -> None:
    try:
        import s3fs  # noqa: F401

        if url.startswith("s3"):
            pytest.skip("s3fs is installed here")
    except ImportError:
        pass
    with pytest.raises(UserError, match=said):
        Storage(url)


def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="storage_path="):
        Storage(str(tmp_path / "file" / "runs")).open()
