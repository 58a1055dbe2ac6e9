"""Criteria by their word: made, saved, loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rl_exit.criteria.base import Criterion
from rl_exit.criteria.calm import CALMMeta, CALMSaturation, CALMSoftmax
from rl_exit.criteria.confidence import Entropy, FastBERT, MaxProbability
from rl_exit.criteria.fixed import Fixed
from rl_exit.criteria.learned import LEARNED, Learned, learned_words, read_learned, write_learned
from rl_exit.criteria.patience import BEEM, PABEE, PCEE, PABEERegression
from rl_exit.criteria.policy import ConsistentEE
from rl_exit.criteria.temperature import RightTool
from rl_exit.criteria.with_head import CAT, JEI, LTE, PALBERT
from rl_exit.errors import ConfigError, nearest

CRITERIA: dict[str, Callable[..., Criterion]] = {
    "consistentee": ConsistentEE,
    "fixed": Fixed,
    "entropy": Entropy,
    "fastbert": FastBERT,
    "max_probability": MaxProbability,
    "right_tool": RightTool,
    "pabee": PABEE,
    "pabee_regression": PABEERegression,
    "pcee": PCEE,
    "lte": LTE,
    "cat": CAT,
    "calm_softmax": CALMSoftmax,
    "calm_saturation": CALMSaturation,
    "calm_meta": CALMMeta,
    "palbert": PALBERT,
    "beem": BEEM,
    "jei": JEI,
}
# Words that people know a criterion by; for the hint, they are not accepted.
_ALSO_KNOWN = {
    "deebert": "entropy",
    "berxit": "lte",
    "calm": "calm_softmax",
    "righttool": "right_tool",
    "pcee_bert": "pcee",
    "jei_dnn": "jei",
    "policy": "consistentee",
    "patience": "pabee",
    "confidence": "max_probability",
}


def criterion(name: str, **params: Any) -> Criterion:
    """Make a criterion by its word.

    Args:
        name: One of ``CRITERIA``.
        **params: Its parameters, e.g. ``threshold=0.9``; a learned one also needs ``learned=``, which
            :func:`load_criterion` reads from a folder.

    Raises:
        ConfigError: Unknown word, unknown or missing parameter, or a value of the wrong type or out of range.
    """
    if not isinstance(name, str) or name not in CRITERIA:
        raise ConfigError(f"criterion {name!r} is unknown; accepted: {', '.join(CRITERIA)}.{_hint(name)}")
    make = CRITERIA[name]
    accepted = inspect.signature(make).parameters
    needed = [key for key, parameter in accepted.items() if parameter.default is inspect.Parameter.empty]
    if needed == ["learned"] and "learned" not in params:
        raise ConfigError(
            f"criterion '{name}' is learned: load_criterion(folder, '{name}') reads a fitted one, e.g. from "
            f"MODEL/criteria; rl_exit.criteria.fitting.fit_criterion('{name}', split) fits it on stored exits"
        )
    wrong = [*(key for key in params if key not in accepted), *(key for key in needed if key not in params)]
    if wrong:
        given = ", ".join(params) or "none"
        raise ConfigError(
            f"criterion '{name}': parameters given: {given}; accepted: {', '.join(accepted)} (needed: "
            f"{', '.join(needed) or 'none'})"
        )
    try:
        return make(**params)
    except TypeError as error:
        raise ConfigError(f"criterion '{name}': {params}: a parameter has the wrong type ({error})") from None


def save_criterion(criterion: Criterion, folder: str | Path) -> None:
    """Write what a criterion has learned and its parameters: ``<word>.safetensors`` and ``<word>.json`` in a folder.

    Raises:
        ConfigError: The criterion has learned nothing; its word and parameters are all there is to keep.
        UserError: The folder cannot be written.
    """
    learned = getattr(criterion, "learned", None)
    if not isinstance(learned, Learned):
        raise ConfigError(f"criterion '{criterion.name}' has learned nothing that could be saved")
    write_learned(Path(folder), replace(learned, params=parameters(criterion)))


def load_criterion(folder: str | Path, word: str, **params: Any) -> Criterion:
    """Read a learned criterion from a folder; one that learns nothing is made from its parameters alone.

    Args:
        folder: E.g. ``MODEL/criteria``.
        word: One of ``CRITERIA``.
        **params: In place of those it was saved with.

    Raises:
        ConfigError: As :func:`criterion`.
        RunError: Nothing of that word in the folder, or damaged.
    """
    if word not in LEARNED or "learned" in params or (word == "beem" and word not in learned_words(Path(folder))):
        return criterion(word, **params)
    learned = read_learned(Path(folder), word)
    return criterion(word, learned=learned, **{**learned.params, **params})


def criterion_from_words(word: str, words: Sequence[str], folder: Path) -> Criterion:
    """Make a criterion as the command line names it.

    Args:
        word: One of ``CRITERIA``.
        words: ``key=value`` parameters; numbers are read as such.
        folder: Where learned ones are kept.

    Raises:
        ConfigError: A word that is no ``key=value``, ``learned=`` among them, or as :func:`criterion`.
        RunError: As :func:`load_criterion`.
    """
    params: dict[str, Any] = {}
    for given in words:
        key, found, value = given.partition("=")
        if not (key and found) or key == "learned":
            raise ConfigError(f"--param '{given}': key=value is accepted, e.g. --param threshold=0.5")
        params[key] = _number(value)
    return load_criterion(folder, word, **params)


def parameters(criterion: Criterion) -> dict[str, Any]:
    """Parameters that a criterion was made with, without what it has learned."""
    kept: Mapping[str, Any] = {
        item.name: getattr(criterion, item.name)
        for item in fields(criterion)  # type: ignore[arg-type]
        if item.init and item.name != "learned"
    }
    return dict(kept)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _hint(name: object) -> str:
    word = str(name).lower().replace("-", "_")
    return f" Did you mean '{_ALSO_KNOWN[word]}'?" if word in _ALSO_KNOWN else nearest(word, CRITERIA)
