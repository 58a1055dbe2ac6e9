"""Rules of a decoder side by side on the same exits: the policy, CALM's three measures, fixed depth, the oracle.

Every point is a pass in which tokens really leave and later ones see their copies. Perplexity, accuracy and agreement
are those of the responses that the model is made to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from rl_exit.criteria import CALMMeta, CALMSaturation, CALMSoftmax, ConsistentEE, Criterion, Fixed
from rl_exit.criteria.base import Scored
from rl_exit.criteria.calibration import learn_then_test
from rl_exit.criteria.fitting import FitSettings, fit_criterion
from rl_exit.criteria.stored import StoredSplit
from rl_exit.data.instances import Instances
from rl_exit.errors import ConfigError
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.models.token_pass import HORIZON
from rl_exit.token_measurement import TokenTable, blocks, judge, operating_points, tabulate

POINTS = 8
FITTED_TOKENS = 20000
SCORED = ("policy", "calm_softmax", "calm_saturation", "calm_meta")


def fit_meta(model: EarlyExitCausalModel, instances: Instances, seed: int = 0) -> CALMMeta:
    """CALM's meta classifier on the exits of a decoder: will the last exit say the same?

    Args:
        model: The decoder.
        instances: Examples that the exits were not trained on.
        seed: Of the fit.
    """
    model.eval()
    states, agrees, count = [], [], 0
    for block in blocks(model, instances):
        chosen = model.score_tokens(block.states, block.tokens.target).chosen
        states.append(block.states.float().cpu())
        agrees.append((chosen == chosen[:, -1:]).cpu())
        count += len(block)
        if count >= FITTED_TOKENS:
            break
    same = torch.cat(agrees)
    # Two classes, the last exit's word and any other: all that the fit reads of the logits.
    answers = torch.stack([same, ~same], -1).float().numpy()
    split = StoredSplit.from_logits(np.zeros(len(same), dtype=np.int64), answers, torch.cat(states))
    fitted = fit_criterion("calm_meta", split, seed, FitSettings(max_instances=FITTED_TOKENS), threshold=0.5)
    assert isinstance(fitted, CALMMeta)
    return fitted


def rules_of(model: EarlyExitCausalModel, held: Instances, seed: int = 0) -> dict[str, Scored]:
    """The rules with a threshold, by name; thresholds do not matter yet."""
    return {
        "policy": ConsistentEE(0.5),
        "calm_softmax": CALMSoftmax(0.5),
        "calm_saturation": CALMSaturation(0.5),
        "calm_meta": fit_meta(model, held, seed),
    }


def compare_rules(
    model: EarlyExitCausalModel,
    held: Instances,
    instances: Instances,
    *,
    points: int = POINTS,
    horizon: int = HORIZON,
    seed: int = 0,
    more: Callable[[Criterion | None], Mapping[str, float]] = lambda _: {},
    on_done: Callable[[str], None] = lambda _: None,
) -> dict[str, list[dict[str, Any]]]:
    """Curves of every rule.

    Args:
        model: The decoder with its policy.
        held: Examples that thresholds' places and the meta classifier come from.
        instances: Examples that are measured.
        points: Operating points of each rule.
        horizon: N of CALM's falling threshold.
        seed: Of the meta classifier.
        more: Further figures of a rule, e.g. of what it writes; None: nobody leaves.
        on_done: Told the name of each rule when it is done.

    Returns:
        By rule (also ``fixed``, ``oracle`` and ``full``) points with ``threshold`` (``depth`` for fixed) and the fields
        of :class:`~rl_exit.token_measurement.TokenScores`, by rising mean exit layer.
    """
    full = tabulate(model, instances, horizon=horizon)
    layers = model.exit_layers
    found: dict[str, list[dict[str, Any]]] = {"full": [{**asdict(judge(full, full, layers)), **more(None)}]}
    rules = rules_of(model, held, seed)
    calibration = tabulate(model, held, scores=tuple(rules.values()), horizon=horizon)
    for name, rule in rules.items():
        rows = []
        for at in operating_points(rule, calibration.scores[rule.name], points):
            table = tabulate(model, instances, at, horizon=horizon)
            figures = {**asdict(judge(table, full, layers)), **more(at)}
            rows.append({"threshold": float(getattr(at, rule.swept)), **figures})
        found[name] = _sorted(rows)
        on_done(name)
    rows = []
    for number in range(1, model.num_exits):
        table = tabulate(model, instances, Fixed(number), horizon=horizon)
        figures = {**asdict(judge(table, full, layers)), **more(Fixed(number))}
        rows.append({"depth": layers[number - 1], **figures})
    found["fixed"] = _sorted(rows)
    found["oracle"] = [asdict(judge(agreeing_oracle(full), full, layers))]
    return found


def agreeing_oracle(full: TokenTable) -> TokenTable:
    """Tokens leave at the first exit that says what the last one says: a bound that no rule can know.

    It is taken from the pass at full depth; what tokens that left would show to later ones is left out.
    """
    first = (full.chosen == full.chosen[:, -1:]).argmax(1) + 1
    return TokenTable(
        full.examples, full.positions, full.losses, full.correct, full.chosen, first.astype(np.int64), full.scores
    )


def calibrated_on_text(
    rule: CALMSoftmax | CALMSaturation | CALMMeta,
    model: EarlyExitCausalModel,
    instances: Instances,
    delta: float,
    level: float = 0.05,
    grid: Sequence[float] | None = None,
    horizon: int = HORIZON,
) -> tuple[Criterion, list[dict[str, float]]]:
    """CALM at the smallest lambda that is proven to change at most a share delta of a response's tokens.

    Learn-then-Test (Angelopoulos et al. 2021) with texts as instances, since the tokens of one text hang together: the
    loss of a text is the share of its tokens that differ from full depth, at each lambda measured in a pass in which
    tokens really leave. The guarantee holds for texts drawn as these were.

    Args:
        rule: Its own threshold does not matter.
        model: The decoder.
        instances: Calibration examples that neither exits nor rule were fitted on.
        delta: Mean share that may differ, in (0, 1).
        level: Probability that the guarantee may fail.
        grid: Candidates for lambda; default 1.0, 0.95, ..., 0.
        horizon: N of the falling threshold.

    Returns:
        (the rule at that lambda, the risk of every lambda that was tried).

    Raises:
        ConfigError: Not even the largest candidate passes.
    """
    candidates = sorted(set(np.linspace(0.0, 1.0, 21).tolist() if grid is None else map(float, grid)), reverse=True)
    full = tabulate(model, instances, horizon=horizon)
    groups = np.unique(full.examples, return_inverse=True)[1]
    sizes = np.bincount(groups)
    risks: list[Any] = []
    best: int | None = None
    for value in candidates:
        at = replace(rule, threshold=value)
        table = tabulate(model, instances, at, horizon=horizon)
        differs = table.at_exit(table.chosen) != full.chosen[:, -1]
        risks.append(np.bincount(groups, weights=differs) / sizes)
        passed = learn_then_test(np.stack(risks), delta, level)
        if passed is None or passed < len(risks) - 1:
            break
        best = passed
    tried = [{"threshold": c, "risk": float(r.mean())} for c, r in zip(candidates, risks, strict=False)]
    if best is None:
        raise ConfigError(
            f"criterion '{rule.name}': no threshold keeps the risk below {delta} with confidence {1 - level:g} on "
            f"{len(sizes)} calibration texts; give more of them, or a larger delta or level"
        )
    return replace(rule, threshold=candidates[best]), tried


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["mean_exit_layer"])
