"""The tokens of a batch of examples as instances: what losses and objectives take, exits in place of layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rl_exit.models.causal import EarlyExitCausalModel
from rl_exit.models.token_pass import DrawnByPolicy, run_text, token_rows


def token_instances(
    model: EarlyExitCausalModel, batch: Mapping[str, Tensor], starts: Tensor, leaves: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a batch and take the tokens of the responses; prompts are never scored.

    Args:
        model: The decoder.
        batch: ``input_ids`` and ``attention_mask`` [B, T].
        starts: int64 [B], tokens of each prompt.
        leaves: Whether tokens leave as the policy draws (drawn from torch's generator), so that the states of later
            ones are those that generation would give (:mod:`rl_exit.models.token_pass`).

    Returns:
        (states [N, E, H], logits float32 [N, E, V], next tokens [N], row of each token [N]).
    """
    rows = token_rows(batch["input_ids"], batch["attention_mask"], starts)
    rule = DrawnByPolicy() if leaves else None
    states = rows.of(run_text(model, batch["input_ids"], batch["attention_mask"], starts, rule).states)
    return states, model.head(states).float(), rows.target, rows.row
