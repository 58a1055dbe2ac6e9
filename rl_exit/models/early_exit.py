"""The multi-exit model: a Hugging Face backbone, an exit classifier at every layer, an exit policy.

It is a transformers model of type ``early_exit``: ``AutoModelForSequenceClassification``, ``Trainer`` and
``pipeline("text-classification")`` work on it once this module is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ModelOutput

from rl_exit.criteria import Carry, ConsistentEE, Criterion, LayerView
from rl_exit.criteria.base import Parted
from rl_exit.errors import ModelError
from rl_exit.inference import run_batch, run_texts
from rl_exit.models import folder, pretrained
from rl_exit.models.answer_heads import ANSWERS, Answer, AnswerHeads
from rl_exit.models.answers import (
    INPUTS,
    Inputs,
    answer_figures,
    confidence_log_odds,
    every_policy_input,
    input_size,
    policy_input,
)
from rl_exit.models.backbones import StepState, step_backbone
from rl_exit.models.choices import chosen_rule
from rl_exit.models.decision import CompiledExits, Decision
from rl_exit.models.exits import ExitHeads, pool
from rl_exit.models.gpu_exits import GpuExits
from rl_exit.models.native_exits import NativeExits
from rl_exit.models.policy import PolicyHeads
from rl_exit.models.quick_policy import QuickPolicy

POOLINGS = ("cls", "mean", "last")
RULES = ("learned", "confidence")


class EarlyExitConfig(PretrainedConfig):
    """What ``config.json`` of a saved model holds, beside the common fields of transformers (``id2label``, ...).

    Args:
        backbone: Configuration of the backbone, as a mapping with its ``model_type``.
        backbone_name: Where its weights came from, for the model card.
        pooling: ``"cls"``, ``"mean"`` or ``"last"``: the pooled state of a layer.
        policy_width: W, hidden width of the policy heads.
        policy_inputs: What the policy reads: ``"state"``, ``"answers"`` or ``"both"`` (:mod:`rl_exit.models.answers`).
        policy_shared: Whether the policy heads of all layers share their weights.
        policy_answer: What the policy answers: ``"exit"`` or ``"own"`` (:mod:`rl_exit.models.answer_heads`).
        policy_rule: Which pi decides: ``"learned"``, the policy heads', or ``"confidence"``, the probability of what
            would be answered (:mod:`rl_exit.trainers.safe_policy`).
        dropout: On the state before an exit, in training.
        max_tokens: Tokens per text, longer are cut (``max_length`` is a word of text generation in transformers).
        threshold: Operating point: leave at the first ``pi > threshold``.
        metric: The task's metric.
        task: The task's name.
        operating_points: By name, what ``rl-exit calibrate`` has chosen (:mod:`rl_exit.operating`).
        **kwargs: Common fields.
    """

    model_type = "early_exit"
    # Trainer's compute_metrics sees the class logits alone.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["exit_layer"]

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        backbone_name: str = "",
        pooling: str = "cls",
        policy_width: int = 64,
        policy_inputs: Inputs = "state",
        policy_shared: bool = False,
        policy_answer: Answer = "exit",
        policy_rule: str = "learned",
        dropout: float = 0.1,
        max_tokens: int = 128,
        threshold: float = 0.5,
        metric: str = "accuracy",
        task: str = "",
        operating_points: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone or {}
        self.backbone_name = backbone_name
        self.pooling = pooling
        self.policy_width = policy_width
        self.policy_inputs = policy_inputs
        self.policy_shared = policy_shared
        self.policy_answer = policy_answer
        self.policy_rule = policy_rule
        self.dropout = dropout
        self.max_tokens = max_tokens
        self.threshold = threshold
        self.metric = metric
        self.task = task
        self.operating_points = operating_points or {}
        super().__init__(**kwargs)

    def backbone_config(self) -> Any:
        """The backbone's configuration as its own class."""
        values = dict(self.backbone)
        return AutoConfig.for_model(values.pop("model_type", ""), **values)


class AllExits(NamedTuple):
    """One pass over all layers.

    Attributes:
        states: [B, L, H], pooled states.
        logits: [B, L, C], logits of every exit.
    """

    states: Tensor
    logits: Tensor


@dataclass
class EarlyExitOutput(ModelOutput):
    """What ``forward`` returns.

    Attributes:
        loss: Scalar, where labels were given.
        logits: [B, C], of the exit each row left at.
        exit_layer: [B] int64, 1..L.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_layer: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """The answer for one text.

    Attributes:
        label: Name of the class.
        label_id: Its number.
        probabilities: [C], of the exit that answered.
        exit_layer: 1..L.
    """

    label: str
    label_id: int
    probabilities: list[float]
    exit_layer: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


class EarlyExitModel(PreTrainedModel):
    """Backbone run layer by layer, exits at 1..L, policy at 1..L-1.

    Attributes:
        backbone: The stepped backbone; ``backbone.model`` is the Hugging Face model.
        exits: Exit classifiers.
        policy: Exit policy.
        answer_heads: What the policy answers when a row leaves; None: what the exit says.
        tokenizer: Its tokenizer (None on a model made from a configuration alone).
        num_layers: L.
    """

    config_class = EarlyExitConfig
    main_input_name = "input_ids"
    # The backbone chooses its attention from its own configuration.
    _supports_sdpa = True

    def __init__(self, config: EarlyExitConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if config.pooling not in POOLINGS:
            raise ModelError(f"pooling '{config.pooling}' is unknown; accepted: {', '.join(POOLINGS)}")
        if not isinstance(config.max_tokens, int) or config.max_tokens < 1:
            raise ModelError(f"max_tokens = {config.max_tokens!r}; accepted: a whole number of at least 1")
        base = AutoModel.from_config(config.backbone_config()) if backbone is None else backbone
        # The pooler of BERT-like models serves their own head; kept, it would be saved and never trained.
        if getattr(base, "pooler", None) is not None:
            base.pooler = None
        self.backbone = step_backbone(base)
        self.num_layers: int = self.backbone.num_layers
        hidden = self.backbone.hidden_size
        if self.num_layers < 2:
            raise ModelError(f"backbone '{config.backbone_name}' has {self.num_layers} layer; early exit needs two")
        self.exits = ExitHeads(self.num_layers, hidden, config.num_labels, config.dropout)
        if config.policy_inputs not in INPUTS:
            raise ModelError(f"policy_inputs '{config.policy_inputs}' is unknown; accepted: {', '.join(INPUTS)}")
        self.policy = PolicyHeads(
            self.num_layers, input_size(config.policy_inputs, hidden), config.policy_width, config.policy_shared
        )
        if config.policy_answer not in ANSWERS:
            raise ModelError(f"policy_answer '{config.policy_answer}' is unknown; accepted: {', '.join(ANSWERS)}")
        if config.policy_rule not in RULES:
            raise ModelError(f"policy_rule '{config.policy_rule}' is unknown; accepted: {', '.join(RULES)}")
        own = config.policy_answer == "own"
        self.answer_heads = AnswerHeads(self.num_layers, hidden, config.num_labels) if own else None
        self.tokenizer: Any = None
        self._quick: QuickPolicy | None = None
        self._native: CompiledExits | None = None
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Heads draw their own weights when made; the backbone's modules are initialised by its own class."""

    @property
    def max_length(self) -> int:
        """Tokens per text, longer are cut."""
        return int(self.config.max_tokens)

    @property
    def device(self) -> torch.device:
        """Where the model is; asked once a batch, for which transformers' search through all modules is long."""
        found: torch.device = self.exits.weight.device
        return found

    def get_input_embeddings(self) -> torch.nn.Module:
        """The backbone's token embeddings."""
        return self.backbone.model.get_input_embeddings()

    @classmethod
    def from_backbone(
        cls,
        backbone: str,
        label_names: Sequence[str],
        *,
        pooling: str | None = None,
        policy_width: int = 64,
        policy_inputs: Inputs = "state",
        policy_shared: bool = False,
        policy_answer: Answer = "exit",
        dropout: float = 0.1,
        max_length: int = 128,
        seed: int = 0,
    ) -> EarlyExitModel:
        """Put fresh exits and a fresh policy on a pretrained backbone.

        Args:
            backbone: ``"minilm"`` (PyPI package), a folder, or a hub id.
            label_names: Class names in the order of their numbers, C >= 2.
            pooling: ``"cls"``, ``"mean"`` or ``"last"``; None: mean for MiniLM, what a sentence-transformers model
                names, last for other decoders, cls for other encoders.
            policy_width: Hidden width of the policy heads.
            policy_inputs: What the policy reads: ``"state"``, ``"answers"`` or ``"both"``.
            policy_shared: Whether the policy heads of all layers share their weights.
            policy_answer: What the policy answers: ``"exit"`` or ``"own"``.
            dropout: On the state before an exit, in training.
            max_length: Tokens per text.
            seed: Decides the initial heads; torch's generator is left as it was.

        Raises:
            ModelError: The backbone cannot be loaded or run layer by layer, or an argument does not fit it.
        """
        names = _checked_names(label_names)
        with torch.random.fork_rng(devices=[]):
            loaded = pretrained.load_backbone(backbone)
        limit = pretrained.position_limit(loaded.model.config)
        if max_length < 4 or (limit is not None and max_length > limit):
            raise ModelError(f"max_length = {max_length}; backbone '{backbone}' accepts 4 to {limit or 'any'} tokens")
        decoder = bool(step_backbone(loaded.model).is_decoder)
        inner = loaded.model.config.to_dict()
        for key in ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures"):
            inner.pop(key, None)
        config = EarlyExitConfig(
            backbone=inner,
            backbone_name=loaded.origin,
            pooling=pooling or loaded.pooling or ("last" if decoder else "cls"),
            policy_width=policy_width,
            policy_inputs=policy_inputs,
            policy_shared=policy_shared,
            policy_answer=policy_answer,
            dropout=dropout,
            max_tokens=max_length,
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
            pad_token_id=loaded.tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config, loaded.model)
        model.tokenizer = loaded.tokenizer
        # What pipelines cut at when told to truncate.
        model.tokenizer.model_max_length = max_length
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model; a folder needs no network, anything else is a hub id.

        A saved decoder comes back as :class:`rl_exit.models.causal.EarlyExitCausalModel`.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            *args: As in transformers.
            **kwargs: As in transformers; safetensors only, and no remote code.

        Raises:
            ModelError: Missing, no early-exit model, damaged, incomplete, or without tokenizer.
        """
        if cls is EarlyExitModel and folder.kind(pretrained_model_name_or_path, kwargs) == "early_exit_causal":
            from rl_exit.models.causal import EarlyExitCausalModel

            return EarlyExitCausalModel.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return folder.load(cls, super().from_pretrained, pretrained_model_name_or_path, args, kwargs)

    def save_pretrained(self, save_directory: Any, card: str | None = None, **kwargs: Any) -> None:
        """Write config.json, model.safetensors, tokenizer and README.md; a folder is replaced only when all is written.

        Args:
            save_directory: Folder; other files in it stay.
            card: Model card (see :func:`rl_exit.models.card.model_card`); default: one without results.
            **kwargs: As in transformers (``state_dict``, ``is_main_process``).

        Raises:
            UserError: The folder cannot be written, or there is no space left.
            ModelError: There is no tokenizer, or LoRA adapters are not merged.
        """
        folder.save(self, super().save_pretrained, Path(save_directory), card, kwargs)

    def view(self, layer: int, state: StepState) -> LayerView:
        """What a criterion sees after ``layer``: pooled state, exit logits and policy, computed when read."""
        return _View(self, layer, state)

    def all_exits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> AllExits:
        """Run all layers; differentiable.

        Args:
            input_ids: int64 [B, T], padded on the right.
            attention_mask: [B, T], 1 at real tokens; None: no padding.
            token_type_ids: int64 [B, T], where the backbone has segments.

        Returns:
            States [B, L, H] and logits [B, L, C].
        """
        state = self.backbone.begin(input_ids, attention_mask, token_type_ids)
        pooled = []
        for layer in range(1, self.num_layers + 1):
            state = self.backbone.step(layer, state)
            pooled.append(self._pooled(layer, state))
        states = torch.stack(pooled, 1)
        return AllExits(states, self.exits(states))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> EarlyExitOutput | tuple[Tensor, ...]:
        """Classify, as transformers calls it.

        In evaluation mode every row really leaves at its layer, by the policy and ``config.threshold``; the loss is the
        cross-entropy there. In training mode all layers run and the loss is ``sum_l l CE_l / sum_l l`` (Eq. 2), so that
        Trainer does the initialisation; the policy is not trained.

        Args:
            input_ids: int64 [B, T], padded on the right.
            attention_mask: [B, T].
            token_type_ids: int64 [B, T].
            labels: int64 [B].
            return_dict: False: a plain tuple.
        """
        loss: Tensor | None = None
        if self.training:
            every = self.all_exits(input_ids, attention_mask, token_type_ids).logits
            logits = every[:, -1]
            exit_layer = torch.full((len(every),), self.num_layers, device=every.device)
            if labels is not None:
                loss = _weighted_loss(every, labels)
        else:
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            batch = {key: value for key, value in given.items() if value is not None}
            out = run_batch(self, batch, ConsistentEE(self.config.threshold))
            logits, exit_layer = out.logits, out.exit_layer.to(out.logits.device)
            if labels is not None:
                loss = F.cross_entropy(logits.float(), labels)
        output = EarlyExitOutput(loss=loss, logits=logits, exit_layer=exit_layer)
        return output.to_tuple() if return_dict is False else output

    def predict(
        self,
        texts: Iterable[str],
        text_pairs: Iterable[str] | None = None,
        *,
        batch_size: int = 32,
        threshold: float | None = None,
        criterion: Criterion | None = None,
        operating_point: str | None = None,
        speed: float | None = None,
        progress: bool = False,
    ) -> list[Prediction]:
        """Classify texts; each leaves at its own layer and the layers above are not computed for it.

        Args:
            texts: N texts.
            text_pairs: N second texts, for tasks on sentence pairs.
            batch_size: Texts at a time; changes speed, not results.
            threshold: Of the policy, in place of ``config.threshold``.
            criterion: In place of the policy, e.g. ``rl_exit.criteria.criterion("max_probability", threshold=0.9)``.
            operating_point: Name of a point that ``rl-exit calibrate`` has saved, in place of the threshold.
            speed: Place on the dial that ``rl-exit dial`` has trained, 0 (full depth) to 1, in place of the threshold.
            progress: Show a bar on standard error.

        Returns:
            N predictions, in the order of the texts.

        Raises:
            UserError: Something other than texts was given, or a value out of range.
        """
        rule = chosen_rule(self, threshold, criterion, operating_point, speed)
        out = run_texts(self, texts, text_pairs, rule, batch_size, progress)
        chosen = out.logits.argmax(-1)
        names = self.config.id2label
        return [
            Prediction(names[number], number, probabilities, layer)
            for number, probabilities, layer in zip(
                chosen.tolist(), out.logits.softmax(-1).tolist(), out.exit_layer.tolist(), strict=True
            )
        ]

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model with its tokenizer, card, learned criteria and dial.

        Args:
            repo_id: ``user/name``.
            **options: ``private``, ``token``, ``revision``, ``commit_message``, ``create_pr``, as in huggingface_hub.

        Returns:
            Address of the commit.

        Raises:
            ModelError: The hub cannot be reached or refuses.
        """
        return folder.push(self, repo_id, options)

    def lighten(self) -> EarlyExitModel:
        """Make the model ready for answering alone: backbone in bfloat16, exits and policy stay in float32.

        Half the memory, and faster where the processor computes in bfloat16. Answers then differ from those in float32
        by its rounding.

        Returns:
            The model itself.
        """
        self.backbone.to(torch.bfloat16)
        return self

    def compile_layers(self, backend: str = "inductor") -> EarlyExitModel:
        """Compile each layer (``torch.compile``, one program for all batch sizes and lengths).

        Args:
            backend: Of torch.compile; the default needs a C++ compiler, and some ten seconds at the first texts.

        Returns:
            The model itself.

        Raises:
            ModelError: The layers of this backbone are not separate modules.
        """
        for layer in self.backbone.layer_modules():
            layer.compile(dynamic=True, backend=backend)
        return self

    def exit_logits(self, states: Tensor, logits: Tensor) -> Tensor:
        """Log-odds of Exit by which the model leaves, [B, L-1], from states [B, L, H] and logits [B, L, C]."""
        if self.config.policy_rule == "confidence":
            return confidence_log_odds(self.answers(states, logits)[:, :-1])
        return self.policy_logits(states, logits)

    def policy_logits(self, states: Tensor, logits: Tensor) -> Tensor:
        """Those of the policy heads, whether or not they decide; shapes as :meth:`exit_logits`."""
        return self.policy(every_policy_input(self.config.policy_inputs, states, self.answers(states, logits)))

    def answers(self, states: Tensor, logits: Tensor) -> Tensor:
        """What the policy answers at every layer, [B, L, C], from states [B, L, H] and the exits' logits [B, L, C]."""
        return logits if self.answer_heads is None else self.answer_heads(states, logits)

    def _exit_logit(self, view: LayerView, carry: Carry) -> Tensor:
        """Log-odds of Exit of one layer, [B]; what the exits answered is remembered in the carry."""
        inputs = self.config.policy_inputs
        if self.config.policy_rule == "confidence":
            return confidence_log_odds(view.answer)
        if inputs == "answers" and (quick := self._quick_policy(view.answer)) is not None:
            return quick.at(view.layer, view.answer, carry)
        figures = None if inputs == "state" else answer_figures(view.layer, self.num_layers, view.answer, carry)
        pooled = None if inputs == "answers" else view.state
        return self.policy.at(view.layer, policy_input(inputs, pooled, figures))

    def _decide(self, layer: int, state: StepState, carry: Carry, cut: float) -> Decision | None:
        """The decision in compiled code, which knows the answers too; None where it cannot be had."""
        if self.training or torch.is_grad_enabled():
            return None
        # Modules and configuration are asked where a text begins.
        compiled = self._compiled_exits(state.hidden) if layer == 1 else self._native
        if compiled is None or not compiled.reads(state.hidden):
            return None
        return compiled.decide(layer, state.backbone.hidden(layer, state), state, carry, cut)

    def _compiled_exits(self, hidden: Tensor) -> CompiledExits | None:
        """Compiled code that reads the modules as they are now; None where there is none for them."""
        found, settings = self._native, self.config.__dict__  # past transformers' own way to it, which is dear
        confident = settings["policy_rule"] == "confidence"
        parts = self.exits, self.answer_heads, None if confident else self.policy
        if settings["policy_inputs"] != "answers" and not confident:
            found = None
        elif found is None or not (found.reads(hidden) and found.serves(*parts)):
            kind = NativeExits if hidden.is_cpu else GpuExits
            found = kind.of(*parts, settings["pooling"], hidden.dtype) if hidden.is_cpu or hidden.is_cuda else None
        self._native = found
        return found

    def _quick_policy(self, logits: Tensor) -> QuickPolicy | None:
        """The policy on numpy, where nothing is to be differentiated and all is on the CPU in float32."""
        weight = self.policy.weight_in
        if torch.is_grad_enabled() or logits.device.type != "cpu" or weight.dtype != torch.float32:
            return None
        if self._quick is None or not self._quick.serves(self.policy):
            self._quick = QuickPolicy(self.policy, self.config.num_labels) if weight.device.type == "cpu" else None
        return self._quick

    def _pooled(self, layer: int, state: StepState) -> Tensor:
        hidden, how = self.backbone.hidden(layer, state), self.config.pooling
        if how == "cls":
            return hidden[:, 0]
        if how == "mean" and not state.padded:
            return hidden.mean(1)
        return pool(hidden, state.attention_mask, how)


class _View(LayerView):
    """What a criterion sees of an :class:`EarlyExitModel`; made once a step, so it keeps no functions."""

    _decision: Decision | None = None  # in compiled code, once it was asked for; it knows the answer too

    def __init__(self, model: EarlyExitModel, layer: int, state: StepState) -> None:
        self.layer, self.num_layers = layer, model.num_layers
        self.batch_size, self.device, self.progress = state.hidden.shape[0], state.hidden.device, None
        self._model, self._step = model, state

    def _state(self) -> Tensor:
        return self._model._pooled(self.layer, self._step)

    def _logits(self) -> Tensor:
        return self._model.exits.at(self.layer, self.state)

    def _answer(self) -> Tensor:
        if self._decision is not None:
            return self._decision.answers
        heads = self._model.answer_heads
        return self.logits if heads is None else heads.at(self.layer, self.state, self.logits)

    def _exit_logit(self, carry: Carry) -> Tensor:
        decision = self._decision = self._model._decide(self.layer, self._step, carry, math.inf)
        return self._model._exit_logit(self, carry) if decision is None else decision.odds

    def leaving(self, above: float, carry: Carry) -> Parted | None:
        """See :meth:`rl_exit.criteria.base.LayerView.leaving`; in compiled code where that can be had."""
        decision = self._decision = self._model._decide(self.layer, self._step, carry, above)
        return super().leaving(above, carry) if decision is None else decision.apart


def _weighted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """``sum_l l CE_l / sum_l l`` (Eq. 2), mean over the batch. logits [B, L, C], labels [B]."""
    layers = logits.shape[1]
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels[:, None].expand(-1, layers), reduction="none")
    weight = torch.arange(1, layers + 1, device=losses.device, dtype=losses.dtype)
    return (losses.mean(0) * weight).sum() / weight.sum()


def _checked_names(label_names: Sequence[str]) -> list[str]:
    names = list(label_names)
    if len(names) < 2 or len(set(names)) != len(names) or not all(isinstance(name, str) and name for name in names):
        raise ModelError(f"label names {names[:8]}; accepted: two or more different, non-empty strings")
    return names


AutoConfig.register("early_exit", EarlyExitConfig, exist_ok=True)
AutoModel.register(EarlyExitConfig, EarlyExitModel, exist_ok=True)
AutoModelForSequenceClassification.register(EarlyExitConfig, EarlyExitModel, exist_ok=True)
