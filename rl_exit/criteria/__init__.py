"""Exit criteria: when an instance leaves.

One small interface (:class:`Criterion`) serves the live engine (:mod:`rl_exit.inference`) and whole stored splits
(:func:`exits_from_store`); both leave at the same layers. A criterion has one word: ``criterion("entropy",
threshold=0.1)``. Published criteria are a score with a threshold (:class:`Scored`), so :func:`scores_from_store` gives
the exits at every threshold from one pass. Learned ones are fitted (:mod:`rl_exit.criteria.fitting`), saved and loaded.

To add one, derive a frozen dataclass from :class:`Scored` with ``name`` and ``score``, and enter it in ``CRITERIA``.
"""

from __future__ import annotations

from rl_exit.criteria.base import Carry, Criterion, LayerView, Scored, compact
from rl_exit.criteria.calm import CALMMeta, CALMSaturation, CALMSoftmax
from rl_exit.criteria.confidence import Entropy, FastBERT, MaxProbability
from rl_exit.criteria.fixed import Fixed
from rl_exit.criteria.learned import LEARNED, Learned
from rl_exit.criteria.oracle import ORACLES, cheapest, first_agreeing, first_correct, memorized
from rl_exit.criteria.patience import BEEM, PABEE, PCEE, PABEERegression
from rl_exit.criteria.policy import ConsistentEE
from rl_exit.criteria.registry import CRITERIA, criterion, load_criterion, parameters, save_criterion
from rl_exit.criteria.stored import StoredSplit, exits_from_store, leaving_above, scores_from_store
from rl_exit.criteria.temperature import RightTool
from rl_exit.criteria.with_head import CAT, JEI, LTE, PALBERT

__all__ = [
    "BEEM",
    "CAT",
    "CRITERIA",
    "JEI",
    "LEARNED",
    "LTE",
    "ORACLES",
    "PABEE",
    "PALBERT",
    "PCEE",
    "CALMMeta",
    "CALMSaturation",
    "CALMSoftmax",
    "Carry",
    "ConsistentEE",
    "Criterion",
    "Entropy",
    "FastBERT",
    "Fixed",
    "LayerView",
    "Learned",
    "MaxProbability",
    "PABEERegression",
    "RightTool",
    "Scored",
    "StoredSplit",
    "cheapest",
    "compact",
    "criterion",
    "exits_from_store",
    "first_agreeing",
    "first_correct",
    "leaving_above",
    "load_criterion",
    "memorized",
    "parameters",
    "save_criterion",
    "scores_from_store",
]
