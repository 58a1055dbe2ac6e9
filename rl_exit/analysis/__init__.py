"""The paper's figures and tables for any run, from stored arrays: no model, no Ray."""

from rl_exit.analysis.exits import ExitFigures, exit_figures
from rl_exit.analysis.hardness import Correlation, Forgetting, forgetting, spearman
from rl_exit.analysis.trade_off import PolicyPoint, frontier, most_saved

__all__ = [
    "Correlation",
    "ExitFigures",
    "Forgetting",
    "PolicyPoint",
    "exit_figures",
    "forgetting",
    "frontier",
    "most_saved",
    "spearman",
]
