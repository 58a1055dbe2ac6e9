from __future__ import annotations

import errno
from pathlib import Path

import pytest

from rl_exit.errors import RunError, UserError
from rl_exit.files import atomic_file, atomic_folder, explain_os_error, read_json, write_json, write_text


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "x"
    write_text(file, "old")
    with pytest.raises(ZeroDivisionError), atomic_file(file) as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with atomic_folder(folder) as beside:
        (beside / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as beside:
        (beside / "b").write_text("2")
        raise ZeroDivisionError
    assert [p.name for p in folder.iterdir()] == ["a"] and [p.name for p in tmp_path.iterdir()] == ["model"]
    with atomic_folder(folder) as beside:
        (beside / "b").write_text("2")
    assert [p.name for p in folder.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no space left on the device"), atomic_file(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_a_really_full_device() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError) as error, Path("/dev/full").open("w") as out:
        out.write("x" * 10000)
    assert "no space left" in str(explain_os_error(error.value, Path("/dev/full")))


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("x")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        write_text(tmp_path / "runs" / "x", "y")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("I/O error: File too large (os error 27)", "x: file too large$"),
        ("I/O error: No space left on device (os error 28)", "no space left on the device"),
        ("No space left on device", "no space left on the device"),
    ],
)
def test_disk_errors_told_in_words_only(tmp_path: Path, words: str, said: str) -> None:
    with pytest.raises(UserError, match=said), atomic_file(tmp_path / "x"):
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="device is busy"), atomic_file(tmp_path / "x"):
        raise RuntimeError("device is busy")
    assert list(tmp_path.iterdir()) == []


def test_names_that_no_disk_takes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.\.\.: file name too long$"):
        write_text(tmp_path / ("x" * 300) / "y", "z")
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UserError, match="too many"):
        write_text(tmp_path / "round" / "x" / "y", "z")


def test_json_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such file"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read as JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "y.json", {"x": float("nan")})
    assert not (tmp_path / "y.json").exists()
