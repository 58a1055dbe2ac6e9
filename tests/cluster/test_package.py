from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from rl_exit.cluster.package import CONFIG_NAME, build_package, walk
from rl_exit.errors import UserError

ROOT = Path(__file__).parents[2]


def test_the_same_content_is_the_same_archive(tmp_path: Path) -> None:
    first, second = build_package("seed: 0\n"), build_package("seed: 0\n")
    assert first.digest() == second.digest() != build_package("seed: 1\n").digest()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    a, b = first.write(tmp_path / "a"), second.write(tmp_path / "b")
    assert a.name == b.name and a.read_bytes() == b.read_bytes()


def test_the_archive_holds_code_and_configuration_and_nothing_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(build_package("seed: 0\n").write(tmp_path)) as archive:
        names = set(archive.namelist())
        assert archive.read(CONFIG_NAME) == b"seed: 0\n"
    assert {"rl_exit/__main__.py", "rl_exit/py.typed", "rl_exit/templates/report.css"} <= names
    assert all(name == CONFIG_NAME or name.startswith("rl_exit/") for name in names)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_a_checkout_is_sent_once_whatever_links_it_has() -> None:
    names = set(build_package("", working_dir=ROOT, excludes=("docs", "tests")).files)
    assert "rl_exit/envs/episode.py" in names and "configs/default.yaml" in names
    assert not [name for name in names if name.startswith(("envs", "trainers", "cluster", "tests/", "docs/", ".git/"))]


def test_what_never_travels(tmp_path: Path) -> None:
    for name in (".env", "id.pem", "mine.py", ".git/config", "runs/x/model", "deep/__pycache__/a.pyc", "deep/keep.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [name for name, _ in walk(tmp_path, ())] == ["mine.py", "deep/keep.txt"]
    assert [name for name, _ in walk(tmp_path, ("deep/*",))] == ["mine.py"]


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.py").write_text("")
    (tmp_path / "mine" / "again.py").symlink_to("a.py")
    assert [name for name, _ in walk(tmp_path / "mine", ())] == ["a.py"]
    (tmp_path / "mine" / "passwords").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="passwords: is a link out of"):
        list(walk(tmp_path / "mine", ()))
    (tmp_path / "mine" / "passwords").unlink()
    (tmp_path / "mine" / "folder").symlink_to(os.sep)
    with pytest.raises(UserError, match="is a link out of"):
        list(walk(tmp_path / "mine", ()))


def test_too_much_is_refused_with_the_largest_files(tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(b"x" * 300_000)
    package = build_package("", code="installed", working_dir=tmp_path)
    package.check_size(400_000)
    with pytest.raises(UserError, match=r"carry 0\.3 MB; at most 0\.2 MB .*big\.bin \(0\.3 MB\)"):
        package.check_size(200_000)


def test_a_wheel_is_unpacked(tmp_path: Path) -> None:
    wheel = tmp_path / "rl_exit-9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as out:
        out.writestr("rl_exit/__init__.py", "__version__ = '9'")
        out.writestr("rl_exit-9.dist-info/METADATA", "Name: rl-exit")
    package = build_package("", code=str(wheel))
    assert package.code == wheel.name and package.files["rl_exit/__init__.py"] == b"__version__ = '9'"
    with zipfile.ZipFile(wheel, "a") as out:
        out.writestr("../outside.py", "")
    with pytest.raises(UserError, match="not a wheel of rl-exit"):
        build_package("", code=str(wheel))
    with pytest.raises(UserError, match="'tree', 'installed' or a wheel"):
        build_package("", code="somewhere")


def test_a_name_that_is_the_job_s_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text("")
    with pytest.raises(UserError, match=CONFIG_NAME):
        build_package("", working_dir=tmp_path)
