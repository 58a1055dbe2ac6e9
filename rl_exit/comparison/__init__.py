"""Exit criteria side by side: trade-off curves, operating points and areas, with paired bootstrap intervals.

Numpy (and scipy's sparse product) on arrays that were computed before; no model, no Ray. Notation: ``N`` instances,
``L`` layers numbered 1..L, ``C`` classes, ``G`` cuts (thresholds), ``R`` replicates of the bootstrap. Arrays over
replicates have 1+R columns: column 0 is the split as it is.
"""

from rl_exit.comparison.bootstrap import REPLICATES, interval, resamples
from rl_exit.comparison.compare import compare
from rl_exit.comparison.evidence import ExitSet, Group, Scores, SeedRun, Split
from rl_exit.comparison.figures import WITHIN, MethodFigures, measure_method

__all__ = [
    "REPLICATES",
    "WITHIN",
    "ExitSet",
    "Group",
    "MethodFigures",
    "Scores",
    "SeedRun",
    "Split",
    "compare",
    "interval",
    "measure_method",
    "resamples",
]
