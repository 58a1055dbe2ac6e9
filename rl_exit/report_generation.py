"""The report's section on a decoder's text: quality, rules on the same exits, samples side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RULES = {
    "policy": "policy",
    "calm_softmax": "CALM softmax response",
    "calm_saturation": "CALM state saturation",
    "calm_meta": "CALM meta classifier",
    "fixed": "fixed depth",
    "oracle": "oracle: first exit that agrees with the last",
    "full": "full depth",
}
_PROMPT = 400  # characters of a prompt that are shown, its end


def generation_section(evaluation: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """What the template shows; None where the run is no decoder's, or its evaluation holds no such part.

    Args:
        evaluation: Tree of ``evaluation.json``.
        timing: ``timing`` of ``results.json``: tokens per second by split.
    """
    found = evaluation.get("generation")
    if not isinstance(found, dict):
        return None
    splits = found.get("splits") or {}
    layers = _layers(found)
    shown: Mapping[str, Any] = next((splits[name] for name in ("test", "dev") if name in splits), {})
    return {
        "lead": _lead(shown),
        "quality": _quality(splits, timing or {}),
        "rules": _rules(found.get("criteria") or {}),
        "samples": [_sample(row, layers) for row in shown.get("samples", ())],
    }


def _layers(found: Mapping[str, Any]) -> int:
    """L, from the samples: the first token of each is written at full depth."""
    rows = [row for split in (found.get("splits") or {}).values() for row in split.get("samples", ())]
    return max((layer for row in rows for layer in row["exit_layers"]), default=1)


def _lead(shown: Mapping[str, Any]) -> str:
    if not shown:
        return "No text was generated for this run (generation.samples = 0)."
    forced = shown["teacher_forced"]
    return (
        f"For {shown['prompts']} prompts, up to {shown['max_new_tokens']} tokens each, "
        f"{100 * shown['saved_layers']:.1f} % of the layers are saved in writing. Made to say the responses of the "
        f"data, the model agrees with its own full depth in {100 * forced['agreement']:.1f} % of the tokens, at a "
        f"perplexity of {forced['perplexity']:.2f} (full depth {shown['full_depth_perplexity']:.2f})."
    )


def _quality(splits: Mapping[str, Any], timing: Mapping[str, Any]) -> dict[str, Any]:
    columns = [
        *("saved layers %", "Rouge-L at full depth", "Rouge-L with exits", "Rouge-L to full depth"),
        *("BERTScore-F at full depth", "BERTScore-F with exits", "agreement %", "token accuracy %", "perplexity"),
        *("perplexity at full depth", "tokens per second at full depth", "tokens per second with exits"),
    ]
    rows = []
    for name, row in splits.items():
        speed = timing.get(name) or {}
        bert, forced = row.get("bert_f") or {}, row["teacher_forced"]
        cells = [
            f"{100 * row['saved_layers']:.1f}",
            f"{100 * row['rouge_l']['full']:.2f}",
            f"{100 * row['rouge_l']['exits']:.2f}",
            f"{100 * row['rouge_l_to_full_depth']:.2f}",
            *(f"{100 * bert[key]:.2f}" if key in bert else "–" for key in ("full", "exits")),
            f"{100 * forced['agreement']:.1f}",
            f"{100 * forced['accuracy']:.1f}",
            f"{forced['perplexity']:.2f}",
            f"{row['full_depth_perplexity']:.2f}",
            *(
                f"{speed[key]:.0f}" if key in speed else "–"
                for key in ("tokens_per_second_full_depth", "tokens_per_second")
            ),
        ]
        rows.append({"name": name, "cells": cells})
    return {"columns": columns, "rows": rows}


def _rules(found: Mapping[str, Any]) -> dict[str, Any]:
    columns = [
        "threshold or depth",
        "mean exit layer",
        "saved layers %",
        "agreement %",
        "token accuracy %",
        "perplexity",
    ]
    rows = []
    for word, name in RULES.items():
        for point in (found.get("rules") or {}).get(word, ()):
            at = point.get("depth", point.get("threshold"))
            cells = [
                "–" if at is None else f"{at:.4g}",
                f"{point['mean_exit_layer']:.2f}",
                f"{100 * point['saved_layers']:.1f}",
                f"{100 * point['agreement']:.1f}",
                f"{100 * point['accuracy']:.1f}",
                f"{point['perplexity']:.2f}",
            ]
            rows.append({"name": name, "cells": cells})
    note = f"{found.get('examples', 0)} examples of {found.get('split', 'dev')} that the model is made to say"
    return {"columns": columns, "rows": rows, "note": note}


def _sample(row: Mapping[str, Any], layers: int) -> dict[str, Any]:
    prompt = row["prompt"]
    return {
        "prompt": prompt if len(prompt) <= _PROMPT else f"… {prompt[-_PROMPT:]}",
        "reference": row["reference"],
        "full": row["full"],
        "tokens": [
            {"text": text, "layer": layer, "depth": round(100 * layer / layers)}
            for text, layer in zip(row["tokens"], row["exit_layers"], strict=True)
        ],
        "note": f"{100 * row['saved_layers']:.0f} % saved, Rouge-L to full depth {100 * row['rouge_l']:.0f}",
    }
