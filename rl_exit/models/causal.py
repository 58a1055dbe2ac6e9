"""The multi-exit decoder: a causal backbone, exits at every k-th layer that share its head, an exit policy.

Instances are tokens. The pass of the token at position t predicts token t + 1 and may leave at an exit 1..E (exit e
stands at layer ``exit_layers[e-1]``). What a token that left shows to later ones is defined once, in
:func:`present`, and used by training, evaluation and generation.

Shapes: B rows, T positions, E exits, L layers, H hidden size, V vocabulary, N chosen tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from rl_exit.criteria.base import Carry, Criterion, LayerView
from rl_exit.errors import ModelError
from rl_exit.generation import api
from rl_exit.generation.loop import Event
from rl_exit.models import folder, pretrained
from rl_exit.models.answers import INPUTS, Inputs, answer_figures, every_policy_input, input_size, policy_input
from rl_exit.models.backbones import step_backbone
from rl_exit.models.card import causal_card
from rl_exit.models.causal_config import EarlyExitCausalConfig
from rl_exit.models.policy import PolicyHeads
from rl_exit.models.token_exits import TokenExits, exit_layers, leaving_exits

# Logits that exist at a time when tokens are scored in blocks: 16 MB in float32.
BLOCK_LOGITS = 1 << 22


class TokenScores(NamedTuple):
    """What every exit says of N tokens.

    Attributes:
        losses: Cross-entropy of the next token, nats, float32 [N, E].
        correct: Whether it is the exit's first choice, bool [N, E].
        chosen: The exit's first choice, int64 [N, E].
    """

    losses: Tensor
    correct: Tensor
    chosen: Tensor


def present(before: Tensor, after: Tensor, inside: Tensor) -> Tensor:
    """State copying: what the tokens of a batch show to the next layer (and their keys and values there come from).

    A token that left at layer e presents its state of layer e to every deeper layer; these compute its keys and values
    from it by their own input norm and projections.

    Args:
        before: Input of a layer, [..., H].
        after: Output of that layer, [..., H].
        inside: Which tokens ran through it, bool [...].

    Returns:
        [..., H].
    """
    return torch.where(inside.unsqueeze(-1), after, before)


class EarlyExitCausalModel(PreTrainedModel, GenerationMixin):
    """A decoder run layer by layer, exits 1..E on its own head, policy at exits 1..E-1.

    Attributes:
        backbone: The stepped backbone; ``backbone.model`` is the Hugging Face model.
        lm_head: The head over the vocabulary; None where it is tied to the input embeddings.
        exits: Norms and adapters of exits 1..E-1.
        policy: Exit policy.
        tokenizer: Its tokenizer (None on a model made from a configuration alone).
        num_layers: L.
        num_exits: E.
        exit_layers: Layer of each exit, increasing; the last is L.
        exit_of_layer: For each layer 0..L the number of its exit; 0 where there is none.
    """

    config_class = EarlyExitCausalConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: EarlyExitCausalConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        base = AutoModel.from_config(config.backbone_config()) if backbone is None else backbone
        self.backbone = step_backbone(base)
        if not self.backbone.is_decoder:
            raise ModelError(
                f"backbone '{config.backbone_name}' is an encoder ({self.backbone.family}), it writes no text"
            )
        self.num_layers: int = self.backbone.num_layers
        if self.num_layers < 2:
            raise ModelError(f"backbone '{config.backbone_name}' has {self.num_layers} layer; early exit needs two")
        hidden = self.backbone.hidden_size
        self.exit_layers = exit_layers(self.num_layers, config.exit_every)
        self.num_exits = len(self.exit_layers)
        self.exits = TokenExits(self.backbone.final_norm, self.num_exits, hidden, config.exit_rank)
        if config.policy_inputs not in INPUTS:
            raise ModelError(f"policy_inputs '{config.policy_inputs}' is unknown; accepted: {', '.join(INPUTS)}")
        self.policy = PolicyHeads(
            self.num_exits, input_size(config.policy_inputs, hidden), config.policy_width, config.policy_shared
        )
        self.lm_head = None if config.tied_head else nn.Linear(hidden, config.vocab_size, bias=False)
        self.tokenizer: Any = None
        self.exit_of_layer = [0] * (self.num_layers + 1)
        for number, layer in enumerate(self.exit_layers, 1):
            self.exit_of_layer[layer] = number
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Exits and policy draw their own weights when made; the backbone's are initialised by its own class."""

    @property
    def max_length(self) -> int:
        """Tokens of an example, longer ones are cut."""
        return int(self.config.max_tokens)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embeddings."""
        return self.backbone.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, None where it is tied (there is nothing to tie again)."""
        return self.lm_head

    @classmethod
    def from_backbone(cls, backbone: str, **options: Any) -> EarlyExitCausalModel:
        """Put fresh exits and a fresh policy on a pretrained causal language model.

        Args:
            backbone: A folder, or a hub id.
            **options: As :meth:`from_model`.

        Raises:
            ModelError: It cannot be loaded or run layer by layer, has no head, or an argument does not fit it.
        """
        with torch.random.fork_rng(devices=[]):
            loaded = pretrained.load_backbone(backbone, AutoModelForCausalLM)
        return cls.from_model(loaded.model, loaded.tokenizer, name=loaded.origin, **options)

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "",
        exit_every: int = 1,
        exit_rank: int = 0,
        policy_width: int = 64,
        policy_inputs: Inputs = "state",
        policy_shared: bool = False,
        max_length: int | None = None,
        task: str = "",
        seed: int = 0,
    ) -> EarlyExitCausalModel:
        """Put fresh exits and a fresh policy on a causal language model at hand, whose weights are used, not copied.

        Args:
            model: A ``...ForCausalLM`` of transformers.
            tokenizer: Its tokenizer, or None.
            name: Where it came from, for the model card.
            exit_every: k: exits at layers k, 2k, ..., and at the last.
            exit_rank: Rank of each exit's adapter; 0: a norm alone.
            policy_width: Hidden width of the policy heads.
            policy_inputs: What the policy reads: ``"state"``, ``"answers"`` or ``"both"``.
            policy_shared: Whether the policy heads of all exits share their weights.
            max_length: Tokens of an example; None: 512, or what the backbone has positions for if that is less.
            task: The task's name.
            seed: Decides the initial weights; torch's generator is left as it was.

        Raises:
            ModelError: It cannot be run layer by layer, has no head, or an argument does not fit it.
        """
        head = model.get_output_embeddings()
        weight, table = getattr(head, "weight", None), model.get_input_embeddings().weight
        if weight is None or getattr(head, "bias", None) is not None:
            raise ModelError(f"backbone '{name}': a causal language model with a head without bias is needed")
        limit = pretrained.position_limit(model.config)
        length = min(512, limit or 512) if max_length is None else max_length
        if length < 4 or (limit is not None and length > limit):
            raise ModelError(f"max_length = {length}; backbone '{name}' accepts 4 to {limit or 'any'} tokens")
        inner = model.base_model.config.to_dict()
        for key in ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures"):
            inner.pop(key, None)
        tokens: dict[str, Any] = {
            key: getattr(model.config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        if tokens["pad_token_id"] is None and tokenizer is not None:
            tokens["pad_token_id"] = tokenizer.pad_token_id
        config = EarlyExitCausalConfig(
            backbone=inner,
            backbone_name=name,
            tied_head=weight is table,
            exit_every=exit_every,
            exit_rank=exit_rank,
            policy_width=policy_width,
            policy_inputs=policy_inputs,
            policy_shared=policy_shared,
            max_tokens=length,
            task=task,
            **tokens,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(config, model.base_model)
        if made.lm_head is not None:
            made.lm_head.weight = weight
        made.to(weight.dtype)
        if getattr(model, "generation_config", None) is not None:
            made.generation_config = copy.deepcopy(model.generation_config)
        made.tokenizer = tokenizer
        return made.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved decoder; as :meth:`rl_exit.models.early_exit.EarlyExitModel.from_pretrained`."""
        return folder.load(cls, super().from_pretrained, pretrained_model_name_or_path, args, kwargs)

    def save_pretrained(self, save_directory: Any, card: str | None = None, **kwargs: Any) -> None:
        """Write config.json, model.safetensors, tokenizer and README.md; a folder is replaced only when all is written.

        Args:
            save_directory: Folder; other files in it stay.
            card: Model card; default: one without results.
            **kwargs: As in transformers (``state_dict``, ``is_main_process``).

        Raises:
            UserError: The folder cannot be written, or there is no space left.
            ModelError: There is no tokenizer, or LoRA adapters are not merged.
        """
        shown = card or causal_card(self.config, self.exit_layers)
        folder.save(self, super().save_pretrained, Path(save_directory), shown, kwargs)

    def exit_state(self, number: int, hidden: Tensor) -> Tensor:
        """What exit ``number`` (1..E) gives to head, policy and criteria: [..., H] from its layer's output [..., H]."""
        return self.backbone.final_norm(hidden) if number == self.num_exits else self.exits.at(number, hidden)

    def head(self, states: Tensor) -> Tensor:
        """Logits [..., V] from exit states [..., H]; the same head for every exit."""
        return F.linear(states, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The head's weight, [V, H]."""
        source: Any = self.get_input_embeddings() if self.lm_head is None else self.lm_head
        return source.weight

    def all_exits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run all layers for all tokens; differentiable.

        Args:
            input_ids: int64 [B, T], padded on the right.
            attention_mask: [B, T], 1 at real tokens; None: no padding.

        Returns:
            States of every token at every exit, [B, E, T, H]; ``head`` makes logits of them.
        """
        state = self.backbone.begin(input_ids, attention_mask)
        found = []
        for layer in range(1, self.num_layers + 1):
            state = self.backbone.step(layer, state)
            number = self.exit_of_layer[layer]
            if number:
                found.append(self.exit_state(number, state.hidden))
        return torch.stack(found, 1)

    def copied_states(self, input_ids: Tensor, attention_mask: Tensor | None, exit_layer: Tensor) -> Tensor:
        """State of every token at the exit where it leaves, all tokens before it having left at theirs; differentiable.

        One teacher-forced pass under state copying (:func:`present`): what generation computes token by token.

        Args:
            input_ids: int64 [B, T], padded on the right.
            attention_mask: [B, T], 1 at real tokens; None: no padding.
            exit_layer: int64 [B, T], for each position the layer of an exit; L for the prompt, run at full depth.

        Returns:
            [B, T, H]; ``head`` makes the logits of the next token of it.

        Raises:
            ValueError: A layer without exit.
        """
        numbers = leaving_exits(self.exit_of_layer, exit_layer)
        state = self.backbone.begin(input_ids, attention_mask)
        for layer in range(1, self.num_layers + 1):
            after = self.backbone.step(layer, state)
            state = after.with_hidden(present(state.hidden, after.hidden, exit_layer >= layer))
        out = self.exit_state(self.num_exits, state.hidden)
        for number in range(1, self.num_exits):
            out = torch.where((numbers == number).unsqueeze(-1), self.exit_state(number, state.hidden), out)
        return out

    @torch.no_grad()
    def score_tokens(self, states: Tensor, targets: Tensor) -> TokenScores:
        """Losses and first choices of every exit for chosen tokens; logits exist for a block at a time only.

        Args:
            states: [N, E, H], e.g. ``all_exits(...)`` at the positions before response tokens.
            targets: int64 [N], the next token of each.
        """
        flat, wanted = states.flatten(0, 1), targets.repeat_interleave(states.shape[1])
        losses = torch.empty(len(flat), dtype=torch.float32, device=states.device)
        chosen = torch.empty(len(flat), dtype=torch.int64, device=states.device)
        rows = self._block_rows()
        for at in range(0, len(flat), rows):
            logits = self.head(flat[at : at + rows]).float()
            losses[at : at + rows] = F.cross_entropy(logits, wanted[at : at + rows], reduction="none")
            chosen[at : at + rows] = logits.argmax(-1)
        shape = states.shape[:2]
        return TokenScores(losses.view(shape), (chosen == wanted).view(shape), chosen.view(shape))

    def token_losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the next token in nats, differentiable, without keeping the logits: they are computed again
        for the gradient, block by block.

        Args:
            states: [N, H] of any exits.
            targets: int64 [N].

        Returns:
            float32 [N].
        """
        rows, parts = self._block_rows(), []
        for at in range(0, len(states), rows):
            piece = states[at : at + rows], targets[at : at + rows]
            if torch.is_grad_enabled() and len(states) > rows:
                parts.append(checkpoint(self._losses, *piece, use_reentrant=False))
            else:
                parts.append(self._losses(*piece))
        return torch.cat(parts) if parts else states.new_zeros(0, dtype=torch.float32)

    def _losses(self, states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(states).float(), targets, reduction="none")

    def _block_rows(self) -> int:
        return max(BLOCK_LOGITS // self.head_weight.shape[0], 1)

    def exit_logits(self, states: Tensor) -> Tensor:
        """The policy's log-odds of Exit at exits 1..E-1, [N, E-1], from states [N, E, H]."""
        return self.policy(self.policy_reads(states))

    def policy_reads(self, states: Tensor) -> Tensor:
        """What the policy reads of N tokens: [N, E, D] from states [N, E, H]; logits exist for a block at a time."""
        inputs: Inputs = self.config.policy_inputs
        if inputs == "state":
            return states
        rows = max(self._block_rows() // self.num_exits, 1)
        parts = [every_policy_input(inputs, part, self.head(part).float()) for part in states.split(rows) if len(part)]
        return torch.cat(parts) if parts else states.new_zeros((0, self.num_exits, self.policy.hidden_size))

    def view(self, number: int, hidden: Tensor, progress: Tensor | None = None) -> LayerView:
        """What a criterion sees at exit ``number`` for B tokens, from their layer's output [B, H].

        To criteria the exits are the layers: ``layer`` is the exit's number and ``num_layers`` is E.

        Args:
            number: 1..E.
            hidden: [B, H].
            progress: Share of each row's generation that is done, [B], for thresholds that fall along the way.
        """
        found = LayerView(
            number,
            self.num_exits,
            len(hidden),
            hidden.device,
            state=lambda: self.exit_state(number, hidden),
            logits=lambda: self.head(found.state),
            exit_logit=lambda carry: self.exit_logit(found, carry),
            progress=progress,
        )
        return found

    def generate(
        self,
        inputs: Tensor | str | Sequence[str] | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        criterion: Criterion | None = None,
        threshold: float | None = None,
        streamer: Any = None,
        batch_size: int = 8,
        **options: Any,
    ) -> Any:
        """Continue texts or token ids; each token leaves at its own layer, the layers above are not computed for it.

        Prompts run at full depth. Rows of a batch may have any lengths and leave at different layers.

        Args:
            inputs: A text, several texts, or token ids int64 [B, T].
            generation_config: Settings as a whole; ``**options`` go before it.
            input_ids: Token ids int64 [B, T], as transformers names them; None without texts: the beginning of a text.
            attention_mask: [B, T], 1 at real tokens, padding on either side; None: as transformers infers it.
            criterion: In place of the policy, e.g. ``rl_exit.criteria.criterion("calm_softmax", threshold=0.9)``; to
                criteria the exits 1..E are the layers.
            threshold: Of the policy, in place of ``config.threshold``; 1: full depth.
            streamer: One of transformers, for token ids.
            batch_size: Texts at a time; changes speed, not greedy results.
            **options: Settings by name: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
                ``min_p``, ``repetition_penalty``, ``seed``, ``stop_strings``, ``eos_token_id``, ``lossless``,
                ``draft_tokens``, ... (:class:`rl_exit.generation.sampling.Settings`). Unset ones are those of
                ``model.generation_config``, then transformers' own.

        Returns:
            For texts a list of :class:`rl_exit.generation.api.Generation` (one text: a list of one). For token ids
            int64 [B, T + N], or with ``return_dict_in_generate=True`` a
            :class:`~rl_exit.generation.api.GenerationOutput` with the exit layer of every token.

        Raises:
            UserError: Something other than texts or token ids, or a setting that is not accepted.
        """
        rule = api.the_rule(self, criterion, threshold)
        if inputs is not None and not isinstance(inputs, Tensor):
            texts = [inputs] if isinstance(inputs, str) else inputs
            return api.generate_texts(self, texts, rule, generation_config, batch_size, options)
        given = inputs if input_ids is None else input_ids
        return api.generate_ids(self, given, attention_mask, rule, generation_config, streamer, options)

    def stream(
        self,
        prompts: Sequence[str],
        generation_config: GenerationConfig | None = None,
        *,
        criterion: Criterion | None = None,
        threshold: float | None = None,
        **options: Any,
    ) -> Iterator[list[Event]]:
        """As :meth:`generate` for texts, but each token when it is there: yields the events of each step.

        Args:
            prompts: Texts, generated together.
            generation_config: See :meth:`generate`.
            criterion: See :meth:`generate`.
            threshold: See :meth:`generate`.
            **options: See :meth:`generate`.
        """
        rule = api.the_rule(self, criterion, threshold)
        return api.stream_texts(self, prompts, rule, generation_config, options)

    def exit_logit(self, view: LayerView, carry: Carry) -> Tensor:
        """The policy's log-odds of Exit at one exit, [B]; what the exits answered is remembered in the carry."""
        inputs: Inputs = self.config.policy_inputs
        figures = None if inputs == "state" else answer_figures(view.layer, self.num_exits, view.logits, carry)
        state = None if inputs == "answers" else view.state
        return self.policy.at(view.layer, policy_input(inputs, state, figures))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Score text at full depth, as transformers calls it; :meth:`generate` is where tokens leave early.

        In training mode the loss is ``sum_e e CE_e / sum_e e`` over exits (Eq. 2), else that of the last exit.

        Args:
            input_ids: int64 [B, T], padded on the right.
            attention_mask: [B, T].
            labels: int64 [B, T], not shifted; -100 where nothing is learned.
            return_dict: False: a plain tuple.
            **_: What callers of causal models pass and this one has no use for (``use_cache``, ...).
        """
        states = self.all_exits(input_ids, attention_mask)
        loss: Tensor | None = None
        if labels is not None:
            row, position = (labels[:, 1:] != -100).nonzero(as_tuple=True)
            used = range(1, self.num_exits + 1) if self.training else (self.num_exits,)
            targets = labels[row, position + 1]
            losses = [self.token_losses(states[row, number - 1, position], targets).mean() for number in used]
            loss = sum((n * one for n, one in zip(used, losses, strict=True)), start=states.new_zeros(())) / sum(used)
        output = CausalLMOutput(loss=loss, logits=self.head(states[:, -1]))
        return output.to_tuple() if return_dict is False else output


AutoConfig.register("early_exit_causal", EarlyExitCausalConfig, exist_ok=True)
AutoModel.register(EarlyExitCausalConfig, EarlyExitCausalModel, exist_ok=True)
AutoModelForCausalLM.register(EarlyExitCausalConfig, EarlyExitCausalModel, exist_ok=True)
