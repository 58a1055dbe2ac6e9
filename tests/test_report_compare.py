"""The page and the tables of a comparison, made from a synthetic one."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_exit.comparison import ExitSet, Group, Scores, SeedRun, Split, compare
from rl_exit.comparison.charts import points, style_of, trade_off
from rl_exit.comparison.tables import (
    GROUP_HEADER,
    METHOD_HEADER,
    NAMES,
    compare_table,
    group_rows,
    groups_table,
    method_rows,
    verdicts,
)
from rl_exit.criteria import CRITERIA
from rl_exit.report_compare import render_comparison, write_compare_page
from rl_exit.tables import print_table

WORDS = [word for word in CRITERIA if word != "pabee_regression"]


def made_run(seed: int, shift: float, gain: float, words: list[str]) -> SeedRun:
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(99)
    labels, ease = base.integers(0, 3, 120), base.random((120, 1))
    sets = {}
    for name, bonus in (("final", gain), ("initial", 0.0)):
        right = ease < np.linspace(0.6, 0.88, 6) + bonus
        predictions = np.where(right, labels[:, None], (labels[:, None] + 1) % 3)
        split = Split(np.arange(120), labels, predictions, 3)
        scores = {}
        for place, word in enumerate(words):
            known = 2.5 + shift if word == "consistentee" else 0.4 + 0.1 * place
            made = [
                (known * right[:, :-1] + rng.normal(0, 0.6, (120, 5))).astype(np.float32)
                if word not in ("fixed", "pabee")
                else np.tile(np.arange(5, dtype=np.float32), (120, 1))
                for _ in range(2)
            ]
            scores[word] = Scores(*made)
        sets[name] = ExitSet(name, split, split, scores)
    return SeedRun(seed, f"runs/made-{seed}", sets)


def made_tree(groups: int = 2, words: list[str] = WORDS) -> dict[str, Any]:
    """A comparison as ``rl-exit compare`` writes it."""
    made = [
        Group(
            f"recipe {n}", [made_run(s, 0.3 * n, 0.03, words) for s in (0, 1)], {"reward.alpha": 0.1 * n} if n else {}
        )
        for n in range(groups)
    ]
    return {
        "task": "stackoverflow <b>",
        "split": "test",
        **compare(made, "accuracy", replicates=20),
        "seconds": {"evidence": 12.0, "comparison": 3.0},
        "command": "rl-exit compare runs/a",
        "date": "2026-01-01T00:00:00+00:00",
        "versions": {"rl-exit": "0.1.0"},
        "machine": {"cpu": "x86_64", "cores": 2},
    }


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    return made_tree()


@pytest.fixture(scope="module")
def page(tree: dict[str, Any]) -> str:
    return render_comparison(tree)


def figures_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_every_criterion_has_a_name_and_a_style_of_its_own() -> None:
    assert set(NAMES) == set(CRITERIA)
    styles = [(style_of(word)["color"], style_of(word)["dash"]) for word in NAMES]
    assert len(set(styles)) == len(styles)


def test_the_page_holds_every_method_of_every_set_and_loads_nothing(page: str, tree: dict[str, Any]) -> None:
    drawn = figures_of(page)
    assert set(drawn) == {"trade-off", "points", "groups"}
    assert set(drawn["trade-off"]) == {f"set-{g}-{e}" for g in (0, 1) for e in ("final", "initial")}
    for figure in drawn["trade-off"].values():
        names = {trace["name"] for trace in figure["data"]}
        assert {NAMES[word] for word in WORDS} <= names
    shell = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="(?!#)', shell) and "default-src 'none'" in shell
    assert "stackoverflow &lt;b&gt;" in page and "stackoverflow <b>" not in page
    for switch in drawn["trade-off"]:
        assert f'value="{switch}"' in page
    assert "Seed by seed" in page and "Thresholds chosen on dev" in page


def test_ours_is_drawn_last_and_thick_and_some_methods_wait_in_the_legend(tree: dict[str, Any]) -> None:
    figure = trade_off(tree, "recipe 0", "final")
    lines = [trace for trace in figure["data"] if trace["mode"].startswith("lines")]
    assert lines[-1]["name"] == "ConsistentEE" and lines[-1]["line"]["width"] == max(t["line"]["width"] for t in lines)
    assert any(trace.get("visible") == "legendonly" for trace in lines)
    # On other exits ours stays for comparison, under its full name.
    other = trade_off(tree, "recipe 1", "initial")
    assert "ConsistentEE" in {trace["name"] for trace in other["data"]}
    best = {**tree["groups"][0]["oracle"], "score": 0.999}
    above = trade_off(
        {**tree, "groups": [{**tree["groups"][0], "oracle": best}, tree["groups"][1]]}, "recipe 0", "final"
    )
    assert "99.90" in above["layout"]["annotations"][0]["text"] and len(above["data"]) == len(figure["data"]) - 1
    bars = points(tree, "recipe 0", "final")["data"]
    assert all(value >= 0 for trace in bars[:2] for side in ("array", "arrayminus") for value in trace["error_x"][side])


def test_tables_say_what_the_tree_says(tree: dict[str, Any]) -> None:
    rows = method_rows(tree)
    assert len(rows) == 2 * len(WORDS) and all(len(row.cells) == len(METHOD_HEADER) for row in rows)
    ours = next(row for row in rows if row.ours)
    point = tree["methods"]["consistentee"]["within_1"]
    assert ours.cells[6] == f"{100 * point['saved_layers']:.1f}" and ours.cells[0] == "ConsistentEE"
    assert sum(row.best for row in rows) in (1, 2)
    lines = group_rows(tree)
    assert [row.cells[0] for row in lines] == ["recipe 0", "recipe 1"] and lines[1].cells[1] == "reward.alpha=0.1"
    assert all(len(row.cells) == len(GROUP_HEADER) for row in lines)
    said = verdicts(tree)
    assert len(said) == 2
    for sentence, gain in zip(said, tree["difference"].values(), strict=True):
        assert ("above 0" in sentence) == (
            gain["interval"][0] > 0
        ) and f"{100 * gain['saved_layers']:+.1f} [" in sentence
    buffer = io.StringIO()
    from rich.console import Console

    for table in (compare_table(tree), groups_table(tree)):
        print_table(Console(file=buffer), table)
    assert "ConsistentEE" in buffer.getvalue() and "recipe 1" in buffer.getvalue()


def test_a_single_group_without_ours_has_a_page_too(tmp_path: Path) -> None:
    tree = made_tree(1, ["entropy", "fixed"])
    text = write_compare_page(tree, tmp_path / "sub" / "page.html").read_text()
    assert "Most layers saved" in text and set(figures_of(text)) == {"trade-off", "points"}
    assert "Groups</h2>" not in text


def test_the_results_page_is_made_of_recorded_comparisons(tree: dict[str, Any], tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "render.py"
    spec = importlib.util.spec_from_file_location("render", path)
    assert spec is not None and spec.loader is not None
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    page = "<!-- results: comparisons -->\nstale\n<!-- end -->\n<!-- results: ablations -->\n<!-- end -->\n"
    assert render.rendered(page, tmp_path).count("Nothing is recorded yet.") == 2
    versions = {"torch": "2", "transformers": "5"}
    for name in ("compare-b", "compare-a"):
        (tmp_path / f"{name}.json").write_text(json.dumps({**tree, "task": name, "versions": versions}))
    point = {"saved_layers": 0.5, "against_default": {"saved_layers": -0.021, "interval": [-0.05, 0.01]}}
    variants = {name: {"no_loss": point, "within_1": point} for name in ("evidence", "reads the state")}
    origin = {"task": "ablation-a", "split": "dev", "seeds": [0, 1], "command": "ablate", "date": "2026-01-01T00:00"}
    (tmp_path / "ablation-a.json").write_text(json.dumps({**origin, "variants": variants, "versions": versions}))
    text = render.rendered(page, tmp_path)
    assert text.index("## compare-a") < text.index("## compare-b") and "stale" not in text
    gain = tree["difference"]["no_loss"]
    assert f"{100 * gain['saved_layers']:+.1f} [" in text and "**ConsistentEE**" in text and "**ablation-a**" in text
    assert "| reads the state | 50.0 | -2.1 [-5.0 to 1.0] | 50.0 | -2.1 [-5.0 to 1.0] |" in text
    widths = {line.count("|") for line in text.split("## compare-a")[0].splitlines() if line.startswith("|")}
    assert len(widths) == 1  # header, rule and rows of one table


PROBE = """<script>
window.addEventListener("load", () => setTimeout(() => {
  const node = document.querySelector('[data-figure="trade-off"]');
  const said = {};
  said.traces = node.data.length;
  const place = node.data.findIndex((trace) => trace.name === "CAT");
  said.before = node.data[place].visible;
  const item = [...node.querySelectorAll(".legendtoggle")][place];
  for (const kind of ["mousedown", "mouseup"]) item.dispatchEvent(new MouseEvent(kind, {bubbles: true}));
  setTimeout(() => {
    said.after = node.data[place].visible;
    Plotly.Fx.hover(node, [{curveNumber: node.data.length - 2, pointNumber: 20}]);
    said.hover = [...node.querySelectorAll(".hovertext")].map((one) => one.textContent).join("|");
    const other = document.querySelectorAll("input[name=split]")[1];
    other.click();
    setTimeout(() => {
      said.switched = node.data.length;
      const out = document.createElement("pre");
      out.id = "said";
      out.textContent = JSON.stringify(said);
      document.body.append(out);
    }, 500);
  }, 1500);
}, 500));
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_hover_legend_and_switch_work_in_a_browser(tmp_path: Path) -> None:
    words = ["consistentee", "entropy", "cat"]
    file = tmp_path / "page.html"
    file.write_text(render_comparison(made_tree(1, words)).replace("</body>", PROBE))
    line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1100,1330"]
    line += [f"--user-data-dir={tmp_path}/p", "--virtual-time-budget=8000", "--dump-dom", f"file://{file}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280)
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout)
    assert found is not None, done.stderr[-1000:]
    said = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert said["traces"] == len(words) + 3
    assert {str(said["before"]), str(said["after"])} == {"legendonly", "True"}
    assert "saved" in said["hover"] and "ConsistentEE" in said["hover"]
    assert said["switched"] == len(words) + 4  # ours of the first group stays beside the others
