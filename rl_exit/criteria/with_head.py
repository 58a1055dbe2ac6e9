"""Criteria that ask a learned head: BERxiT, CAT, PALBERT, JEI-DNN."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rl_exit.criteria.base import Carry, LayerView, Scored, checked_number
from rl_exit.criteria.heads import Head, head_of
from rl_exit.criteria.learned import Learned
from rl_exit.errors import ConfigError


@dataclass(frozen=True)
class HeadScored(Scored):
    """Base of criteria whose score comes from a head's log-odds.

    Attributes:
        learned: The head's tensors and sizes.
        threshold: In [0, 1].
        reads: What the head reads beside the state: ``"logits"``, ``"past"`` (all logits so far), ``"previous"`` (the
            state before).
    """

    learned: Learned = field(repr=False)
    threshold: float = 0.5
    reads: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_learned(self.name, self.learned)
        checked_number(self.name, "threshold", self.threshold, self.bounds)
        # Made once; a criterion is asked at every layer of every batch.
        object.__setattr__(self, "_head", head_of(self.learned))

    def log_odds(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """The head's answer, float32 [B].

        Raises:
            ConfigError: The head was learned on a model of other sizes.
        """
        head: Head = self._head  # type: ignore[attr-defined]
        state = view.state.float()
        check_sizes(self.learned, view, state)
        head.to(state.device)
        logits = view.logits.float() if self.reads & {"logits", "past"} else state[:, :0]
        past = carry["past"].unbind(1) if "past" in carry else ()
        answer = head.at(layer, state, logits, carry.get("previous"), past)
        if "previous" in self.reads:
            carry["previous"] = state
        if "past" in self.reads:
            now = logits.unsqueeze(1)
            carry["past"] = torch.cat([carry["past"], now], 1) if "past" in carry else now
        return answer

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`; the head's probability."""
        return self.log_odds(layer, view, carry).sigmoid()


@dataclass(frozen=True)
class LTE(HeadScored):
    """Leave where the learned certainty exceeds ``threshold`` (learning to exit; BERxiT, Xin et al. 2021).

    The certainty, one linear layer with a sigmoid on the state, is trained to tell whether the exit is right.
    """

    name = "lte"


@dataclass(frozen=True)
class CAT(HeadScored):
    """Leave where the meta classifier's belief in the last layer's answer exceeds ``threshold`` (Schuster et al. 2021).

    :func:`rl_exit.criteria.calibration.conformal` sets the threshold so that at least a share 1 - eps of new instances
    get the answer of full depth.
    """

    name = "cat"
    reads = frozenset({"logits", "past"})


@dataclass(frozen=True)
class PALBERT(HeadScored):
    """Leave where the probability of having left by now exceeds ``threshold`` (Q-exit; Balagansky & Gavrilov 2022).

    ``1 - prod_{j <= l} (1 - lambda_j)`` with lambda from the head; the threshold is the paper's q, usual 0.5.
    """

    name = "palbert"
    reads = frozenset({"previous"})

    def score(self, layer: int, view: LayerView, carry: Carry) -> Tensor:
        """See :meth:`rl_exit.criteria.base.Scored.score`."""
        stay = (-self.log_odds(layer, view, carry)).sigmoid()
        carry["stay"] = carry["stay"] * stay if "stay" in carry else stay
        return 1.0 - carry["stay"]


@dataclass(frozen=True)
class JEI(HeadScored):
    """Leave where the layer's gate exceeds ``threshold`` (JEI-DNN, Regol, Chataoui & Coates 2024)."""

    name = "jei"
    reads = frozenset({"logits"})


def check_learned(word: str, learned: object) -> None:
    """Refuse what does not hold the tensors of this criterion.

    Raises:
        ConfigError: Something else than :class:`Learned`, or another word's.
    """
    if not isinstance(learned, Learned):
        raise ConfigError(
            f"criterion '{word}': learned = {learned!r} has the wrong type ({type(learned).__name__}); accepted: what "
            "rl_exit.criteria.learned.read_learned gives; load_criterion(folder, word) does both"
        )
    if learned.word != word:
        raise ConfigError(f"criterion '{word}' cannot use what criterion '{learned.word}' has learned")


def check_sizes(learned: Learned, view: LayerView, state: Tensor | None = None) -> None:
    """Refuse a model of other sizes than those of the fit.

    Raises:
        ConfigError: L, or H if the state is given, differs.
    """
    if view.num_layers != learned.num_layers or (state is not None and state.shape[-1] != learned.hidden_size):
        fitted, here = f"{learned.num_layers} layers", f"{view.num_layers} layers"
        if state is not None:
            fitted, here = f"{fitted} of width {learned.hidden_size}", f"{here} of width {state.shape[-1]}"
        raise ConfigError(
            f"criterion '{learned.word}' was learned on a model of {fitted}, this one has {here}; fit it here"
        )
