from __future__ import annotations

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rl_exit.config import RunConfig, dump_config
from rl_exit.errors import RunError, UserError
from rl_exit.evaluation import choose_threshold, evaluate
from rl_exit.report import write_report

LAYERS = 6
NASTY = "</script><img src=x onerror=alert(1)>&<b>x</b>"


def synthetic_split(rng: np.random.Generator, count: int, classes: int, threshold: float) -> dict[str, Any]:
    """A split whose exits get better with depth and whose policy follows the margin."""
    labels = rng.integers(0, classes, count)
    ease = rng.normal(0.0, 1.6, (count, 1)) + rng.normal(0.0, 0.7, classes)[labels][:, None]
    signal = ease + np.linspace(1.2, 4.2, LAYERS) + rng.normal(0.0, 0.5, (count, LAYERS))
    logits = rng.normal(0.0, 1.0, (count, LAYERS, classes)).astype(np.float32)
    logits[np.arange(count), :, labels] += signal
    shifted = np.log(np.exp(logits).sum(-1))
    losses = shifted - logits[np.arange(count), :, labels]
    ordered = np.sort(logits, axis=-1)
    exit_logits = (ordered[..., -1] - ordered[..., -2])[:, :-1] * 1.5 - 3.0
    result = evaluate(labels, logits, losses, exit_logits, "accuracy", threshold)
    if threshold == 0.5:
        chosen = choose_threshold(result.curve, result.full_depth_score, 0.005)
        result = evaluate(labels, logits, losses, exit_logits, "accuracy", chosen)
    return result.to_dict()


def synthetic_metrics(rng: np.random.Generator) -> pa.Table:
    rows: list[tuple[str, int, int, float, str, float, float]] = []
    for step in range(900):
        rows.append(
            ("init", 0, step, step / 300, "loss", 0.8 + 1.6 * math.exp(-step / 150) + rng.normal(0, 0.06), step)
        )
        rows.append(("init", 0, step, step / 300, "lr", 5e-5 * (1 - step / 900), step))
    for turn in (1, 2):
        for step in range(150):
            part = 1 - math.exp(-step / 40)
            rows += [
                ("policy", turn, step, step / 30, "return", -1.0 + 0.3 * part + rng.normal(0, 0.01), step),
                ("policy", turn, step, step / 30, "mean_exit_layer", 4.5 - 1.9 * part + rng.normal(0, 0.05), step),
                ("policy", turn, step, step / 30, "entropy", 0.6 - 0.3 * part + rng.normal(0, 0.01), step),
                ("policy", turn, step, step / 30, "grad_norm", 0.2 + rng.random(), step),
            ]
        rows += [
            ("task", turn, step, step / 300, "loss", 0.7 - 0.1 * turn + rng.normal(0, 0.06), step)
            for step in range(300)
        ]
        for name, value in (
            ("score", 0.79),
            ("full_depth_score", 0.795),
            ("mean_exit_layer", 2.9),
            ("saved_layers", 0.52),
        ):
            rows.append(("dev", turn, 0, 0.0, name, value + 0.01 * turn, 0.0))
    names = ("phase", "round", "step", "epoch", "metric", "value", "time")
    return pa.table({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


def make_run(folder: Path, *, label: str = "numpy.linalg", classes: int = 8, name: str = "docstrings") -> Path:
    """A finished run directory with realistic random contents."""
    rng = np.random.default_rng(0)
    dev = synthetic_split(rng, 600, classes, 0.5)
    test = synthetic_split(rng, 1200, classes, dev["threshold"])
    labels = [label, *(f"library.{index}" for index in range(1, classes))]
    init = {
        split: {
            "exit_scores": [value - 0.02 for value in result["exit_scores"]],
            "exit_losses": [value + 0.05 for value in result["exit_losses"]],
        }
        for split, result in (("dev", dev), ("test", test))
    }
    keys = ("full_depth_score", "score", "mean_exit_layer", "saved_layers", "oracle_score")
    results = {
        "task": name,
        "run_name": name,
        "algorithm": "pg",
        "num_layers": LAYERS,
        "seed": 0,
        "versions": {"rl-exit": "0.1.0", "torch": "2.8.0", "ray": "2.55.0", "python": "3.11.7"},
        "dev": {key: dev[key] for key in keys},
        "test": {key: test[key] for key in keys},
        "threshold": dev["threshold"],
        "initial_full_depth": {split: init[split]["exit_scores"][-1] for split in init},
        "seconds": {"data": 8.2, "init": 141.0, "store": 12.5, "policy": 38.0, "task": 95.0, "evaluation": 6.1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    evaluation = {"dev": dev, "test": test, "label_names": labels, "init": init}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    config = RunConfig.model_validate({"seed": 3, "policy": {"epochs": 7}})
    (folder / "config.yaml").write_text(dump_config(config))
    pq.write_table(synthetic_metrics(rng), folder / "metrics.parquet")
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


class Page(HTMLParser):
    """Elements, ids and the visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    @property
    def plain(self) -> str:
        return " ".join(self.text.split())


def written(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report" / "index.html"
    return Page(path.read_text(encoding="utf-8"))


def flat_figures(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return [figure for value in tree.values() for figure in ([value] if "data" in value else value.values())]


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_page_is_complete(run_dir: Path) -> None:
    page = written(run_dir)
    results = json.loads((run_dir / "results.json").read_text())
    row = results["test"]
    assert (
        f"{row['mean_exit_layer']:.2f} of 6 layers on average: {100 * row['saved_layers']:.1f} % of the layers"
        in page.plain
    )
    assert f"{100 * row['score']:.2f} % with exits" in page.plain
    ids = [attrs["data-figure"] for _, attrs in page.tags if "data-figure" in attrs]
    assert {"trade-off", "histogram", "by-memorized", "by-class", "exit-scores", "exit-losses", "seconds"} <= set(ids)
    assert sorted(ids) == sorted(page.figures)
    for title in ("Initialisation", "Policy phase", "Task phase", "Dev split after each round", "Mean return"):
        assert title in page.text
    assert "policy.epochs" in page.text and "2 settings differ from the defaults" in page.plain
    assert "2.55.0" in page.text and "5 min 01 s" in page.text


def test_where_the_time_went(run_dir: Path) -> None:
    page = write_report(run_dir).read_text(encoding="utf-8")
    total, tuning = 8.2 + 141.0 + 12.5 + 38.0 + 95.0 + 6.1, 141.0 + 95.0
    assert f"{total / tuning:.2f} times its fine-tuning" in page
    assert f"<td>2 min 21 s</td><td>{14100 / total:.1f} %</td>" in page
    change(run_dir / "results.json", seconds={"init": 0.4, "round-1-policy": 9.0})
    assert "its fine-tuning" not in write_report(run_dir).read_text(encoding="utf-8"), "none was done here"


def test_page_loads_nothing(run_dir: Path) -> None:
    page = written(run_dir)
    links = [attrs.get(name) for _, attrs in page.tags for name in ("src", "href", "action", "data", "srcset")]
    assert all(link.startswith("#") for link in links if link)
    assert not {"link", "iframe", "img", "base", "object"} & {tag for tag, _ in page.tags}
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv"))
    assert policy and "default-src 'none'" in policy and "http" not in policy
    assert len(page.scripts) == 3 and len(page.scripts[1]) > 1_000_000


def test_page_is_accessible(run_dir: Path) -> None:
    page = written(run_dir)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = [attrs[name] for _, attrs in page.tags for name in ("aria-labelledby", "for") if name in attrs]
    assert set(wanted) <= set(ids)
    assert {str(attrs["href"])[1:] for tag, attrs in page.tags if tag == "a"} <= set(ids)
    assert page.tags[0] == ("html", {"lang": "en"})


def test_figures_are_valid_plotly(run_dir: Path) -> None:
    go = pytest.importorskip("plotly.graph_objects")
    shown = flat_figures(written(run_dir).figures)
    assert len(shown) > 18
    for figure in shown:
        go.Figure(figure)
    with pytest.raises(ValueError, match="bogus"):
        go.Figure({"data": [{"type": "scatter", "bogus": 1}]})


def test_figures_show_the_evaluation(run_dir: Path) -> None:
    figures = written(run_dir).figures
    split = json.loads((run_dir / "evaluation.json").read_text())["test"]
    traces = {trace["name"]: trace for trace in figures["trade-off"]["test"]["data"]}
    point = traces["chosen operating point"]
    assert point["x"] == [pytest.approx(split["mean_exit_layer"], rel=1e-6)]
    assert point["y"] == [pytest.approx(100 * split["score"], rel=1e-6)]
    assert len(traces["learned exits, every threshold"]["x"]) == len(split["curve"])
    stacked = np.sum([trace["customdata"] for trace in figures["histogram"]["test"]["data"]], axis=0)
    assert stacked.tolist() == split["exit_histogram"]
    heat = figures["by-class"]["test"]["data"][0]
    assert np.allclose(np.sum(heat["z"], axis=1), 100, atol=1e-3)
    assert sorted(map(tuple, heat["customdata"])) == sorted(map(tuple, split["histogram_by_class"]))


def test_names_are_shown_and_never_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", label=NASTY, name=NASTY)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("algorithm: pg", f"algorithm: '{NASTY}'"))
    change(folder / "results.json", versions={NASTY: NASTY}, algorithm=NASTY, seconds={NASTY: 1.0})
    page = written(folder)
    assert NASTY in page.text
    assert not any(tag in ("img", "b") and "onerror" in attrs for tag, attrs in page.tags)
    assert len(page.scripts) == 3
    assert "<" not in page.scripts[0]
    label = page.figures["by-class"]["test"]["data"][0]["y"]
    assert any(name.startswith("&lt;/script&gt;") for name in label)
    assert "<" not in "".join(label)


def test_no_test_split_is_said(run_dir: Path) -> None:
    change(run_dir / "results.json", test=None)
    change(run_dir / "evaluation.json", test=None)
    page = written(run_dir)
    assert "no labelled test split" in page.text and "On the dev split (600 instances)" in page.plain
    assert list(page.figures["trade-off"]) == ["dev"]
    assert not any(attrs.get("type") == "radio" for _, attrs in page.tags)


def test_measured_speed_is_said_even_where_it_is_slower(run_dir: Path) -> None:
    assert "Measured" not in written(run_dir).text
    timing = {"full_depth_seconds": 0.9, "seconds": 1.0, "speedup": 0.9, "batch_size": 32}
    change(run_dir / "results.json", timing={"test": timing}, metric="mcc")
    text = written(run_dir).plain
    assert "Measured in batches of 32, that is 0.90 times the speed of full depth." in text
    assert "metric MCC" in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("metrics.parquet", "no metrics.parquet"),
        ("evaluation.json", "no usable evaluation.json"),
        ("config.yaml", "no config.yaml"),
    ],
)
def test_missing_pieces_are_said(run_dir: Path, name: str, said: str) -> None:
    (run_dir / name).unlink()
    page = written(run_dir)
    assert said in page.text
    ids = [attrs["data-figure"] for _, attrs in page.tags if "data-figure" in attrs]
    assert sorted(ids) == sorted(page.figures)


def test_truncated_metrics_are_said(run_dir: Path) -> None:
    path = run_dir / "metrics.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert "metrics.parquet cannot be read" in written(run_dir).text


def test_bare_results(run_dir: Path) -> None:
    for name in ("metrics.parquet", "evaluation.json", "config.yaml"):
        (run_dir / name).unlink()
    tree = json.loads((run_dir / "results.json").read_text())
    (run_dir / "results.json").write_text(json.dumps({"num_layers": 6, "task": "docs", "dev": tree["dev"]}))
    page = written(run_dir)
    assert page.figures == {} and "recorded no times" in page.text and "recorded no versions" in page.text


def test_not_finite_numbers_do_not_break_the_page(run_dir: Path) -> None:
    split = json.loads((run_dir / "evaluation.json").read_text())["test"]
    change(run_dir / "evaluation.json", test={**split, "exit_losses": [math.nan] * LAYERS})
    table = pa.table(
        {"phase": ["init"], "round": [0], "step": [1], "epoch": [0.0], "metric": ["loss"], "value": [math.nan]}
    )
    pq.write_table(table, run_dir / "metrics.parquet")
    page = written(run_dir)
    assert page.figures["exit-losses"]["test"]["data"][-1]["y"] == [None] * LAYERS
    assert "metrics.parquet holds no rows" in page.text


def test_many_classes_show_both_ends(tmp_path: Path) -> None:
    page = written(make_run(tmp_path / "run", classes=60))
    heat = page.figures["by-class"]["dev"]["data"][0]
    assert len(heat["y"]) == len(set(heat["y"])) == 40
    assert "20 earliest and latest" in page.text


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "no results.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "a JSON mapping is expected"),
        ('{"num_layers": 6}', "at least one of 'dev' and 'test'"),
        ('{"num_layers": 6, "dev": {"score": 0.5}}', "dev: a number is expected for full_depth_score"),
    ],
)
def test_bad_results(run_dir: Path, contents: str | None, message: str) -> None:
    path = run_dir / "results.json"
    path.unlink() if contents is None else path.write_text(contents)
    with pytest.raises(RunError, match=message):
        write_report(run_dir)
    assert not (run_dir / "report").exists()


@pytest.mark.parametrize(
    ("change_to", "said"),
    [
        ({"dev": {"metric": "accuracy"}}, "evaluation.json is incomplete"),
        ({"dev": [1]}, "evaluation.json is incomplete"),
        ({"init": 7}, "not of the expected form"),
        ({"label_names": "x"}, "not of the expected form"),
    ],
)
def test_a_damaged_evaluation_leaves_the_rest(run_dir: Path, change_to: dict[str, Any], said: str) -> None:
    change(run_dir / "evaluation.json", **change_to)
    assert said in written(run_dir).text


@pytest.mark.parametrize(("name", "said"), [("evaluation.json", "evaluation.json cannot be read"), ("config.yaml", "")])
@pytest.mark.parametrize("contents", [b"", b"\xff\x00", b"[1", b"a: 2020-13-45"])
def test_unreadable_pieces_leave_the_rest(run_dir: Path, name: str, said: str, contents: bytes) -> None:
    (run_dir / name).write_bytes(contents)
    assert said in written(run_dir).text


@pytest.mark.parametrize("key", ["seconds", "versions", "timing", "initial_full_depth"])
def test_results_of_another_form_are_named(run_dir: Path, key: str) -> None:
    change(run_dir / "results.json", **{key: [1]})
    with pytest.raises(RunError, match=f"{key}: a mapping is expected"):
        write_report(run_dir)


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run directory"):
        write_report(tmp_path / "none")


def test_a_full_disk_leaves_the_old_page(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(run_dir)
    before = path.read_bytes()

    def full(self: Path, text: str, **options: Any) -> int:
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="no space left on the device"):
        write_report(run_dir)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == ["index.html"]
