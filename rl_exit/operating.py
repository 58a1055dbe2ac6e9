"""Operating points: from a wish ("twice as fast", "at most one point lost") to a criterion at a threshold.

A point is chosen on texts that neither the exits nor the policy were fitted on, and kept in the model's configuration
under a name, which :meth:`rl_exit.models.early_exit.EarlyExitModel.predict` takes.

**Speed** is predicted by the measured cost model (:mod:`rl_exit.costs`): the threshold is the one at which these texts,
with their lengths, take ``1 / speedup`` of the time that full depth takes. What the model does not know (padding, how
full batches of survivors are, the tail of a file) is then measured: some of the texts run through the engine, at full
depth and at that threshold in turn (:mod:`rl_exit.turns`), and the prediction is corrected by the quotient of what was
measured and what the model says of the same texts (:class:`Clocked`), twice.

**Loss** is bounded by Learn-then-Test (Angelopoulos et al. 2021). The loss of a text is 1 where full depth is right and
the early answer wrong, -1 the other way round, else 0; its mean is the accuracy that is lost. Thresholds of a grid that
is fixed beforehand are tested from the most careful on, each against "more than ``max_loss`` is lost", by a betting
p-value; testing stops at the first that cannot be rejected. With probability ``confidence`` over the calibration texts,
the accuracy lost on new texts is at most ``max_loss``, if these are drawn as those were (independently, same source).
It holds for the exact choice that is made here, and says nothing of texts of another kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rl_exit.costs import CostModel
from rl_exit.criteria import Criterion, Fixed, StoredSplit, leaving_above, parameters, scores_from_store
from rl_exit.criteria.base import Scored
from rl_exit.criteria.calibration import careful_first, fewest_for
from rl_exit.data.batching import length_sorted_batches
from rl_exit.data.instances import Instances
from rl_exit.errors import ConfigError, DataError
from rl_exit.evaluation import log_odds
from rl_exit.inference import Answers, evaluating, stream_answers
from rl_exit.models.early_exit import EarlyExitModel
from rl_exit.progress import Progress
from rl_exit.turns import Pass, in_turn, ratio

CANDIDATES = 2000
GRID = 161
CLOCKED_TEXTS = 256
CLOCKED_BATCHES = 128
"""Where that many can be had: at the end of a file survivors run in batches that are not full, which weighs on a few
(measured on StackOverflow at batch size 8: 4 % less speed-up in 32 batches than in 125, 2.5 % less in 64)."""
CLOCKED_SECONDS = 10.0
"""That a pass at full depth may take by the cost model, before more than ``CLOCKED_TEXTS`` or four batches run."""
CLOCKED_ROUNDS = 3
CORRECTIONS = 2
CLOSE = 0.05
"""How far a predicted speed-up may lie from the one asked for, as a share."""


@dataclass(frozen=True)
class Guarantee:
    """What is promised of new texts.

    Attributes:
        max_loss: Most accuracy lost against full depth, as a fraction.
        confidence: Probability over the calibration texts that it holds.
        texts: How many they were.
        p_value: Of "more is lost".
        methods: Criteria that were tried; the level was shared among them.
    """

    max_loss: float
    confidence: float
    texts: int
    p_value: float
    methods: int


@dataclass(frozen=True)
class OperatingPoint:
    """A criterion at a threshold, and what it is expected to do.

    Attributes:
        criterion: Its word.
        params: Its parameters.
        speedup: Expected time of full depth over its own.
        batch_size: Texts that run together, in that expectation.
        saved_layers: Share of layers not run on the calibration texts.
        loss: Accuracy lost on the calibration texts; None where they have no labels.
        guarantee: What is promised; None where only speed was asked for.
        clocked: Measured over predicted speed-up of the texts that were timed, by which ``speedup`` is corrected; None:
            by the cost model alone.
    """

    criterion: str
    params: Mapping[str, Any]
    speedup: float
    batch_size: int
    saved_layers: float
    loss: float | None
    guarantee: Guarantee | None
    clocked: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self) | {"params": dict(self.params)}


@dataclass(frozen=True)
class Evidence:
    """What a model says of calibration texts.

    Attributes:
        split: Answers of every exit, with the labels or zeros.
        lengths: [N], tokens.
        labelled: Whether the labels are real.
        own: [N, L], whether what the policy itself answers is right, where it answers otherwise than the exits do.
    """

    split: StoredSplit
    lengths: npt.NDArray[np.int64]
    labelled: bool
    own: npt.NDArray[np.bool_] | None = None

    def select(self, rows: npt.NDArray[np.int64]) -> Evidence:
        """The given rows."""
        own = None if self.own is None else self.own[rows]
        return Evidence(self.split.select(rows), self.lengths[rows], self.labelled, own)

    def losses(self, rule: Criterion, exit_layers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """What each text loses by leaving: 1 where only full depth is right, -1 the other way round, else 0; [N]."""
        right = self.split.correct
        says = right if self.own is None or not hasattr(rule, "answer") else self.own
        early = says[np.arange(len(right)), exit_layers - 1]
        return right[:, -1].astype(np.float64) - early.astype(np.float64)


def gather(
    model: EarlyExitModel,
    instances: Instances,
    labelled: bool = True,
    states: bool = False,
    progress: Progress | None = None,
) -> Evidence:
    """Run all layers once.

    Args:
        model: The model; left in evaluation mode.
        instances: N calibration texts.
        labelled: Whether their labels are real.
        states: Whether the pooled states are kept, for criteria that read them.
        progress: Told the number of texts done.
    """
    model.eval()
    count, layers = len(instances), model.num_layers
    logits = np.empty((count, layers, model.config.num_labels), dtype=np.float32)
    odds = np.empty((count, layers - 1), dtype=np.float32)
    own = np.empty((count, layers), dtype=np.bool_)
    kept = np.empty((count, layers, model.backbone.hidden_size), dtype=np.float32) if states else None
    done = 0
    for rows in length_sorted_batches(instances.lengths, 64):
        with torch.inference_mode():
            batch = {key: value.to(model.device) for key, value in instances.batch(rows).items()}
            out = model.all_exits(**batch)
            logits[rows] = out.logits.float().cpu().numpy()
            odds[rows] = model.exit_logits(out.states, out.logits).float().cpu().numpy()
            said = model.answers(out.states, out.logits).argmax(-1).cpu().numpy()
            own[rows] = said == np.asarray(instances.labels)[rows, None]
            if kept is not None:
                kept[rows] = out.states.float().cpu().numpy()
        done += len(rows)
        if progress is not None:
            progress.update(done)
    split = StoredSplit.from_logits(instances.labels, logits, kept, odds)
    differs = model.answer_heads is not None
    return Evidence(split, np.asarray(instances.lengths, dtype=np.int64), labelled, own if differs else None)


@dataclass(frozen=True)
class Clocked:
    """Measures how far the cost model's speed-up is from the engine's.

    Attributes:
        model: The model.
        instances: The calibration texts, in the order of the evidence.
        batch_size: Texts that run together.
        texts: How many are timed at least, or four batches, spread evenly over the lengths.
        batches: How many batches are timed, if those are more texts and a pass at full depth takes no more than
            ``CLOCKED_SECONDS``.
        rounds: Passes of each, a slice of either in turn, after one that is not counted.
    """

    model: EarlyExitModel
    instances: Instances
    batch_size: int
    texts: int = CLOCKED_TEXTS
    batches: int = CLOCKED_BATCHES
    rounds: int = CLOCKED_ROUNDS

    def bias(self, rule: Criterion, costs: CostModel, exit_layers: npt.NDArray[np.int64]) -> float:
        """Measured over predicted speed-up of a criterion; its texts leave at the given layers, [N]."""
        lengths = np.asarray(self.instances.lengths)
        order = np.argsort(lengths, kind="stable")
        affordable = int(CLOCKED_SECONDS / float(costs.full_depth(self.batch_size, lengths).mean()))
        more = min(self.batches * self.batch_size, affordable)
        count = min(max(self.texts, 4 * self.batch_size, more), len(order))
        rows = order[np.linspace(0, len(order) - 1, count).astype(np.int64)]
        some, full = self.instances.take(rows), Fixed(self.model.num_layers)
        passes = {"full": engine_pass(self.model, some, full, self.batch_size)}
        passes["rule"] = engine_pass(self.model, some, rule, self.batch_size)
        with evaluating(self.model), torch.inference_mode():
            wall = in_turn(passes, self.rounds, settle=settling(self.model.device)).wall
        measured = ratio(wall["full"], wall["rule"])
        return measured / costs.speedup(self.batch_size, lengths[rows], exit_layers[rows])


def engine_pass(
    model: EarlyExitModel, instances: Instances, rule: Criterion, batch_size: int, pooled: bool = True
) -> Pass:
    """A run of the engine that can be timed in turn with others (:mod:`rl_exit.turns`).

    It runs in evaluation mode and under ``torch.inference_mode()``, which are the caller's to set.
    """

    def start() -> Iterator[None]:
        answers = Answers(len(instances))
        for left in stream_answers(model, instances, rule, batch_size, pooled):
            if left is not None:
                answers.put(left)
            yield
        answers.output()  # all of them are there

    return start


def settling(device: torch.device) -> Callable[[], None]:
    """What waits until the work of a device is done (:func:`rl_exit.turns.in_turn`)."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def point_by_speed(
    rules: Sequence[Criterion],
    evidence: Evidence,
    costs: CostModel,
    speedup: float,
    batch_size: int,
    clock: Clocked | None = None,
) -> OperatingPoint:
    """The threshold at which these texts take ``1 / speedup`` of the time; of several criteria who loses least.

    Args:
        rules: One or more scored criteria; without labels the first that can be so fast.
        evidence: Calibration texts.
        costs: Measured times.
        speedup: Wanted, above 1.
        batch_size: Texts that will run together.
        clock: Corrects what the costs predict by what the engine does; None: they are taken as they are.

    Raises:
        ConfigError: Out of range, or no criterion gets within 5 % of it.
    """
    if not math.isfinite(speedup) or speedup <= 1.0:
        raise ConfigError(f"--speedup {speedup:g}: a number above 1 is accepted, e.g. 2")
    found, fastest = [], 1.0
    for rule in rules:
        scores = scores_from_store(rule, evidence.split)
        tried = _by_cut(scores, costs, evidence, batch_size)
        cut, predicted, bias = _nearest(tried, speedup)
        for _ in range(0 if clock is None else CORRECTIONS):
            assert clock is not None
            bias = clock.bias(leaving_above(rule, cut), costs, exits_above(scores, cut))
            cut, predicted, bias = _nearest(tried, speedup, bias)
        reached = predicted * bias
        fastest = max(fastest, tried[-1][1] * bias)
        if abs(reached / speedup - 1.0) <= CLOSE:
            point = _point(leaving_above(rule, cut), evidence, exits_above(scores, cut), reached, batch_size, None)
            found.append(replace(point, clocked=None if clock is None else bias))
    if not found:
        raise ConfigError(
            f"--speedup {speedup:g}: not to be had within {CLOSE:.0%} by {', '.join(rule.name for rule in rules)} on "
            f"these texts; the most is {fastest:.2f}"
        )
    return min(found, key=lambda point: 0.0 if point.loss is None else point.loss)


def _nearest(tried: Sequence[tuple[float, float]], speedup: float, bias: float = 1.0) -> tuple[float, float, float]:
    """Of (cut, predicted speed-up) the pair nearest to a speed-up once corrected, and the correction."""
    cut, predicted = min(tried, key=lambda pair: abs(math.log(pair[1] * bias / speedup)))
    return cut, predicted, bias


def point_by_loss(
    rules: Sequence[Criterion],
    evidence: Evidence,
    costs: CostModel,
    max_loss: float,
    confidence: float,
    batch_size: int,
) -> OperatingPoint:
    """The fastest threshold of which it is certain that it loses no more; see the module.

    Args:
        rules: One or more scored criteria; the level is shared among them.
        evidence: Calibration texts with labels.
        costs: Measured times.
        max_loss: Accuracy, as a fraction in (0, 1).
        confidence: In (0, 1).
        batch_size: Texts that will run together.

    Raises:
        ConfigError: Out of range.
        DataError: No labels, or too few texts for any such promise, or none of the thresholds can be certified.
    """
    if not 0.0 < max_loss < 1.0:
        raise ConfigError(f"--max-loss {100 * max_loss:g}: points of accuracy between 0 and 100 are accepted")
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"--confidence {confidence:g}: a number between 0 and 1 is accepted, e.g. 0.95")
    if not evidence.labelled:
        raise DataError("--max-loss needs calibration texts with labels")
    level = (1.0 - confidence) / len(rules)
    count, fewest = evidence.split.num_instances, fewest_for(max_loss, level)
    if count < fewest:
        raise DataError(
            f"{count} calibration texts are too few to promise a loss of at most {100 * max_loss:g} points with "
            f"confidence {confidence:g}, even if none of them is lost: at least {fewest} are needed"
        )
    found = []
    for rule in rules:
        settings = list(grid(rule, evidence.split.num_layers, evidence.split.num_classes))
        scores = scores_from_store(rule, evidence.split)
        exits = [exits_of(setting, scores) for setting in settings]
        passed, p = careful_first((evidence.losses(rule, left) for left in exits), max_loss, level)
        if passed is None:
            continue
        promise = Guarantee(max_loss, confidence, count, p, len(rules))
        speed = costs.speedup(batch_size, evidence.lengths, exits[passed])
        found.append(_point(settings[passed], evidence, exits[passed], speed, batch_size, promise))
    if not found:
        raise DataError(
            f"on {count} calibration texts no threshold of {', '.join(rule.name for rule in rules)} can be certified "
            f"to lose at most {100 * max_loss:g} points with confidence {confidence:g}; give more texts, or allow more"
        )
    return max(found, key=lambda point: point.speedup)


def exits_above(scores: npt.NDArray[np.float32], cut: float) -> npt.NDArray[np.int64]:
    """First layer whose score exceeds the cut, [N] in 1..L, from scores [N, L-1]."""
    leave = scores > np.float32(cut)
    return np.where(leave.any(1), leave.argmax(1) + 1, scores.shape[1] + 1).astype(np.int64)


def exits_of(rule: Criterion, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Where texts leave by a criterion at its own threshold, [N], from its scores turned so that larger is earlier."""
    assert isinstance(rule, Scored)
    threshold = float(getattr(rule, rule.swept))
    cut = np.float32(log_odds(threshold) if rule.name == "consistentee" else threshold)
    cut = -cut if rule.comparison == "<" else cut
    if rule.comparison == ">=":
        leave = scores >= cut
        return np.where(leave.any(1), leave.argmax(1) + 1, scores.shape[1] + 1).astype(np.int64)
    return exits_above(scores, float(cut))


def grid(rule: Criterion, num_layers: int, num_classes: int) -> Iterator[Criterion]:
    """Thresholds fixed before any data is seen, the most careful first.

    Raises:
        ConfigError: The criterion has no threshold, or one without a natural range.
    """
    if not isinstance(rule, Scored):
        raise ConfigError(f"criterion '{rule.name}' has no threshold that could be chosen")
    low, high = rule.bounds
    if rule.name == "entropy":
        high = math.log(num_classes)
    values: npt.NDArray[np.float64]
    if rule.whole:
        values = np.arange(num_layers, 0, -1, dtype=np.float64)
    elif math.isfinite(low) and math.isfinite(high):
        # Even steps of the log-odds: fine near both ends, where sure models have their thresholds.
        share = 1.0 / (1.0 + np.exp(-np.linspace(8.0, -8.0, GRID)))
        values = low + (high - low) * (share if rule.comparison != "<" else share[::-1])
    else:
        raise ConfigError(f"criterion '{rule.name}': its threshold has no natural range to choose from")
    scored: Any = rule
    for value in values:
        yield replace(scored, **{rule.swept: int(value) if rule.whole else float(value)})


def _by_cut(
    scores: npt.NDArray[np.float32], costs: CostModel, evidence: Evidence, batch_size: int
) -> list[tuple[float, float]]:
    """(cut, predicted speed-up) from never leaving to leaving as early as can be."""
    values = np.unique(scores[np.isfinite(scores)])
    if len(values) > CANDIDATES:
        values = values[np.linspace(0, len(values) - 1, CANDIDATES).astype(np.int64)]
    cuts = [*values[::-1].tolist(), -math.inf]
    full = float(costs.full_depth(batch_size, evidence.lengths).sum())
    seconds = costs.leaving(batch_size, evidence.lengths)
    rows = np.arange(len(scores))
    return [(cut, full / float(seconds[rows, exits_above(scores, cut) - 1].sum())) for cut in cuts]


def _point(
    rule: Criterion,
    evidence: Evidence,
    left: npt.NDArray[np.int64],
    speedup: float,
    batch_size: int,
    guarantee: Guarantee | None,
) -> OperatingPoint:
    lost = float(evidence.losses(rule, left).mean()) if evidence.labelled else None
    return OperatingPoint(
        criterion=rule.name,
        params=parameters(rule),
        speedup=speedup,
        batch_size=batch_size,
        saved_layers=1.0 - float(left.mean()) / evidence.split.num_layers,
        loss=lost,
        guarantee=guarantee,
    )
