from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rl_exit
from rl_exit.data.sources import RawSplit, open_hub, open_local
from rl_exit.errors import DataError, UserError

ROWS = {"text": ["one", "two", "three"], "label": [0, 1, 0]}


def parquet(path: Path, columns: dict[str, Any] | pa.Table = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path)
    return path


def read(path: Path, name: str = "train", **options: Any) -> RawSplit:
    return open_local(str(path), **options).read(name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", "text,label\none,0\ntwo,1\nthree,0\n"),
        ("train.tsv", "text\tlabel\none\t0\ntwo\t1\nthree\t0\n"),
        ("train.jsonl", '{"text":"one","label":0}\n{"text":"two","label":1}\n{"text":"three","label":0}\n'),
        ("train.json", '[{"text":"one","label":0},{"text":"two","label":1},{"text":"three","label":0}]'),
    ],
)
def test_formats_hold_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    for split in (read(tmp_path), read(tmp_path / name)):
        table = split.table.to_pydict()
        assert table["text"] == ROWS["text"]
        assert [int(label) for label in table["label"]] == ROWS["label"]
        assert split.typed is (name not in ("train.csv", "train.tsv"))


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet", "validation.parquet"],
        ["train-00000-of-00001.parquet", "validation-00000-of-00001-0123abcd.parquet"],
        ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
        ["train/part_a.parquet", "validation/x.parquet"],
        ["train.parquet", "validation.parquet", "old/train.parquet"],
    ],
)
def test_folder_layouts(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        parquet(tmp_path / name)
    source = open_local(str(tmp_path))
    assert sorted(source.names) == ["train", "validation"]
    assert source.read("validation").table.num_rows == 3
    assert source.read("train").table.num_rows == 3


def test_shards_come_in_order_and_empty_ones_are_no_obstacle(tmp_path: Path) -> None:
    parquet(tmp_path / "train-00001-of-00003.parquet", {"text": ["c"], "label": [1]})
    parquet(tmp_path / "train-00000-of-00003.parquet", {"text": ["a", "b"], "label": [0, 1]})
    parquet(tmp_path / "train-00002-of-00003.parquet", pa.table({"text": pa.array([], pa.string()), "label": []}))
    assert read(tmp_path).table["text"].to_pylist() == ["a", "b", "c"]


def test_similar_stems_are_different_splits(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet")
    parquet(tmp_path / "train_2.parquet")
    assert sorted(open_local(str(tmp_path)).names) == ["train", "train_2"]


def test_subset_is_a_folder(tmp_path: Path) -> None:
    parquet(tmp_path / "small" / "train.parquet", {"text": ["s"], "label": [1]})
    parquet(tmp_path / "large" / "train.parquet")
    assert read(tmp_path, subset="small").table.num_rows == 1
    with pytest.raises(DataError, match=r"split 'train' is there more than once \(large/.*small/"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"no such folder.*Did you mean 'small'"):
        open_local(str(tmp_path), subset="smal")


def test_words_for_nothing_stay_words_and_quotes_are_handled(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(',text,label\n0,NA,null\n1,"a ""b"",\nc",None\n2,,x\n')
    table = read(tmp_path / "a.csv").table
    assert table["text"].to_pylist() == ["NA", 'a "b",\nc', None]
    assert table["label"].to_pylist() == ["null", "None", "x"]
    (tmp_path / "a.tsv").write_text('text\tlabel\n"unpaired\t1\nb" and "c\t0\n')
    assert read(tmp_path / "a.tsv").table["text"].to_pylist() == ['"unpaired', 'b" and "c']


def test_a_column_keeps_one_type_over_many_chunks(tmp_path: Path) -> None:
    # The builder reads 10000 rows at a time and would take the first chunk's labels for numbers.
    rows = [f"t{i},{i % 2 if i < 10000 else 'x'}" for i in range(10050)]
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    assert set(read(tmp_path / "a.csv").table["label"].to_pylist()) == {"0", "1", "x"}


def test_strange_names_are_plain_names(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]*{b} ü"
    assert read(parquet(folder / "train.parquet").parent).table.num_rows == 3


def test_byte_order_mark_and_class_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufefftext,label\none,0\n".encode())
    assert read(tmp_path / "a.csv").table.column_names == ["text", "label"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict(ROWS, features=features).to_parquet(tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet").class_names == {"label": ("no", "yes")}


def test_local_files_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    home = tmp_path / "cache"
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home))
    split = read(parquet(tmp_path / "data" / "train.parquet"))
    assert split.table["text"].to_pylist() == ROWS["text"]
    assert list(temporary.iterdir()) == []
    assert not home.exists()
    assert capfd.readouterr() == ("", "")


BROKEN = {
    "cut.parquet": b"PAR1 no more",
    "wide.csv": b"text,label\na,1\nb,2,3,4\n",
    "open.csv": b'text,label\na,1\n"b,2\n',
    "long.csv": b"text,label\nb,2\na,1\nb,2,3\n",
    "cut.jsonl": b'{"text":"a","label":1}\n{"text":"b","lab',
    "latin.csv": "text,label\nä,1\n".encode("latin-1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_without_noise(tmp_path: Path, name: str, capfd: Any) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(DataError, match=f"{name}: (cannot be read as|not UTF-8)") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_strings_that_are_not_utf8_are_named_with_their_row(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"text":"a","label":"x"}\n{"text":"ä","label":"y"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.jsonl, column 'text': not UTF-8 text in row 1"):
        read(tmp_path / "latin.jsonl")
    labels = pa.array([b"x", None, b"\xff"], pa.binary()).view(pa.string())
    parquet(tmp_path / "labels.parquet", pa.table({"text": ["a", "b", "c"], "label": labels}))
    with pytest.raises(DataError, match=r"labels.parquet, column 'label': not UTF-8 text in row 2"):
        read(tmp_path / "labels.parquet")
    (tmp_path / "utf8.jsonl").write_text('{"text":"ä","label":"x"}\n', encoding="utf-8")
    assert read(tmp_path / "utf8.jsonl").table["text"].to_pylist() == ["ä"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "null.jsonl", "none.json", "a.parquet", "blank.csv"])
def test_files_without_rows(tmp_path: Path, name: str) -> None:
    content = {"a.csv": "text,label\n", "a.tsv": "text\tlabel\n\n", "a.jsonl": "\n", "blank.csv": ""}
    content |= {"null.jsonl": "null\nnull\n", "none.json": "[]"}  # pyarrow's reader dies of the first
    if name in content:
        (tmp_path / name).write_text(content[name])
    else:
        parquet(tmp_path / name, pa.table({"text": pa.array([], pa.string())}))
    with pytest.raises(DataError, match=f"{name}: the file has no rows"):
        read(tmp_path / name)


def test_cells_without_a_column_are_never_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nhello, world,1\nyes, no,0\n")
    with pytest.raises(DataError, match=r"2 columns in the header, 3 in the first row.*needs quotes"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("text,label\nhello,1,\nyes,0,\n")  # a comma at the end of every line
    assert read(tmp_path / "a.csv").table.column_names == ["text", "label"]
    (tmp_path / "a.csv").write_text(f"text,label\n{'x' * 200_000},1\nyes,0\n")
    assert read(tmp_path / "a.csv").table.num_rows == 2


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task\.path = ''"):
        open_local("")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        open_local(str(tmp_path / "pipe.csv"))
    with pytest.raises(DataError, match="no such file or folder"):
        open_local(str(tmp_path / "absent"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no data files.*\.parquet"):
        open_local(str(tmp_path))
    with pytest.raises(DataError, match=r"notes\.txt: files ending in '\.txt' are not read"):
        open_local(str(tmp_path / "notes.txt"))
    (tmp_path / "twice.csv").write_text("text,text\na,b\n")
    with pytest.raises(DataError, match="column 'text' more than once"):
        read(tmp_path / "twice.csv")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), OSError("Not enough disk space. Needed: 5 GB")])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    path = parquet(tmp_path / "train.parquet")
    monkeypatch.setattr(datasets.Dataset, "from_parquet", full)
    monkeypatch.setattr(datasets, "load_dataset", full)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for attempt in (lambda: read(path), lambda: open_hub("owner/name")):
        with pytest.raises(UserError, match="no space left on the device"):
            attempt()


# The hub, without a network


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("empty_cache")
def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'nyu-mll/glue': HF_HUB_OFFLINE is set.*'sst2'.*task\.path"):
        open_hub("nyu-mll/glue", "sst2")
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True


@pytest.mark.usefixtures("empty_cache")
def test_no_network_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable() -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", unreachable)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"the hub cannot be reached from here.*task\.path=FOLDER"):
        open_hub("nyu-mll/glue", "sst2")
    assert time.monotonic() - start < 15  # the hub client alone retries for 23 seconds
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_unreachable_endpoint_in_a_fresh_process(tmp_path: Path) -> None:
    """The real client against a closed port: no retries, one line."""
    program = (
        "import time\nfrom rl_exit.data.sources import open_hub\nfrom rl_exit.errors import DataError\n"
        "start = time.monotonic()\n"
        "try:\n    open_hub('nyu-mll/glue', 'sst2')\n"
        "except DataError as error:\n    print(error)\n    assert time.monotonic() - start < 15\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(rl_exit.__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "cannot be reached" in done.stdout
    assert done.stderr == ""


def reachable(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    class Session:
        def head(self, *_: Any, **__: Any) -> None: ...

    def load(*_: Any, **__: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("BuilderConfig 'x' not found. Available: ['a']"), r"subset 'x' is unknown; set task\.subset.*'a'"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "consists of a program"),
        (FileNotFoundError("Dataset 'o/n' doesn't exist on the Hub"), "cannot be loaded: Dataset 'o/n' doesn't exist"),
    ],
)
def test_hub_refusals(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    reachable(monkeypatch, error)
    with pytest.raises(DataError, match=message):
        open_hub("o/n", "x")


def test_hub_splits_keep_their_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    split = datasets.Dataset.from_dict(ROWS, features=features)
    reachable(monkeypatch, datasets.DatasetDict({"train": split, "validation": split}))
    source = open_hub("o/n")
    assert source.names == ("train", "validation")
    assert source.read("train").class_names == {"label": ("no", "yes")}
    assert source.read("validation").table.num_rows == 3


def test_a_folder_that_hides_the_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "o" / "n").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"also a folder here.*task\.name=local"):
        open_hub("o/n")
