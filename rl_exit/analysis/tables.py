"""What an analysis found as rows of text, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text


class TextTable(NamedTuple):
    """A table as text: title, header, rows of cells."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def for_terminal(self) -> Table:
        """The same for :func:`rl_exit.tables.print_table`."""
        table = Table(title=Text(self.title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table


def analysis_tables(tree: Mapping[str, Any]) -> dict[str, TextTable]:
    """The tables of an analysis by name: exits, hardness, rewards, alphas.

    Args:
        tree: From :func:`rl_exit.trainers.analyse.analyse`.
    """
    return {
        "exits": exits_table(tree),
        "hardness": hardness_table(tree),
        "rewards": rewards_table(tree),
        "alphas": alphas_table(tree),
    }


def exits_table(tree: Mapping[str, Any]) -> TextTable:
    """Fig. 2 in figures: each exit on all instances and on those that leave there, before the rounds and after."""
    first, final = tree["exits"]["initial"], tree["exits"]["final"]
    rows = [
        (
            str(index + 1),
            str(final["leaving"][index]),
            *(_number(side["loss"][index], ".3f") for side in (first, final)),
            *(_number(side["loss_leaving"][index], ".3f") for side in (first, final)),
            *(_percent(side["accuracy"][index]) for side in (first, final)),
            *(_percent(side["accuracy_leaving"][index]) for side in (first, final)),
        )
        for index in range(tree["num_layers"])
    ]
    total = str(sum(final["leaving"]))
    at_exit = (
        *(_number(side["loss_at_exit"], ".3f") for side in (first, final)),
        "-",
        "-",
        *(_percent(side["accuracy_at_exit"]) for side in (first, final)),
    )
    rows.append(("own exit", total, "-", "-", *at_exit))
    header = (
        "exit layer",
        "leave there",
        *(
            f"{what}, {who}: {when}"
            for what in ("loss", "accuracy %")
            for who in ("all", "leaving")
            for when in ("initial", "final")
        ),
    )
    return TextTable("exits on dev, after initialisation and of the finished model (Fig. 2)", header, tuple(rows))


def hardness_table(tree: Mapping[str, Any]) -> TextTable:
    """Table 1: rank correlation of the memorized layer with each measure of hardness."""
    rows = []
    for split in ("train", "dev"):
        found = tree["hardness"][split]
        forgetting = found["forgetting"]
        for name, value in (
            ("loss of the last exit", found["loss"]),
            ("mean loss of the exits", found["mean_loss"]),
            ("forgetting events", forgetting["spearman"] if forgetting else None),
        ):
            if split == "dev" and name == "forgetting events":
                continue  # only what is trained on can be forgotten
            rows.append((split, name, *_correlation(value)))
    return TextTable(
        "memorized layer against hardness, Spearman (Table 1)",
        ("split", "measure", "rho", "95 % interval"),
        tuple(rows),
    )


def rewards_table(tree: Mapping[str, Any]) -> TextTable:
    """Fig. 4 in figures: saved layers of each reward at no loss and within one point."""
    rows = []
    for reward, found in tree["rewards"].items():
        for name, words in (("no_loss", "no loss"), ("within_1", "within 1 point")):
            at = found[name]
            if at is None:
                rows.append((reward, words, *["-"] * 4))
                continue
            saved, score = _percent(at["saved_layers"], 1), _percent(at["score"])
            rows.append((reward, words, score, saved, f"{at['alpha']:g}", f"{at['threshold']:.3g}"))
    header = ("reward", "operating point", "dev score %", "saved layers %", "alpha", "threshold")
    return TextTable("what each reward reaches (Fig. 4)", header, tuple(rows))


def alphas_table(tree: Mapping[str, Any]) -> TextTable:
    """Fig. 5 in figures: score and saved layers by alpha at the threshold 0.5."""
    rows = tuple(
        (row["reward"], f"{row['alpha']:g}", _percent(row["score"]), _percent(row["saved_layers"], 1))
        for row in tree["policies"]
    )
    header = ("reward", "alpha", "dev score %", "saved layers %")
    return TextTable("alpha at threshold 0.5 (Fig. 5)", header, rows)


def _correlation(found: Mapping[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    low, high = found["interval"]
    return f"{found['value']:.3f}", f"{low:.3f} to {high:.3f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"
