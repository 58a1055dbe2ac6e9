"""What a saved decoder with exits says of itself in ``config.json``."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from rl_exit.models.answers import Inputs


class EarlyExitCausalConfig(PretrainedConfig):
    """What ``config.json`` of a saved decoder holds, beside the common fields of transformers.

    Args:
        backbone: Configuration of the backbone, as a mapping with its ``model_type``.
        backbone_name: Where its weights came from, for the model card.
        tied_head: Whether the head over the vocabulary is the table of the input embeddings.
        exit_every: k: exits at layers k, 2k, ..., and at the last.
        exit_rank: Rank of each exit's adapter; 0: a norm alone.
        policy_width: W, hidden width of the policy heads.
        policy_inputs: What the policy reads: ``"state"``, ``"answers"`` or ``"both"`` (:mod:`rl_exit.models.answers`);
            with the latter two the head is computed at every exit that a token passes.
        policy_shared: Whether the policy heads of all exits share their weights.
        max_tokens: Tokens of an example, longer ones are cut.
        threshold: Operating point: leave at the first ``pi > threshold``.
        task: The task's name.
        **kwargs: Common fields.
    """

    model_type = "early_exit_causal"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        backbone_name: str = "",
        tied_head: bool = True,
        exit_every: int = 1,
        exit_rank: int = 0,
        policy_width: int = 64,
        policy_inputs: Inputs = "state",
        policy_shared: bool = False,
        max_tokens: int = 512,
        threshold: float = 0.5,
        task: str = "",
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone or {}
        self.backbone_name = backbone_name
        self.tied_head = tied_head
        self.exit_every = exit_every
        self.exit_rank = exit_rank
        self.policy_width = policy_width
        self.policy_inputs = policy_inputs
        self.policy_shared = policy_shared
        self.max_tokens = max_tokens
        self.threshold = threshold
        self.task = task
        self.vocab_size = self.backbone.get("vocab_size", 0)
        kwargs["tie_word_embeddings"] = False  # a tied head has no weight of its own here, so nothing is to be tied
        super().__init__(**kwargs)

    def backbone_config(self) -> Any:
        """The backbone's configuration as its own class."""
        values = dict(self.backbone)
        return AutoConfig.for_model(values.pop("model_type", ""), **values)
