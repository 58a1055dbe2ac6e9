"""The figures of a comparison as text, for the terminal, the page and the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NAMES = {
    "consistentee": "ConsistentEE",
    "fixed": "fixed depth",
    "entropy": "entropy (DeeBERT)",
    "fastbert": "FastBERT",
    "max_probability": "max probability",
    "right_tool": "Right-Tool",
    "pabee": "PABEE",
    "pabee_regression": "PABEE, regression",
    "pcee": "PCEE-BERT",
    "lte": "BERxiT LTE",
    "cat": "CAT",
    "calm_softmax": "CALM softmax",
    "calm_saturation": "CALM saturation",
    "calm_meta": "CALM meta",
    "palbert": "PALBERT",
    "beem": "BEEM",
    "jei": "JEI-DNN",
}
POINTS = {"no_loss": "no loss", "within_1": "within 1 point"}
Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        cells: As text.
        ours: ConsistentEE of the group.
        best: Best baseline at an operating point.
    """

    cells: list[str]
    ours: bool = False
    best: bool = False


def criterion_name(word: str) -> str:
    """``"entropy"`` -> ``"entropy (DeeBERT)"``."""
    return NAMES.get(word, word)


def method_name(tree: Tree, key: str) -> str:
    """A method in words: criterion, exits where they are not the final ones, group where it is not the first."""
    method = tree["methods"][key]
    more = [] if method["exits"] == "final" else [f"{method['exits']} exits"]
    more += [] if method["group"] == tree["groups"][0]["name"] else [method["group"]]
    return criterion_name(method["criterion"]) + (f", {', '.join(more)}" if more else "")


def ranked(tree: Tree, group: str | None = None, exits: str | None = None) -> list[str]:
    """Methods by saved layers within 1 point, then at no loss, then by area.

    Args:
        tree: From :func:`rl_exit.comparison.compare`.
        group: Name of a group; None: all.
        exits: ``final`` or ``initial``; None: both.
    """
    keys = [
        key
        for key, method in tree["methods"].items()
        if group in (None, method["group"]) and exits in (None, method["exits"])
    ]

    def rank(key: str) -> tuple[float, float, float]:
        method = tree["methods"][key]
        return -method["within_1"]["saved_layers"], -method["no_loss"]["saved_layers"], -method["area"]

    return sorted(keys, key=rank)


METHOD_HEADER = (
    *("method", "exits", "no loss: score %", "saved layers %", "interval"),
    *("within 1: score %", "saved layers %", "interval", "area %", "to oracle, points"),
)


def method_rows(tree: Tree, group: str | None = None) -> list[Row]:
    """One row per method of a group (default: the first), best first; columns are ``METHOD_HEADER``."""
    name = group or tree["groups"][0]["name"]
    best = set(next(one for one in tree["groups"] if one["name"] == name)["best_baseline"].values())
    rows = []
    for key in ranked(tree, name):
        method = tree["methods"][key]
        cells = [criterion_name(method["criterion"]), method["exits"]]
        for point in POINTS:
            cells += point_cells(method[point])
        cells += [f"{100 * method['area']:.2f}", f"{100 * method['distance_to_oracle']['within_1']:.1f}"]
        rows.append(Row(cells, bool(method["ours"]), key in best))
    return rows


def point_cells(point: Tree) -> list[str]:
    """Score, saved layers and interval of an operating point; a dash where no threshold reaches it."""
    if not point["reached"]:
        reached = any(row["reached"] for row in point["by_seed"])
        return [f"{100 * point['score']:.2f}", f"{100 * point['saved_layers']:.1f} *" if reached else "0.0 *", "-"]
    return [f"{100 * point['score']:.2f}", f"{100 * point['saved_layers']:.1f}", span(point["interval"])]


def span(interval: Sequence[float] | None) -> str:
    """An interval of fractions in percent."""
    return "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def signed(value: float, digits: int = 1) -> str:
    """A fraction in signed points, without a negative zero."""
    return f"{round(100 * value, digits) + 0.0:+.{digits}f}"


def gain_text(gain: Tree) -> str:
    """``+3.2 [0.4 to 6.1]``: a difference of saved layers in points, with its interval."""
    return f"{signed(gain['saved_layers'])} [{span(gain['interval'])}]"


GROUP_HEADER = (
    *("group", "differs in", "seeds", "full depth %", "no loss: saved layers %", "within 1: saved layers %", "area %"),
    *("against the first: no loss", "within 1", "best baseline within 1", "against it"),
)


def group_rows(tree: Tree) -> list[Row]:
    """One row per group: its ConsistentEE against that of the first group and against its own best baseline."""
    rows = []
    for group in tree["groups"]:
        settings = ", ".join(f"{key}={value}" for key, value in group["settings"].items())
        depth = group["full_depth_score"].get("final") or next(iter(group["full_depth_score"].values()))
        cells = [group["name"], settings or "-", str(len(group["seeds"])), f"{100 * depth['pooled']:.2f}"]
        ours = tree["methods"].get(group["consistentee"])
        if ours is None:
            cells += ["-"] * 3
        else:
            cells += [f"{100 * ours[point]['saved_layers']:.1f}" for point in POINTS] + [f"{100 * ours['area']:.2f}"]
        against = group["against_first"]
        cells += [gain_text(against[point]) if against else "-" for point in POINTS]
        best = group["best_baseline"]["within_1"]
        if best is None:
            cells += ["-", "-"]
        else:
            baseline = tree["methods"][best]
            where = "" if baseline["exits"] == "final" else f", {baseline['exits']} exits"
            cells += [f"{criterion_name(baseline['criterion'])}{where}"]
            cells += [gain_text(group["difference"]["within_1"]) if group["difference"] else "-"]
        rows.append(Row(cells, ours=bool(group["main"])))
    return rows


def counted(tree: Tree) -> str:
    """What is saved: layers, or their measured time."""
    return "time" if tree.get("cost") == "latency" else "layers"


def verdicts(tree: Tree) -> list[str]:
    """One sentence per operating point: ours against the best baseline."""
    sentences = []
    for point, words in POINTS.items():
        gain = tree["difference"] and tree["difference"][point]
        if not gain:
            continue
        ours, other = tree["methods"][tree["ours"]][point], tree["methods"][gain["baseline"]][point]
        interval = gain["interval"]
        if interval is None or interval[0] <= 0 <= interval[1]:
            said = "the interval holds 0: no difference is shown"
        else:
            said = "the interval is above 0" if interval[0] > 0 else "the interval is below 0"
        share = tree["gap_closed"][point]
        gap = f"; {100 * share:.0f} % of the way from there to the oracle" if share is not None and share > 0 else ""
        sentences.append(
            f"{words}: ConsistentEE saves {100 * ours['saved_layers']:.1f} % of the {counted(tree)}, the best baseline "
            f"({method_name(tree, gain['baseline'])}) {100 * other['saved_layers']:.1f} %: a difference of "
            f"{gain_text(gain)} points, {said}{gap}"
        )
    if sentences and (seeds := next(group for group in tree["groups"] if group["main"]).get("by_confidence")):
        sentences.append(
            f"with seed {', '.join(map(str, seeds))} ConsistentEE leaves by confidence, as max probability does: on "
            "training instances new to it the policy was no better (policy.safe)"
        )
    return sentences


def compare_table(tree: Tree, group: str | None = None) -> Any:
    """The methods of a group for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = (
        f"{tree['task']}, {tree['split']}: {tree['num_instances']} instances, {len(tree['seeds'])} seeds, full depth "
        f"{100 * tree['full_depth_score']['pooled']:.2f} %, oracle {100 * tree['oracle']['score']:.2f} % with "
        f"{100 * tree['oracle']['saved_layers']:.1f} % of the layers saved"
    )
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, header in enumerate(METHOD_HEADER):
        table.add_column(header.replace(" ", "\n", 1), justify="left" if index < 2 else "right", no_wrap=True)
    for row in method_rows(tree, group):
        style = "bold cyan" if row.ours else "bold" if row.best else ""
        table.add_row(*(Text(cell) for cell in row.cells), style=style)
    return table


def groups_table(tree: Tree) -> Any:
    """The groups for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="ConsistentEE of each group", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, header in enumerate(GROUP_HEADER):
        table.add_column(header, justify="left" if index < 2 else "right", overflow="fold")
    for row in group_rows(tree):
        table.add_row(*(Text(cell) for cell in row.cells))
    return table
