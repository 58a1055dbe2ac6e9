"""The model card of a saved model: YAML header, results, how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from rl_exit import __version__

USAGE = """\
```python
from rl_exit import EarlyExitModel

model = EarlyExitModel.from_pretrained("{where}")
for answer in model.predict(["a text", "another text"]):
    print(answer.label, max(answer.probabilities), answer.exit_layer)
```

Each text leaves at its own layer; the layers above are not computed for it. `model.predict(texts, threshold=...)` moves
along the trade-off: a higher threshold leaves later.
"""


def model_card(
    config: Any,
    num_layers: int,
    results: Sequence[Mapping[str, str | float | int]] = (),
    notes: str = "",
    where: str = "path/to/this/folder",
) -> str:
    """Write the card.

    Args:
        config: The model's :class:`~rl_exit.models.early_exit.EarlyExitConfig`.
        num_layers: L.
        results: Rows of the results table, all with the same keys; floats are shown with four digits.
        notes: Further Markdown after the table.
        where: Folder or hub id for the usage snippet.
    """
    header: dict[str, Any] = {
        "library_name": "rl-exit",
        "pipeline_tag": "text-classification",
        "tags": ["early-exit", "ConsistentEE", "text-classification"],
        "metrics": [{"mcc": "matthews_correlation"}.get(config.metric, config.metric)],
    }
    if config.backbone_name and not config.backbone_name.startswith((".", "/", "~")):
        header["base_model"] = config.backbone_name
    names = [config.id2label[number] for number in range(config.num_labels)]
    decides = "the policy's probability of Exit"
    if config.policy_rule == "confidence":
        decides = (
            "the probability of what it would answer (on training instances new to it the learned policy was no better)"
        )
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# Early-exit classifier{f' for {config.task}' if config.task else ''}",
        f"A {num_layers}-layer {config.backbone.get('model_type', '')} backbone with an exit classifier at every layer "
        "and a learned exit policy (ConsistentEE, AAAI 2024), trained with "
        f"rl-exit {__version__}. A text leaves at the first layer where {decides} is over {config.threshold:g}.",
        f"Classes ({len(names)}): " + ", ".join(_cell(name) for name in names[:50]) + (" ..." if names[50:] else ""),
        f"State: {config.pooling} pooling. Texts are cut at {config.max_tokens} tokens.",
    ]
    if results:
        parts += ["## Results", _table(results)]
    if notes:
        parts.append(notes.strip())
    parts += ["## Use", USAGE.format(where=where).strip()]
    return "\n\n".join(parts) + "\n"


CAUSAL_USAGE = """\
```python
from rl_exit import EarlyExitModel

model = EarlyExitModel.from_pretrained("{where}")
for answer in model.generate(["Once upon a time"], max_new_tokens=50):
    print(answer.text, answer.exit_layers)
```

Each token leaves at its own layer; the layers above are not computed for it. `model.generate(texts, threshold=...)`
moves along the trade-off: a higher threshold leaves later.
"""


def causal_card(
    config: Any,
    exit_layers: Sequence[int],
    results: Sequence[Mapping[str, str | float | int]] = (),
    notes: str = "",
    where: str = "path/to/this/folder",
) -> str:
    """Write the card of a decoder.

    Args:
        config: The model's :class:`~rl_exit.models.causal.EarlyExitCausalConfig`.
        exit_layers: Layers with an exit; the last is L.
        results: Rows of the results table, all with the same keys; floats are shown with four digits.
        notes: Further Markdown after the table.
        where: Folder or hub id for the usage snippet.
    """
    header: dict[str, Any] = {
        "library_name": "rl-exit",
        "pipeline_tag": "text-generation",
        "tags": ["early-exit", "ConsistentEE", "text-generation"],
    }
    if config.backbone_name and not config.backbone_name.startswith((".", "/", "~")):
        header["base_model"] = config.backbone_name
    adapter = f" and an adapter of rank {config.exit_rank}" if config.exit_rank else ""
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# Early-exit decoder{f' for {config.task}' if config.task else ''}",
        f"A {exit_layers[-1]}-layer {config.backbone.get('model_type', '')} decoder with exits after layers "
        f"{', '.join(map(str, exit_layers))} (each a norm{adapter} before the model's own head) and a learned exit "
        f"policy (ConsistentEE, AAAI 2024), made with rl-exit {__version__}. A token leaves at the first exit where "
        f"the policy's probability of Exit is over {config.threshold:g}; deeper layers see its state of the "
        "layer where it left.",
    ]
    if results:
        parts += ["## Results", _table(results)]
    if notes:
        parts.append(notes.strip())
    parts += ["## Use", CAUSAL_USAGE.format(where=where).strip()]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, str | float | int]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: str | float | int) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
