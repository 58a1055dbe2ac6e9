"""Examples for decoders: Alpaca's format, templates, local files, and where prompt and response part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rl_exit.config import TaskConfig
from rl_exit.data import documentation, tasks
from rl_exit.data.docstrings import Topic
from rl_exit.data.examples import ExampleSplit, alpaca_prompt, encode_prompts, load_examples, tokenise_examples
from rl_exit.data.sources import open_local
from rl_exit.data.tasks import load_task, task_kind
from rl_exit.errors import DataError
from rl_exit.models.pretrained import find_source, load_tokenizer
from rl_exit.models.scratch import make_decoder


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [{"instruction": f"Say {n}.", "input": "" if n % 2 else "loudly", "output": f"It is {n}."} for n in range(20)]


def test_the_prompt_is_that_of_stanford_alpaca():
    assert alpaca_prompt("Count.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCount.\n\n### Response:"
    )
    assert alpaca_prompt("Count.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCount.\n\n### Input:\n1 2\n\n### Response:"
    )
    assert alpaca_prompt("Count.", " \n") == alpaca_prompt("Count.")


def test_alpaca_is_trained_on_and_dolly_tested_on(tmp_path):
    write(tmp_path / "alpaca" / "train.jsonl", ROWS)
    dolly = [{"instruction": "Why?", "context": "", "response": "Because.", "category": "qa"}]
    write(tmp_path / "dolly" / "test.jsonl", dolly)
    config = TaskConfig(
        name="alpaca", path=str(tmp_path / "alpaca"), test_name="dolly", test_path=str(tmp_path / "dolly"), max_train=9
    )
    task = load_examples(config, seed=3)
    assert {role: len(split) for role, split in task.splits.items()} == {"train": 9, "dev": 2, "test": 1}
    assert set(task.splits["train"].ids) & set(task.splits["dev"].ids) == set()
    row = int(task.splits["dev"].ids[0])
    assert task.splits["dev"].prompts[0] == alpaca_prompt(str(ROWS[row]["instruction"]), str(ROWS[row]["input"]))
    assert task.splits["dev"].responses[0] == ROWS[row]["output"]
    assert task.splits["test"].prompts == [alpaca_prompt("Why?")] and "dolly" in task.description
    again = load_examples(config, seed=3)
    assert np.array_equal(again.splits["train"].ids, task.splits["train"].ids)
    assert not np.array_equal(load_examples(config, seed=4).splits["train"].ids, task.splits["train"].ids)


def test_a_hub_dataset_is_read_by_its_id_with_a_template(tmp_path, monkeypatch):
    write(tmp_path / "faq" / "train.jsonl", [{"q": f"Q{n}?", "a": f"A{n}"} for n in range(10)])
    asked = []

    def open_hub(*given: object) -> object:
        asked.append(given)
        return open_local(str(tmp_path / "faq"))

    monkeypatch.setattr(tasks, "open_hub", open_hub)
    config = TaskConfig(name="someone/faq", kind="generation", template="Question: {q}\nAnswer:", response="a")
    task = load_examples(config, 0)
    assert asked == [("someone/faq", None, None)] and len(task.splits["train"]) == 9
    assert all(text.startswith("Question: Q") and text.endswith("Answer:") for text in task.splits["train"].prompts)


def test_a_template_names_the_columns_of_local_files(tmp_path):
    path = write(tmp_path / "faq.jsonl", [{"q": f"Q{n}?", "a": f"A{n}"} for n in range(10)])
    given = {"name": "local", "kind": "generation", "path": str(path), "response": "a"}
    task = load_examples(TaskConfig(**given, template="Question: {q}\nAnswer:"), 0)
    assert task.splits["train"].prompts[0].startswith("Question: Q") and task.splits["train"].responses[0][0] == "A"
    with pytest.raises(DataError, match=r"\{quest\} is no column.*Columns there: q, a"):
        load_examples(TaskConfig(**given, template="{quest}"), 0)
    with pytest.raises(DataError, match="names no column"):
        load_examples(TaskConfig(**given, template="Answer:"), 0)
    with pytest.raises(DataError, match=r"task\.template: .*brace"):
        load_examples(TaskConfig(**given, template="{q"), 0)
    with pytest.raises(DataError, match="no column 'instruction'"):
        load_examples(TaskConfig(**given), 0)


def test_ready_prompts_are_left_as_they_are(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "Once", "response": " upon"}, {"prompt": "One", "response": " day"}])
    task = load_examples(TaskConfig(name="local", kind="generation", path=str(path), dev_fraction=0.5), 0)
    assert task.splits["train"].prompts[0] in ("Once", "One")


def test_a_task_is_for_one_thing(tmp_path):
    assert task_kind(TaskConfig(name="alpaca")) == "generation" and task_kind(TaskConfig(name="sst2")) != "generation"
    assert task_kind(TaskConfig(name="owner/texts", kind="generation")) == "generation"
    with pytest.raises(DataError, match="is for classification"):
        task_kind(TaskConfig(name="sst2", kind="generation"))
    with pytest.raises(DataError, match="responses, not labels"):
        load_task(TaskConfig(name="alpaca", path=str(tmp_path)), 0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("scratch")
    sizes = {"layers": 2, "hidden": 16, "heads": 2, "vocabulary": 300, "max_length": 64}
    make_decoder(folder, ["the cat sat on the mat"] * 20, **sizes, seed=0)
    return load_tokenizer(find_source(str(folder)))


def test_labels_are_the_lengths_of_the_prompts(tokenizer):
    split = ExampleSplit(np.array([4, 7, 9]), ["the cat", "", "x" * 80], [" sat on", "mat", "no room"])
    instances, left_out = tokenise_examples(split, tokenizer, 64)
    assert left_out == 1 and instances.ids.tolist() == [4, 7]
    for row, (prompt, response) in enumerate(zip(split.prompts[:2], split.responses[:2], strict=True)):
        tokens = instances.tokens[instances.offsets[row] : instances.offsets[row + 1]].tolist()
        start = int(instances.labels[row])
        assert tokens[:start] == encode_prompts([prompt], tokenizer)[0] and tokens[0] == tokenizer.bos_token_id
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[start:-1]) == response
    short, _ = tokenise_examples(split.take(np.array([0])), tokenizer, 5)
    assert short.lengths.tolist() == [5] and short.tokens[-1] != tokenizer.eos_token_id
    with pytest.raises(DataError, match="none of 1 examples has room"):
        tokenise_examples(split.take(np.array([2])), tokenizer, 64)


def test_the_built_in_text_needs_no_download_and_shares_no_file(monkeypatch):
    monkeypatch.setattr(documentation, "TOPICS", (Topic("server", ("uvicorn",)), Topic("client", ("requests",))))
    monkeypatch.setattr(documentation, "SIZES", {"train": 30, "dev": 3, "test": 3})
    task, again = documentation.build(), documentation.build()
    assert {role: len(split) > 0 for role, split in task.splits.items()} == dict.fromkeys(
        ("train", "dev", "test"), True
    )
    train = task.splits["train"]
    assert train.responses == again.splits["train"].responses
    assert all(len(prompt.split(" ")) == 8 for prompt in train.prompts)
    assert not set(train.prompts) & set(task.splits["test"].prompts)
    monkeypatch.setattr(documentation, "SIZES", {"train": 90000, "dev": 3, "test": 3})
    with pytest.raises(DataError, match="needs 30000 docstrings in train"):
        documentation.build()
