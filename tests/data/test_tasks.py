from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rl_exit.config import TaskConfig
from rl_exit.data import tasks
from rl_exit.data.registry import find_task
from rl_exit.data.sources import RawSplit, Source
from rl_exit.data.tasks import Task, TextSplit, list_tasks, load_task, tokenise
from rl_exit.errors import DataError

TEXTS = ["red cat", "blue dog", "green cat", "old dog", "new cat", "big dog"]
COLOURS = [0, 1, 0, 1, 0, 1]


def folder(path: Path, **splits: Mapping[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, columns in splits.items():
        pq.write_table(pa.table(dict(columns)), path / f"{name}.parquet")
    return path


def rows(labels: Any = COLOURS, **more: Any) -> dict[str, Any]:
    return {"text": TEXTS[: len(labels)], "label": labels, **more}


def load(path: Path, seed: int = 0, name: str = "local", **settings: Any) -> Task:
    return load_task(TaskConfig(name=name, path=str(path), **settings), seed)


# Labels and classes


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["b", "a", "b", "a", "b", "a"], ("a", "b"), [1, 0, 1, 0, 1, 0]),
        (COLOURS, ("0", "1"), COLOURS),
        ([2, 10, 2, 10, 2, 10], ("2", "10"), COLOURS),
        ([-1, 0, 1, -1, 0, 1], ("-1", "0", "1"), [0, 1, 2, 0, 1, 2]),
        ([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], ("0", "1"), COLOURS),
        ([False, True, False, True, False, True], ("0", "1"), COLOURS),
    ],
)
def test_classes_found_in_train(tmp_path: Path, labels: Any, names: tuple[str, ...], numbers: list[int]) -> None:
    task = load(folder(tmp_path, train=rows(labels), dev=rows(labels)))
    assert task.label_names == names
    for split in task.splits.values():
        assert split.labels.tolist() == numbers
        assert split.labels.dtype == np.int64


def test_csv_labels_are_numbers_only_if_all_are(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na b,10\nc d,2\ne f,10\n")
    (tmp_path / "dev.csv").write_text("text,label\na b,2\n")
    task = load(tmp_path)
    assert task.label_names == ("2", "10")
    assert task.splits["dev"].labels.tolist() == [0]
    (tmp_path / "train.csv").write_text("text,label\na b, +10\nc d,2.0\ne f,-1.\n")
    assert load(tmp_path).label_names == ("-1", "2", "10")
    # Beyond 2**53 floats, and beyond 2**63 integers, would take two labels for one.
    for numbers in (("9007199254740992", "9007199254740993"), (str(10**30), str(10**30 + 1))):
        (tmp_path / "long.csv").write_text("text,label\n" + "".join(f"a b,{n}\n" for n in numbers * 2))
        assert load(tmp_path / "long.csv").label_names == numbers
    (tmp_path / "train.csv").write_text("text,label\na b,10\nc d,x\ne f,10\n")
    with pytest.raises(DataError, match=r"dev\.csv, column 'label': labels are integers here, but text in train"):
        load(tmp_path)


def test_names_come_from_the_setting_first(tmp_path: Path) -> None:
    path = folder(tmp_path, train=rows(), dev=rows())
    assert load(path, labels=("no", "yes", "never")).label_names == ("no", "yes", "never")
    words = folder(tmp_path / "words", train=rows(["no", "yes"] * 3), dev=rows(["no", "yes"]))
    assert load(words, labels=("yes", "no")).splits["dev"].labels.tolist() == [1, 0]
    digits = folder(tmp_path / "digits", train=rows([1, 5] * 3), dev=rows([5]))
    task = load(digits, labels=("5", "1"))
    assert (task.label_names, task.splits["dev"].labels.tolist()) == (("5", "1"), [0])


def test_names_come_from_a_class_label_feature(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for name in ("train", "dev"):
        datasets.Dataset.from_dict(rows(), features=features).to_parquet(tmp_path / f"{name}.parquet")
    assert load(tmp_path).label_names == ("no", "yes")


def test_names_come_from_the_column_beside(tmp_path: Path) -> None:
    named = rows([3, 1] * 3, label_name=["cat", "dog"] * 3)
    task = load(folder(tmp_path, train=named, dev=rows([1, 3])))
    assert task.label_names == ("dog", "cat")
    assert task.splits["dev"].labels.tolist() == [0, 1]
    muddled = rows([3, 1] * 3, label_name=["cat", "dog", "cow"] * 2)
    assert load(folder(tmp_path / "b", train=muddled, dev=rows([1, 3]))).label_names == ("1", "3")


def test_categorical_columns_are_text(tmp_path: Path) -> None:
    labels = pa.array(["x", "y"] * 3).dictionary_encode()
    task = load(folder(tmp_path, train=rows(labels), dev=rows(["y"])))
    assert task.label_names == ("x", "y")
    assert task.splits["dev"].labels.tolist() == [1]


WRONG_LABELS: list[tuple[Any, Any, dict[str, Any], str]] = [
    (COLOURS, [0, 7], {}, r"dev\.parquet, column 'label': label 7 in row 1 .* does not occur in train"),
    (["a", "b"] * 3, ["a", "bb"], {}, r"label 'bb' in row 1 .* does not occur in train\. Did you mean 'b'"),
    (COLOURS, [0, 2], {"labels": ("no", "yes")}, r"label 2 in row 1 .* outside the classes.*0\.\.1 \(no, yes\)"),
    (["no", "yse"] * 3, ["no"], {"labels": ("no", "yes")}, r"label 'yse' in row 1 .* Did you mean 'yes'"),
    (COLOURS, ["a"], {}, "labels are text here, but integers in train"),
    ([0, None] * 3, [0], {}, r"train\.parquet.*the label is missing in row 1 .*3 of 6"),
    ([0.0, float("nan")] * 3, [0], {}, "the label is missing in row 1"),
    (COLOURS, [0, None], {}, r"dev\.parquet.*the label is missing in row 1"),
    ([0, -1] * 3, [0], {"labels": ("no", "yes")}, "the label is missing in row 1"),
    ([None] * 6, [0], {}, "the label is missing in row 0"),
    ([0.5, 1.0] * 3, [0], {}, r"label 0\.5 in row 0 .* is no class"),
    ([[0], [1]] * 3, [0], {}, "a label is an integer or a string, the column holds list"),
    ([1.0, float("inf")] * 3, [1], {}, "an integer of at most 64 bits"),
    ([1e30, 1.0] * 3, [1], {}, "an integer of at most 64 bits"),
    ([1] * 6, [1], {}, "at least 2 classes are needed, there is only 1"),
    ([1] * 6, [1], {"labels": ("no", "yes")}, "at least 2 classes must occur in train, there is only 'yes'"),
    (COLOURS, [0], {"labels": ("one",)}, r"task\.labels: at least 2 classes"),
    (COLOURS, [0], {"labels": ("a", "a")}, r"task\.labels: class 'a' is named twice"),
]


@pytest.mark.parametrize(("train", "dev", "settings", "message"), WRONG_LABELS)
def test_wrong_labels(tmp_path: Path, train: Any, dev: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(folder(tmp_path, train=rows(train), dev=rows(dev)), **settings)
    assert "\n" not in str(caught.value)


def test_mixed_types_in_jsonl(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text":"a","label":1}\n{"text":"b","label":"x"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl, column 'label': (a label is an integer|cannot be read)"):
        load(tmp_path)


def test_a_column_of_ids_is_no_label(tmp_path: Path) -> None:
    train = {"text": [f"text {i}" for i in range(60)], "label": [f"id {i}" for i in range(60)]}
    with pytest.raises(DataError, match=r"60 different labels in 60 rows.*task\.label names another"):
        load(folder(tmp_path, train=train))


# Texts and columns


def test_pairs_and_columns_by_name(tmp_path: Path) -> None:
    columns = {"premise": TEXTS, "claim": TEXTS[::-1], "verdict": COLOURS}
    path = folder(tmp_path, train=columns, dev=columns)
    task = load(path, text="premise", text_pair="claim", label="verdict")
    assert task.splits["train"].texts == TEXTS
    assert task.splits["train"].pairs == TEXTS[::-1]
    assert load(path, text="claim", label="verdict").splits["train"].pairs is None


WRONG_TEXTS: list[tuple[dict[str, Any], str]] = [
    ({"text": range(6)}, r"column 'text': texts are expected, the column holds numbers"),
    ({"text": [1.5] * 6}, "the column holds numbers"),
    ({"text": [["a"]] * 6}, "the column holds list"),
    ({"text": ["a", None] * 3}, r"column 'text': the text is missing in row 1 .*3 of 6"),
    ({"text": pa.nulls(6)}, "all texts are missing"),
    ({"text": [" "] * 6}, "all texts are empty"),
]


@pytest.mark.parametrize(("columns", "message"), WRONG_TEXTS)
def test_wrong_texts(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(folder(tmp_path, train={**rows(), **columns}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\n1,0\n2.5e3,1\n", r"column 'text': texts are expected, the column holds numbers"),
        ("text,label\na,0\n,1\n", "the text is missing in row 1"),
        ("text,label\na,0\nb\n", "the label is missing in row 1"),
        ("a;0\nb;1\n", r"no column 'text' \(task\.text\)\..* Columns there: a;0"),
    ],
)
def test_wrong_csv(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_missing_columns_name_the_nearest(tmp_path: Path) -> None:
    path = folder(tmp_path, train={"texts": TEXTS, "label": COLOURS}, dev={"texts": TEXTS})
    with pytest.raises(DataError, match=r"no column 'text' \(task\.text\)\. Did you mean 'texts'\? Columns there: tex"):
        load(path)
    with pytest.raises(DataError, match=r"dev\.parquet: no column 'label' \(task\.label\)"):
        load(path, text="texts")
    with pytest.raises(DataError, match=r"no column 'other' \(task\.text_pair\)"):
        load(path, text="texts", text_pair="other")


def test_an_empty_split(tmp_path: Path) -> None:
    nothing = {"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}
    with pytest.raises(DataError, match=r"dev\.parquet: the file has no rows"):
        load(folder(tmp_path, train=rows(), dev=nothing))


# Splits


@pytest.mark.parametrize("name", ["dev", "validation", "valid", "val"])
def test_dev_by_its_usual_names(tmp_path: Path, name: str) -> None:
    task = load(folder(tmp_path, **{"train": rows(), name: rows([0]), "test": rows([1, 0])}))
    assert {key: len(split) for key, split in task.splits.items()} == {"train": 6, "dev": 1, "test": 2}


def many(tmp_path: Path) -> Path:
    labels = [0] * 700 + [1] * 290 + [2] * 10
    return folder(tmp_path, train={"text": [f"text {i}" for i in range(1000)], "label": labels})


@pytest.mark.parametrize("single", [False, True])
def test_dev_is_cut_by_class_and_keeps_ids(tmp_path: Path, single: bool) -> None:
    path = many(tmp_path)
    task = load(path / "train.parquet" if single else path)
    train, dev = task.splits["train"], task.splits["dev"]
    assert set(task.splits) == {"train", "dev"}
    assert np.bincount(dev.labels).tolist() == [70, 29, 1]
    assert sorted([*train.ids, *dev.ids]) == list(range(1000))
    for split in (train, dev):
        assert split.texts == [f"text {i}" for i in split.ids]
        assert (np.diff(split.ids) > 0).all()
    assert "dev is cut from train" in task.description
    assert load(path).splits["dev"].ids.tolist() == dev.ids.tolist()
    assert load(path, seed=1).splits["dev"].ids.tolist() != dev.ids.tolist()


def test_cutting_dev_leaves_every_class_in_train(tmp_path: Path) -> None:
    labels = [0, 0, 0, 0, 1, 2]
    task = load(folder(tmp_path, train=rows(labels)), dev_fraction=0.9)
    assert set(task.splits["train"].labels.tolist()) == {0, 1, 2}
    assert len(task.splits["dev"]) == 3
    with pytest.raises(DataError, match="too few to cut dev from"):
        load(folder(tmp_path / "b", train=rows([0, 1])))


def test_limits_are_nested_balanced_and_independent(tmp_path: Path) -> None:
    path = many(tmp_path)
    small, large = (load(path, max_train=n).splits["train"] for n in (100, 300))
    assert (len(small), len(large)) == (100, 300)
    assert set(small.ids) < set(large.ids)
    assert np.abs(np.bincount(small.labels) - [70, 29, 1]).max() <= 2
    assert set(load(path, max_train=3).splits["train"].labels.tolist()) == {0, 1, 2}
    assert load(path, max_train=100, max_dev=5).splits["train"].ids.tolist() == small.ids.tolist()
    assert len(load(path, max_dev=5).splits["dev"]) == 5
    assert small.texts == [f"text {i}" for i in small.ids]
    assert len(load(path, max_train=5000).splits["train"]) == 900
    assert "train 100 of 900" in load(path, max_train=100).description
    assert load(path, max_train=100, seed=1).splits["train"].ids.tolist() != small.ids.tolist()


@pytest.mark.parametrize("labels", [[-1, -1], [None, None], None])
def test_a_test_split_that_withholds_labels_is_dropped(tmp_path: Path, labels: Any) -> None:
    withheld = {"text": TEXTS[:2]} if labels is None else {"text": TEXTS[:2], "label": pa.array(labels, pa.int64())}
    path = folder(tmp_path, train=rows(), dev=rows(), test=withheld)
    task = load(path)
    assert set(task.splits) == {"train", "dev"}
    assert "has no labels and is left out" in task.description
    with pytest.raises(DataError, match=r"test\.parquet: (task\.test = 'test' has no labels|no column 'label')"):
        load(path, test="test")


def test_a_test_split_with_some_labels_missing_is_an_error(tmp_path: Path) -> None:
    path = folder(tmp_path, train=rows(), dev=rows(), test=rows([0, None]))
    with pytest.raises(DataError, match=r"test\.parquet.*the label is missing in row 1"):
        load(path)


def test_split_names_can_be_chosen(tmp_path: Path) -> None:
    path = folder(tmp_path, big=rows(), test=rows([0, 1]), odd=rows([1]))
    task = load(path, train="test", dev="odd")
    assert {key: len(split) for key, split in task.splits.items()} == {"train": 2, "dev": 1}
    assert len(load(path, train="big", dev="odd", test="odd").splits["test"]) == 1
    with pytest.raises(DataError, match=r"no split 'train' \(task\.train\)\..*Found: big, odd, test"):
        load(path)
    with pytest.raises(DataError, match=r"no split 'ood' \(task\.dev\)\. Did you mean 'odd'"):
        load(path, train="big", dev="ood")
    with pytest.raises(DataError, match=r"task\.test = 'big' is the split that is trained on"):
        load(path, train="big", test="big")


# Names


def test_a_registered_name_brings_its_columns_to_local_files(tmp_path: Path) -> None:
    columns = {"sentence1": TEXTS, "sentence2": TEXTS, "label": COLOURS}
    path = folder(tmp_path, train=columns, validation=columns)
    task = load(path, name="mrpc")
    assert (task.metric, task.label_names) == ("f1", ("not_equivalent", "equivalent"))
    assert task.splits["dev"].pairs == TEXTS
    assert load(path, name="mrpc", metric="accuracy").metric == "accuracy"
    assert load(path, name="owner/name", text="sentence1").label_names == ("0", "1")
    with pytest.raises(DataError, match=r"no column 'sentence' \(task\.text\)\. Did you mean 'sentence[12]'"):
        load(path, name="sst2")


def test_names_and_paths_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'sst' is no registered task\. Did you mean 'sst2'.*mnli.*owner/name"):
        load_task(TaskConfig(name="sst"), 0)
    with pytest.raises(DataError, match=r"looks like a path.*task\.name=local"):
        load_task(TaskConfig(name="./data/mine"), 0)
    with pytest.raises(DataError, match=r"local files need task\.path"):
        load_task(TaskConfig(name="local"), 0)
    with pytest.raises(DataError, match=r"'stackoverflow' is not on the hub and needs task\.path"):
        load_task(TaskConfig(name="stackoverflow"), 0)
    with pytest.raises(DataError, match="no such file or folder"):
        load(tmp_path / "absent", name="rte")
    with pytest.raises(DataError, match=r"task\.path has no meaning for the built-in task"):
        load(tmp_path, name="docstrings")


def test_registry_answers_what_the_command_shows() -> None:
    known = {task.name: task for task in list_tasks()}
    wanted = "docstrings rte mrpc sst2 qnli qqp mnli cola stackoverflow mcid clinc150 banking77 trec ag_news"
    assert list(known) == [*wanted.split(), "documentation", "alpaca", "dolly", "local"]
    assert {name for name, task in known.items() if task.kind == "generation"} == {"documentation", "alpaca", "dolly"}
    assert {name for name, task in known.items() if task.metric == "f1"} == {"mrpc", "qqp"}
    assert known["cola"].metric == "mcc"
    assert known["mnli"].columns == ("premise", "hypothesis", "label")
    assert known["rte"].origin == "hub: nyu-mll/glue [rte]"
    assert not known["docstrings"].needs_hub
    for task in known.values():
        assert task.labels is None or len(task.labels) == task.classes
    assert find_task("owner/name").hub == "owner/name"


def test_listing_tasks_imports_neither_torch_nor_datasets() -> None:
    program = (
        "import sys; from rl_exit.data import list_tasks; list_tasks(); print({'torch', 'datasets'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def glue(monkeypatch: pytest.MonkeyPatch, splits: dict[str, tuple[list[int], str]]) -> list[tuple[Any, ...]]:
    """Stand in for the hub: GLUE's MNLI columns, ClassLabel labels."""
    calls: list[tuple[Any, ...]] = []

    def raw(name: str) -> RawSplit:
        labels, prefix = splits[name]
        texts = [f"{prefix} {i}" for i in range(len(labels))]
        table = pa.table({"premise": texts, "hypothesis": texts, "label": labels})
        return RawSplit(name, table, {"label": ("entailment", "neutral", "contradiction")})

    def open_hub(*given: Any) -> Source:
        calls.append(given)
        return Source("the hub", tuple(splits), raw)

    monkeypatch.setattr(tasks, "open_hub", open_hub)
    return calls


def test_mnli_takes_validation_matched_and_drops_unlabelled_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = glue(
        monkeypatch,
        {
            "train": ([0, 1, 2, 0], "train"),
            "validation_mismatched": ([2], "mismatched"),
            "validation_matched": ([1, 2], "matched"),
            "test": ([-1, -1], "test"),
        },
    )
    task = load_task(TaskConfig(name="mnli"), 0)
    assert calls == [("nyu-mll/glue", "mnli", None)]
    assert set(task.splits) == {"train", "dev"}
    assert task.splits["dev"].texts == ["matched 0", "matched 1"]
    other = load_task(TaskConfig(name="mnli", test="validation_mismatched"), 0)
    assert other.splits["test"].texts == ["mismatched 0"]


# Tokenising


def tokenizer(specials: bool = True, segments: bool = True) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(" ".join(TEXTS).split())]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]"}
    if specials:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if segments else [])]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=inputs, **names)


def split_of(texts: list[str], pairs: list[str] | None = None) -> TextSplit:
    count = len(texts)
    return TextSplit(np.arange(count) + 5, texts, pairs, np.arange(count) % 2)


@pytest.mark.parametrize("pairs", [None, TEXTS[::-1]])
@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("longest", [4, 64])
def test_tokenised_equals_text_by_text(pairs: list[str] | None, segments: bool, longest: int) -> None:
    words = tokenizer(segments=segments)
    split = split_of([f"{text} red blue" for text in TEXTS], pairs)
    instances = tokenise(split, words, longest)
    assert instances.ids.tolist() == split.ids.tolist()
    assert instances.labels.tolist() == split.labels.tolist()
    assert (instances.token_types is not None) is segments
    for row, text in enumerate(split.texts):
        alone = words(text, pairs and pairs[row], truncation=True, max_length=longest)
        part = slice(instances.offsets[row], instances.offsets[row + 1])
        assert instances.tokens[part].tolist() == alone["input_ids"]
        if instances.token_types is not None:
            assert instances.token_types[part].tolist() == alone["token_type_ids"]
    assert instances.lengths.max() <= longest
    assert set(instances.batch([0, 1])) == set(words.model_input_names)


def test_blank_texts_without_special_tokens_get_one_position() -> None:
    words = tokenizer(specials=False, segments=True)
    instances = tokenise(split_of(["", "red cat"]), words, 8)
    assert instances.lengths.tolist() == [1, 2]
    batch = instances.batch([0, 1])
    assert batch["input_ids"][0, 0] == 1  # [UNK]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_same_text_has_the_same_fingerprint() -> None:
    words = tokenizer()
    assert tokenise(split_of(TEXTS), words, 16).fingerprint == tokenise(split_of(TEXTS), words, 16).fingerprint
    assert tokenise(split_of(TEXTS), words, 16).fingerprint != tokenise(split_of(TEXTS[::-1]), words, 16).fingerprint


# Real data of the development machines


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "sizes", "classes", "metric"),
    [
        ("stackoverflow", {"train": 18000, "dev": 1000, "test": 1000}, 20, "accuracy"),
        ("sst2", {"train": 67349, "dev": 872}, 2, "accuracy"),
        ("mrpc", {"train": 3668, "dev": 408, "test": 1725}, 2, "f1"),
    ],
)
def test_real_tasks(shared_data: Path, name: str, sizes: dict[str, int], classes: int, metric: str) -> None:
    task = load(shared_data / "data" / name, name=name)
    assert {key: len(split) for key, split in task.splits.items()} == sizes
    assert len(task.label_names) == classes == len(np.unique(task.splits["train"].labels))
    assert task.metric == metric
    assert (task.splits["train"].pairs is not None) is (name == "mrpc")
    if name == "stackoverflow":
        first = task.splits["train"]
        assert (first.texts[0], task.label_names[first.labels[0]]) == (
            "How does wordpress password hash work?",
            "wordpress",
        )
