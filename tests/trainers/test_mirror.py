"""The copy of a run in its storage: true at every moment, taken back elsewhere, never overtaken by an old process."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import pytest

from rl_exit.config import load_config
from rl_exit.errors import RunError, UserError
from rl_exit.progress import Silent
from rl_exit.storage import Storage
from rl_exit.trainers.alternation import train
from rl_exit.trainers.mirror import MANIFEST, Mirror
from rl_exit.trainers.run_directory import RunDirectory


def written(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@pytest.fixture(params=["path", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "kept") if request.param == "path" else f"memory://{uuid.uuid4().hex}"


def opened(folder: Path, place: str) -> Mirror:
    mirror = Mirror(folder, Storage(place, patience=0.0))
    mirror.open()
    return mirror


def test_what_is_pushed_is_what_another_machine_gets(tmp_path: Path, place: str) -> None:
    here = written(tmp_path / "here", run_json="1", steps__a_json="{}", rounds__1__model="weights", init__train__x="no")
    written(here, **{".hidden": "no"})
    mirror = opened(here, place)
    assert mirror.push() > 0 and mirror.push() == 0  # nothing is sent twice
    written(here, steps__b_json="{}")
    (here / "rounds/1/model").unlink()
    assert mirror.push() == 2
    there = opened(tmp_path / "there", place)
    assert there.pull()
    assert tree(tmp_path / "there") == {"run.json": b"1", "steps/a.json": b"{}", "steps/b.json": b"{}"}
    assert not Storage(place, 0.0).exists("rounds/1/model")
    assert there.push() == 0  # what came from there need not go back


def test_a_run_here_that_is_further_is_kept(tmp_path: Path, place: str) -> None:
    here = written(tmp_path / "here", run_json="1", steps__a_json="{}")
    opened(here, place).push()
    written(here, steps__b_json="{}")
    mirror = opened(here, place)
    assert not mirror.pull() and (here / "steps/b.json").exists()
    assert mirror.push() == 2  # only what is new


@pytest.mark.parametrize("other", [{"run_json": "2"}, {"steps__a_json": "{ }"}])
def test_a_folder_of_another_run_gives_way(tmp_path: Path, place: str, other: dict[str, str]) -> None:
    opened(written(tmp_path / "here", run_json="1", steps__a_json="{}"), place).push()
    there = written(tmp_path / "there", **{"run_json": "1", "steps__a_json": "{}", "steps__z_json": "{}", **other})
    assert opened(there, place).pull()
    assert tree(there) == tree(tmp_path / "here")


@pytest.mark.parametrize("fails_at", range(12))
def test_whenever_a_push_dies_the_manifest_is_true(tmp_path: Path, fails_at: int) -> None:
    """Files are replaced, added and removed; whatever the last operation was, all that is named is there and whole."""
    here = written(tmp_path / "here", run_json="1", a="one", b="two", steps__a_json="{}")
    place = str(tmp_path / "kept")
    mirror = opened(here, place)
    mirror.push()
    written(here, a="changed", c="new", steps__b_json="{}")
    (here / "b").unlink()
    count = 0

    def dying(work: object) -> object:
        def call(*words: object) -> object:
            nonlocal count
            count += 1
            if count > fails_at:
                raise KeyboardInterrupt
            return work(*words)  # type: ignore[operator]

        return call

    for name in ("upload", "write_json", "remove"):
        setattr(mirror.storage, name, dying(getattr(mirror.storage, name)))
    try:
        mirror.push()
    except KeyboardInterrupt:
        pass
    else:
        assert fails_at > 4
    there = tmp_path / "there"
    opened(there, place).pull()  # raises if something is missing or not what the manifest says
    found = tree(there)
    assert found["run.json"] == b"1" and found["steps/a.json"] == b"{}"
    if "steps/b.json" in found:  # the step is done only with all that belongs to it
        assert found == tree(here)


def test_a_process_that_was_taken_over_writes_no_more(tmp_path: Path, place: str) -> None:
    here = written(tmp_path / "here", run_json="1")
    old = opened(here, place)
    old.push()
    opened(tmp_path / "there", place)
    written(here, steps__a_json="{}")
    with pytest.raises(RunError, match="has taken this run over"):
        old.push()
    assert "steps/a.json" not in (Storage(place, 0.0).read_json(MANIFEST) or {})["files"]


def test_a_run_that_is_replaced_leaves_nothing(tmp_path: Path, place: str) -> None:
    opened(written(tmp_path / "here", run_json="1", results_json="{}", rounds__1__model="x"), place).push()
    mirror = opened(tmp_path / "there", place)
    mirror.discard()
    assert mirror.storage.files() == ["owner.json"] and not mirror.is_there() and not mirror.pull()
    assert not mirror.storage.exists("rounds/1/model")


def test_a_manifest_that_leads_out_of_the_run_is_refused(tmp_path: Path, place: str) -> None:
    mirror = opened(tmp_path / "here", place)
    mirror.storage.write_json(MANIFEST, {"format": 1, "files": {"../evil": {"size": 1, "sha256": "x"}}})
    with pytest.raises(RunError, match="not the manifest of a run"):
        mirror.pull()


def same(results: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in results.items() if key not in ("timing", "seconds")}


def test_a_run_goes_on_on_another_machine_to_the_same_result(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a step, its disk lost: the same command elsewhere ends with the same model."""
    words = [*tiny_run, "init.epochs=1", "policy.epochs=1", "alternation.rounds=2", "alternation.patience=3"]
    alone = train(load_config(None, words), Silent())
    storage = f"storage_path={tmp_path / 'kept'}"
    first = load_config(None, [*words, f"output_dir={tmp_path / 'one'}", storage])
    done: list[str] = []
    real = RunDirectory.run_step

    def dying(self: RunDirectory, step: str, *rest: object) -> object:
        found = real(self, step, *rest)  # type: ignore[arg-type]
        done.append(step)
        if step == "round-1-task":
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(RunDirectory, "run_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train(first, Silent())
    shutil.rmtree(tmp_path / "one")
    done.clear()
    monkeypatch.setattr(RunDirectory, "run_step", real)
    second = load_config(None, [*words, f"output_dir={tmp_path / 'two'}", storage])
    with pytest.raises(RunError, match=r"kept/tiny: a run is already there.*--resume"):
        train(second, Silent())
    found = train(second, Silent(), resume=True)
    assert same(found) == same(alone)
    kept, undisturbed = tmp_path / "kept" / "tiny", tmp_path / "runs" / "tiny"
    name = "model/model.safetensors"
    assert (kept / name).read_bytes() == (undisturbed / name).read_bytes()
    assert json.loads((kept / "results.json").read_text()) == found
    manifest = json.loads((kept / MANIFEST).read_text())["files"]
    assert set(manifest) == set(tree(tmp_path / "two" / "tiny"))
    stores = {name.split("/")[1] for name in manifest if "store-train" in name}
    assert stores == {str(found["best_round"])}  # those of the other rounds are not kept
    again = load_config(None, [*words, f"output_dir={tmp_path / 'three'}", storage])
    assert train(again, Silent(), resume=True) == found  # a finished run is fetched and shown


def test_a_storage_that_stays_away_ends_the_run_with_advice(tiny_run: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = load_config(None, [*tiny_run, f"storage_path={tmp_path / 'file' / 'kept'}"])
    with pytest.raises(UserError, match="storage_path"):
        train(config, Silent())
