"""A decoder measured on text that it is made to say (teacher forcing): every token of every response is an instance.

Under a rule the tokens really leave and the later ones see their copies (:mod:`rl_exit.models.token_pass`), so what is
measured is what generation would do after the same words.

Notation: N tokens, E exits, numbered 1..E; layers are those at which the exits stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rl_exit.criteria.base import Carry, Criterion, LayerView, Scored
from rl_exit.criteria.stored import leaving_above
from rl_exit.data.batching import length_sorted_batches
from rl_exit.data.instances import Instances
from rl_exit.evaluation import useful_thresholds
from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.models.token_pass import HORIZON, TokenRows, run_text, state_view, token_rows

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
BATCH = 16


@dataclass(frozen=True)
class TokenBlock:
    """What a pass over some examples gives.

    Attributes:
        examples: int64 [n], row of each token's example.
        tokens: Row in the batch, position and target of each token.
        states: [n, E, H].
        exits: int64 [n], where each token leaves.
        positions: int64 [n], how many tokens of the response came before.
    """

    examples: Tensor
    tokens: TokenRows
    states: Tensor
    exits: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class TokenTable:
    """What every exit says of N tokens, in the order of the examples and of their text.

    Attributes:
        examples: int64 [N], row of each token's example.
        positions: int64 [N], how many tokens of the response came before.
        losses: float32 [N, E], cross-entropy of the next token, nats.
        correct: bool [N, E].
        chosen: int64 [N, E], each exit's first choice.
        exits: int64 [N], where each token leaves, 1..E.
        scores: Scores of the rules asked for, by name: float32 [N, E-1], larger leaves earlier.
    """

    examples: IntArray
    positions: IntArray
    losses: FloatArray
    correct: npt.NDArray[np.bool_]
    chosen: IntArray
    exits: IntArray
    scores: dict[str, FloatArray]

    def __len__(self) -> int:
        return len(self.examples)

    def at_exit(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Of values [N, E] those of the exits taken, [N]."""
        return values[np.arange(len(self)), self.exits - 1]


@dataclass(frozen=True)
class TokenScores:
    """How a rule does on text.

    Attributes:
        accuracy: Share of tokens that the exit taken predicts.
        agreement: Share of tokens of which the exit taken says what the model without exits says.
        perplexity: ``exp`` of the mean cross-entropy at the exit taken.
        mean_exit_layer: In layers, 1..L.
        saved_layers: ``1 - mean_exit_layer / L``.
        tokens: N.
    """

    accuracy: float
    agreement: float
    perplexity: float
    mean_exit_layer: float
    saved_layers: float
    tokens: int


def blocks(
    model: EarlyExitCausalModel,
    instances: Instances,
    rule: Criterion | None = None,
    batch_size: int = BATCH,
    horizon: int = HORIZON,
) -> Iterator[TokenBlock]:
    """Run examples in batches of similar length; nothing is kept between batches.

    Args:
        model: In evaluation mode.
        instances: Tokenised examples (:func:`rl_exit.data.examples.tokenise_examples`).
        rule: Who leaves; None: nobody.
        batch_size: Examples at a time.
        horizon: N of CALM's falling threshold.
    """
    device = model.device
    for rows in length_sorted_batches(instances.lengths, batch_size):
        with torch.inference_mode():
            batch = {name: value.to(device) for name, value in instances.batch(rows).items()}
            starts = torch.from_numpy(np.array(instances.labels[rows])).to(device)
            tokens = token_rows(batch["input_ids"], batch["attention_mask"], starts)
            if not len(tokens):
                continue
            done = run_text(model, batch["input_ids"], batch["attention_mask"], starts, rule, horizon)
            yield TokenBlock(
                torch.from_numpy(np.array(rows))[tokens.row.cpu()],
                tokens,
                tokens.of(done.states),
                done.exits[tokens.row, tokens.position],
                tokens.position - starts[tokens.row] + 1,
            )


def tabulate(
    model: EarlyExitCausalModel,
    instances: Instances,
    rule: Criterion | None = None,
    *,
    scores: Sequence[Scored] = (),
    batch_size: int = BATCH,
    horizon: int = HORIZON,
    on_done: Callable[[int], None] = lambda _: None,
) -> TokenTable:
    """Every exit's answers for every token of the responses.

    Args:
        model: The decoder; left in evaluation mode.
        instances: Tokenised examples.
        rule: Who leaves; None: nobody.
        scores: Rules whose scores are wanted, under the same pass.
        batch_size: Examples at a time.
        horizon: N of CALM's falling threshold.
        on_done: Told the number of tokens done.
    """
    model.eval()
    parts: list[dict[str, npt.NDArray[Any]]] = []
    done = 0
    for block in blocks(model, instances, rule, batch_size, horizon):
        found = model.score_tokens(block.states, block.tokens.target)
        part = {
            "examples": block.examples,
            "positions": block.positions,
            "losses": found.losses,
            "correct": found.correct,
            "chosen": found.chosen,
            "exits": block.exits,
            **{f"scores.{one.name}": scores_of(model, block, one, horizon) for one in scores},
        }
        parts.append({name: value.cpu().numpy() for name, value in part.items()})
        done += len(block)
        on_done(done)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((whole["positions"], whole["examples"]))
    whole = {name: value[order] for name, value in whole.items()}
    named = {name.removeprefix("scores."): whole.pop(name) for name in list(whole) if name.startswith("scores.")}
    return TokenTable(**whole, scores=named)


@torch.inference_mode()
def scores_of(model: EarlyExitCausalModel, block: TokenBlock, rule: Scored, horizon: int = HORIZON) -> Tensor:
    """Scores of a rule at exits 1..E-1, turned so that larger leaves earlier: float32 [n, E-1]."""
    sign = -1.0 if rule.comparison == "<" else 1.0
    carry: Carry = rule.start(len(block), block.states.device)
    found = []
    for number in range(1, model.num_exits):
        view: LayerView = state_view(
            model, number, block.states[:, number - 1], (block.positions / horizon).clamp_max(1.0)
        )
        found.append(sign * rule.score(number, view, carry).float())
    return torch.stack(found, 1)


def judge(table: TokenTable, full: TokenTable, layers: Sequence[int]) -> TokenScores:
    """Hold a pass against the one in which nobody leaves.

    Args:
        table: Under a rule.
        full: Of the same model and examples, without a rule.
        layers: Layer of each exit; the last is L.
    """
    layer = np.asarray(layers)[table.exits - 1]
    mean = float(layer.mean())
    return TokenScores(
        accuracy=float(table.at_exit(table.correct).mean()),
        agreement=float((table.at_exit(table.chosen) == full.chosen[:, -1]).mean()),
        perplexity=math.exp(min(float(table.at_exit(table.losses).mean()), 700.0)),
        mean_exit_layer=mean,
        saved_layers=1.0 - mean / layers[-1],
        tokens=len(table),
    )


def operating_points(rule: Scored, scores: FloatArray, count: int) -> list[Criterion]:
    """The same rule at thresholds that leave, of stored scores, at mean exits in about equal steps.

    Args:
        rule: Any threshold.
        scores: [N, E-1], of :func:`scores_of`.
        count: Most points.
    """
    finite = np.clip(scores, -1e30, 1e30)
    found = [leaving_above(rule, float(cut)) for cut in useful_thresholds(finite, count)]
    return list(dict.fromkeys(found))
