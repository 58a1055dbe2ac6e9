"""docs/criteria.md names every criterion with its parameters and defaults, and its example of a new one works."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np

from rl_exit.criteria import CRITERIA, LEARNED, StoredSplit, exits_from_store, leaving_above, scores_from_store

PAGE = (Path(__file__).parents[2] / "docs" / "criteria.md").read_text()


def rows(header: str) -> dict[str, list[str]]:
    """Cells of a table's rows by their word."""
    table = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return {re.findall(r"`(\w+)`", line)[0]: [cell.strip() for cell in line.split("|")[1:-1]] for line in table}


def test_every_criterion_is_on_the_page_with_its_parameters():
    found = rows("| word | leaves at")
    assert list(found) == list(CRITERIA)
    for word, (_, _, given, needs, _) in found.items():
        expected = []
        for name, parameter in inspect.signature(CRITERIA[word]).parameters.items():
            if name != "learned":
                default = parameter.default
                expected.append(name if default is inspect.Parameter.empty else f"{name} ({default:g})")
        assert given == ", ".join(expected), word
        assert (word in LEARNED) == ("fit" in needs), word


def test_what_is_learned_is_on_the_page():
    assert set(rows("| word | what is learned")) == set(LEARNED)


def test_the_example_of_a_new_criterion_works():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (code,) = (block for block in blocks if "class Margin" in block)
    names: dict[str, object] = {}
    exec("import math\nfrom dataclasses import dataclass\nfrom rl_exit.criteria import Scored\n" + code, names)
    rule = names["Margin"](1.0)  # type: ignore[operator]
    logits = np.array([[[0.0, 0.5], [0.0, 1.0], [0.0, 3.0]], [[0.0, 0.1], [0.2, 0.0], [0.0, 3.0]]])
    split = StoredSplit.from_logits([0, 1], logits)
    assert exits_from_store(rule, None, split.logits, None).tolist() == [2, 3]
    np.testing.assert_allclose(scores_from_store(rule, split), [[0.5, 1.0], [0.1, 0.2]], rtol=1e-6)
    assert exits_from_store(leaving_above(rule, 0.15), None, split.logits, None).tolist() == [1, 2]
