"""What the HTML pages share: templates, style, script and plotly in one self-contained file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rl_exit import __version__


def render_page(template: str, figures: Mapping[str, Any], **values: Any) -> str:
    """Fill a template into a page that needs no network.

    Args:
        template: Name of a file in ``templates/``.
        figures: Chart id -> plotly figure (or split -> figure), for ``report.js``.
        **values: What the template names beside ``version``, ``figures``, ``plotly``, ``script`` and ``style``.
    """
    from plotly.offline import get_plotlyjs  # Loads slowly; only a page needs it.

    environment = Environment(
        loader=PackageLoader("rl_exit"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(
        version=__version__,
        figures=script_json(figures),
        plotly=get_plotlyjs(),
        script=asset("report.js"),
        style=asset("report.css"),
        **values,
    )


def script_json(tree: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element: no ``<``, so no user text can close it."""
    text = json.dumps(_finite(tree), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def asset(name: str) -> str:
    """Text of a file in ``templates/``."""
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _finite(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_finite(value) for value in node]
    if isinstance(node, float):
        return float(f"{node:.7g}") if math.isfinite(node) else None
    return node
