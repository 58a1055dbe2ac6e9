"""Running a Hugging Face backbone one layer at a time.

A :class:`Family` says in a few functions how the base model of one architecture embeds its input and calls its layers;
:class:`SteppedBackbone` does the rest the same way for all of them. The layers are the model's own modules: weights,
dropout, autocast and adapters (LoRA) act as in the model's own forward pass, and only the loop over layers is ours
(and, where nothing but the numbers can show it, the calls inside a layer: :mod:`.quick_layer`).

Shapes: B rows, T tokens (padded on the right), H hidden size, L layers. Layers count from 1; layer 0 is the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rl_exit.errors import ModelError
from rl_exit.models.backbones.blocks import Blocks
from rl_exit.models.backbones.embeddings import Ragged
from rl_exit.models.backbones.masks import ATTENTIONS, MaskForm, attention_mask_for, attention_of
from rl_exit.models.backbones.rows import Indices, Padded, pad_rows


@dataclass(frozen=True)
class Tables:
    """What layers read besides states and masks; the same for every row, so that rows can leave without touching it.

    Attributes:
        by_token: Tensors [1, T, ...], one entry per position (rotary cosines and sines).
        by_pair: Tensors [..., T, T], one entry per pair of positions (relative positions and their biases).
        fixed: Tensors that do not depend on the length.
    """

    by_token: Mapping[str, Tensor] = field(default_factory=dict)
    by_pair: Mapping[str, Tensor] = field(default_factory=dict)
    fixed: Mapping[str, Tensor | None] = field(default_factory=dict)

    def trim(self, length: int) -> Tables:
        """Return the tables of the first `length` positions."""
        return Tables(
            by_token={name: table[:, :length] for name, table in self.by_token.items()},
            by_pair={name: table[..., :length, :length] for name, table in self.by_pair.items()},
            fixed=self.fixed,
        )


@dataclass(frozen=True)
class StepState:
    """A batch between two layers. Never changed in place: each operation returns a new one.

    Attributes:
        hidden: Output of the last layer that ran, before any final norm, [B, T, H].
        lengths: Real tokens of each row, int64 [B], always on the CPU, so that nobody has to ask the device.
        padded: Whether any row is shorter than T.
        masks: By reach (None: everything), what the layers of that reach take as mask; None where none is needed.
        tables: Rotary tables, relative positions and the like.
        backbone: The backbone that made this state.
    """

    hidden: Tensor
    lengths: Tensor
    padded: bool
    masks: Mapping[int | None, Tensor | None]
    tables: Tables
    backbone: SteppedBackbone = field(repr=False, compare=False)

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return self.hidden.shape[0]

    @property
    def length(self) -> int:
        """Padded number of tokens T."""
        return self.hidden.shape[1]

    @cached_property
    def attention_mask(self) -> Tensor:
        """1 at real tokens and 0 at right padding, int64 [B, T] on the device; made when first read."""
        return _real_tokens(self.lengths, self.hidden).to(torch.int64)

    @cached_property
    def device_lengths(self) -> Tensor:
        """``lengths`` on the device; brought there when first read."""
        return self.lengths.to(self.hidden.device)

    def with_hidden(self, hidden: Tensor) -> StepState:
        """Return the same batch with other hidden states, [B, T, H]."""
        after = StepState(hidden, self.lengths, self.padded, self.masks, self.tables, self.backbone)
        for name in ("attention_mask", "device_lengths"):
            if (known := self.__dict__.get(name)) is not None:
                after.__dict__[name] = known
        return after

    def apart(self) -> Iterator[StepState]:
        """Yield each row as a batch of its own without padding, in order; a view, nothing is copied."""
        rows, real = self.hidden.unsqueeze(1).unbind(), self.lengths.unsqueeze(1).unbind()
        for hidden, lengths, count in zip(rows, real, self.lengths.tolist(), strict=True):
            keep = max(count, 1)
            whole = keep == self.length
            mine = hidden if whole else hidden[:, :keep]
            masks = self.backbone.masks(mine, lengths, count < keep)
            tables = self.tables if whole else self.tables.trim(keep)
            yield StepState(mine, lengths, count < keep, masks, tables, self.backbone)

    def select(self, rows: Tensor, length: int | None = None) -> StepState:
        """Return the state of some rows, with right padding trimmed; positions stay as they are.

        Masks are built anew for what is left, and dropped where no padding is left. ``int(state.lengths[rows].max())``
        is the shortest `length` possible.

        Args:
            rows: Which rows to keep and in which order, integer [B'] on any device (best the CPU, where `lengths` is).
            length: Tokens to keep, at least the longest kept row; None keeps T.

        Raises:
            ValueError: `length` would cut real tokens off, or is greater than T.
        """
        lengths = self.lengths.index_select(0, rows.to(self.lengths.device))
        keep = self.length if length is None else length
        longest = int(lengths.max()) if lengths.shape[0] else 0
        if not longest <= keep <= self.length:
            raise ValueError(
                f"length must lie between the longest kept row, {longest}, and T = {self.length}, not {keep}"
            )
        hidden = self.hidden[:, :keep].index_select(0, rows.to(self.hidden.device))
        padded = _shorter_than(lengths, keep)
        return StepState(
            hidden=hidden,
            lengths=lengths,
            padded=padded,
            masks=self.backbone.masks(hidden, lengths, padded),
            tables=self.tables if keep == self.length else self.tables.trim(keep),
            backbone=self.backbone,
        )


def join_states(
    states: Sequence[StepState], rows: Sequence[Indices | None] | None = None, longest: int | None = None
) -> StepState:
    """Put batches that stand after the same layer together, in their order, padded to the longest row among them.

    Rows do not see each other, so each goes on as it would have alone. Batches of different padding may be joined: the
    shorter are padded with zeros, and padding beyond the longest row is cut.

    Args:
        states: One or more of the same backbone, after the same layer.
        rows: Of each batch, which of its rows, 0..B-1, int64, in the order wanted; None: all.
        longest: Tokens of the longest of these rows, where the caller knows them.

    Returns:
        The rows of all of them, [sum of B, T, H], with masks for the next layer; a single batch as it is where all of
        its rows are wanted and none of its columns is padding alone.

    Raises:
        ValueError: No states, or of different backbones, or rows of another type, or `longest` is not theirs.
        IndexError: A row below 0 or beyond its batch.
    """
    if not states or any(state.backbone is not states[0].backbone for state in states):
        raise ValueError("join_states needs one or more states of one backbone")
    backbone = states[0].backbone
    chosen = (None,) * len(states) if rows is None else [some if some is None else _row_numbers(some) for some in rows]
    count = sum(state.batch_size if some is None else len(some) for state, some in zip(states, chosen, strict=True))
    # What the layers read beside the rows is the same for every row; the longest batch has all positions.
    widest = max(states, key=lambda state: state.length) if len(states) > 1 else states[0]
    if longest is None:
        lengths = [state.lengths.numpy() for state in states]
        kept = [real if some is None else real[some] for real, some in zip(lengths, chosen, strict=True)]
        longest = max((int(real.max()) for real in kept if len(real)), default=0)
    keep = max(longest, 1) if count else widest.length
    if keep > max(widest.length, 1):
        raise ValueError(f"longest = {longest}; accepted: at most {widest.length}, the padded length of these batches")
    if len(states) == 1 and chosen[0] is None and widest.length == keep:
        made = Padded(widest.hidden, widest.lengths, widest.padded, None)
    else:
        made = pad_rows([state.hidden for state in states], [state.lengths for state in states], chosen, keep)
    joined = StepState(
        hidden=made.hidden,
        lengths=made.lengths,
        padded=made.padded,
        masks=backbone.masks(made.hidden, made.lengths, made.padded, made.seen),
        tables=widest.tables if keep == widest.length else widest.tables.trim(keep),
        backbone=backbone,
    )
    if made.device_lengths is not None:
        joined.__dict__["device_lengths"] = made.device_lengths
    return joined


def _row_numbers(rows: Indices) -> Indices:
    """Row numbers as compiled code may read them."""
    if rows.dtype != np.int64 or rows.ndim != 1:
        raise ValueError(f"rows must be int64 [B], not {rows.dtype} {list(rows.shape)}")
    return np.ascontiguousarray(rows)


def _no_tables(model: Any, hidden: Tensor) -> Tables:
    return Tables()


def _reach_everything(config: Any, num_layers: int) -> tuple[int | None, ...]:
    return (None,) * num_layers


def _accept(config: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """How the base models of one architecture are run layer by layer.

    Attributes:
        name: As people write it.
        causal: Whether a token sees only what is to its left (decoders).
        embed: ``(model, input_ids [B, T], attention_mask [B, T], token_type_ids [B, T] or None)`` to the input of
            layer 1, [B, T, H].
        run_layer: ``(model, index, state, mask)`` to the output of the layer with that index (from 0), [B, T, H] or a
            tuple that begins with it.
        count_layers: ``(model)`` to L.
        tables: ``(model, hidden [B, T, H])`` to what is computed once per batch.
        final_norm: ``(model)`` to the norm that follows the last layer; None where each layer ends in its own.
        mask_form: What the layers accept as mask.
        reaches: ``(config, L)`` to the largest distance that each layer sees, None for no limit.
        blocks: The layers in parts, for generation; None where a family generates no text.
        embed_rows: ``(model, rows, T)`` to what ``embed`` gives of the same rows, or None where it cannot be had so;
            None: in no case (:mod:`.embeddings`). Whoever replaces ``embed`` replaces it too.
        packs: Whether layers read nothing but states and mask, and every token sees its whole row: then rows can run
            end to end, without padding (:meth:`SteppedBackbone.step`).
        objection: ``(config)`` to why a model of this configuration cannot be run exactly; None if it can.
    """

    name: str
    causal: bool
    embed: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
    run_layer: Callable[[Any, int, StepState, Tensor | None], Any]
    count_layers: Callable[[Any], int]
    tables: Callable[[Any, Tensor], Tables] = _no_tables
    final_norm: Callable[[Any], nn.Module] | None = None
    mask_form: MaskForm = "interface"
    reaches: Callable[[Any, int], tuple[int | None, ...]] = _reach_everything
    objection: Callable[[Any], str | None] = _accept
    blocks: Blocks | None = None
    embed_rows: Callable[[Any, Ragged, int], Tensor | None] | None = None
    packs: bool = False

    def build(self, model: Any) -> SteppedBackbone:
        """Return the stepped form of a base model of this family; what :func:`register_family` takes."""
        return SteppedBackbone(model, self)


class SteppedBackbone(nn.Module):
    """A Hugging Face base model that can be run one layer at a time.

    Attributes:
        model: The base model, as `AutoModel` returns it.
        family: Name of the family.
        num_layers: L.
        hidden_size: H.
        is_decoder: Whether attention is causal.
        packs: Whether :meth:`step` can run rows end to end, without padding.
        boolean_mask: Whether the one mask of all layers is bool [B, 1, 1, T] and hides padding alone, as of the last
            masks that were built (the attention of a model may be changed).

    Raises:
        ModelError: The configuration is one that cannot be run exactly.
    """

    def __init__(self, model: Any, family: Family) -> None:
        super().__init__()
        config = model.config
        objection = family.objection(config)
        if objection:
            raise ModelError(f"This {family.name} backbone cannot be run layer by layer: {objection}.")
        if family.mask_form == "interface":
            attention_of(config)
        self.model = model
        self.training = model.training  # a model in eval mode stays in eval mode
        self.family = family.name
        self.num_layers = family.count_layers(model)
        self.hidden_size = int(config.hidden_size)
        self.is_decoder = family.causal
        self._family = family
        self._reaches = family.reaches(config, self.num_layers)
        self._has_no_order = family.mask_form == "interface" and not family.causal and set(self._reaches) == {None}
        self.boolean_mask = self._masks_padding_alone()
        # A feed-forward part that takes its tokens in chunks of a size refuses other numbers of them.
        self.packs = family.packs and not getattr(config, "chunk_size_feed_forward", 0)

    @property
    def blocks(self) -> Blocks:
        """The layers in parts.

        Raises:
            ModelError: The family does not generate text.
        """
        if self._family.blocks is None:
            raise ModelError(f"{self.family} backbones generate no text here; docs/backbones.md lists those that do")
        return self._family.blocks

    @property
    def reaches(self) -> tuple[int | None, ...]:
        """The largest distance that each layer sees, None for no limit."""
        return self._reaches

    def begin(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> StepState:
        """Embed a batch and compute once what all layers share.

        Args:
            input_ids: Token ids, int64 [B, T].
            attention_mask: 1 at real tokens, 0 at padding, which must be on the right, [B, T], on any device (best the
                CPU, where it is looked at). None: no padding.
            token_type_ids: Segment ids, int64 [B, T]; ignored by families without segments.

        Raises:
            ValueError: The mask has another shape, or a zero to the left of a one.
            ModelError: An attention implementation other than sdpa or eager was chosen in the meantime.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attention_mask = attention_mask.to(torch.int64)
        lengths = _checked_lengths(input_ids, attention_mask)
        hidden = self._family.embed(self.model, input_ids, attention_mask.to(input_ids.device), token_type_ids)
        padded = _shorter_than(lengths, input_ids.shape[1])
        return StepState(
            hidden=hidden,
            lengths=lengths,
            padded=padded,
            masks=self.masks(hidden, lengths, padded),
            tables=self._family.tables(self.model, hidden),
            backbone=self,
        )

    def begin_rows(self, rows: Ragged) -> StepState | None:
        """As :meth:`begin`, of rows of tokens as they lie in memory, for a CPU.

        Args:
            rows: B >= 1 rows.

        Returns:
            The state; None where this backbone, as it is now, has only :meth:`begin`.

        Raises:
            IndexError: A token, segment or position that the embeddings do not know.
        """
        embed, count = self._family.embed_rows, len(rows.lengths)
        if embed is None or type(self).begin is not SteppedBackbone.begin:
            return None
        # One row is the usual case of a single text, and numpy's reductions are dear beside one number.
        shortest, longest = (rows.lengths[0],) * 2 if count == 1 else (rows.lengths.min(), rows.lengths.max())
        length = max(int(longest), 1)
        hidden = embed(self.model, rows, length)
        if hidden is None:
            return None
        lengths, padded = torch.from_numpy(rows.lengths), int(shortest) < length
        masks, tables = self.masks(hidden, lengths, padded), self._family.tables(self.model, hidden)
        return StepState(hidden, lengths, padded, masks, tables, self)

    def step(self, layer: int, state: StepState, pack: bool = False) -> StepState:
        """Run layer `layer` (1..L) on a state that the layer before left.

        Args:
            layer: Which.
            state: The state.
            pack: Run the rows end to end as one, each seeing itself alone, where the family can and padding would cost
                more than the larger attention: for a CPU, where every token costs. What stands at padding is 0 then.

        Raises:
            ValueError: There is no such layer.
        """
        if not 1 <= layer <= self.num_layers:
            raise ValueError(f"layer must lie in 1..{self.num_layers}, not {layer}")
        if pack and self.packs_step(state):
            return self._packed_step(layer, state)
        mask = state.masks[self._reaches[layer - 1]]
        output = self._family.run_layer(self.model, layer - 1, state, mask)
        hidden = output[0] if isinstance(output, tuple) else output
        return state.with_hidden(hidden)

    def packs_step(self, state: StepState) -> bool:
        """Whether :meth:`step`, asked to pack, would run this state's rows end to end."""
        return state.padded and self.packs and self._packing_pays(state)

    def _packing_pays(self, state: StepState) -> bool:
        """By the work in either form: a token costs 12 H^2 products, a pair about 2.4 H with its softmax."""
        per_token, tokens = 5.0 * self.hidden_size, int(state.lengths.sum())
        whole = state.batch_size * state.length
        return tokens * (1.0 + tokens / per_token) < whole * (1.0 + state.length / per_token)

    def _packed_step(self, layer: int, state: StepState) -> StepState:
        """:meth:`step` on the real tokens alone, [1, sum of lengths, H], under a mask of one block a row."""
        rows, device, size = state.batch_size, state.hidden.device, state.hidden.shape[-1]
        places = (torch.arange(state.length) < state.lengths[:, None]).flatten().nonzero()[:, 0].to(device)
        row = torch.repeat_interleave(torch.arange(rows), state.lengths).to(device)
        block = (row[:, None] == row)[None, None]
        mask = block
        if attention_of(self.model.config) == "eager":
            lowest = torch.finfo(state.hidden.dtype).min
            mask = torch.zeros(block.shape, dtype=state.hidden.dtype, device=device).masked_fill_(~block, lowest)
        flat = state.hidden.reshape(-1, size).index_select(0, places)[None]
        output = self._family.run_layer(self.model, layer - 1, state.with_hidden(flat), mask)
        hidden = output[0] if isinstance(output, tuple) else output
        back = hidden.new_zeros((rows * state.length, size)).index_copy(0, places, hidden[0])
        return state.with_hidden(back.view(rows, state.length, size))

    def _masks_padding_alone(self) -> bool:
        """What ``boolean_mask`` says."""
        if not self._has_no_order:
            return False
        config: Any = self._modules["model"].config  # type: ignore[union-attr]
        # Asked at every step: past transformers' own way to it, which is dear, where that is known.
        name = config.__dict__.get("_attn_implementation_internal")
        if name not in ATTENTIONS:
            name = attention_of(config)
        return name != "eager"

    def layer_modules(self) -> nn.ModuleList:
        """Return the list of the L layers inside the model.

        Raises:
            ModelError: There is none of that length (layers that share their weights).
        """
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        found = next((module for module in lists if len(module) == self.num_layers), None)
        if found is None:
            raise ModelError(f"the layers of this {self.family} backbone are not {self.num_layers} separate modules")
        return found

    def hidden(self, layer: int, state: StepState) -> Tensor:
        """Return what exit `layer` reads, [B, T, H]; at layer L the model's ``last_hidden_state``.

        Families whose layers end in a norm give the layer's output. Where the residual stream is not normalised
        (Llama, Qwen, GPT-2, GPT-NeoX, ModernBERT) the model's own final norm is applied, so that every exit reads
        states of the kind that the last layer gives.
        """
        return state.hidden if self._family.final_norm is None else self.final_norm(state.hidden)

    @property
    def final_norm(self) -> nn.Module:
        """The norm that follows the last layer; one that does nothing where layers end in a norm of their own."""
        norm = self._family.final_norm
        return nn.Identity() if norm is None else norm(self.model)

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> list[Tensor]:
        """Return by stepping what the library returns for ``output_hidden_states=True``, L+1 tensors [B, T, H].

        The embeddings, the outputs of layers 1..L-1 before any final norm, and the ``last_hidden_state``.
        """
        state = self.begin(input_ids, attention_mask, token_type_ids)
        states = [state.hidden]
        for layer in range(1, self.num_layers + 1):
            state = self.step(layer, state)
            states.append(state.hidden if layer < self.num_layers else self.hidden(layer, state))
        return states

    def masks(
        self, hidden: Tensor, lengths: Tensor, padded: bool, seen: Tensor | None = None
    ) -> dict[int | None, Tensor | None]:
        """Build the attention masks of a batch, one for each reach that a layer has (see :class:`StepState`).

        Args:
            hidden: [B, T, H].
            lengths: int64 [B] on the CPU.
            padded: Whether any is below T.
            seen: Where tokens are and the first position of empty rows, bool [B, 1, 1, T] on the device, if known.
        """
        self.boolean_mask = self._masks_padding_alone()  # the attention may have been changed while rows waited
        if self.boolean_mask and (hidden.is_cpu or seen is not None or not padded):
            if padded and seen is None:
                seen = _padding_mask(lengths, hidden.shape[1])
            return {None: seen if padded else None}
        form = self._family.mask_form
        eager = form == "interface" and attention_of(self.model.config) == "eager"
        real = _real_tokens(lengths, hidden) if padded and not self.is_decoder else None
        return {
            reach: attention_mask_for(
                hidden.shape[1],
                real,
                device=hidden.device,
                causal=self.is_decoder,
                reach=reach,
                form=form,
                eager=eager,
                dtype=hidden.dtype,
            )
            for reach in dict.fromkeys(self._reaches)
        }


def _checked_lengths(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the row lengths, int64 [B] on the CPU, after one question to the device."""
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        given = f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
        raise ValueError(f"input_ids and attention_mask must both have shape [B, T], not {given}")
    # numpy, once there: a third of torch's time for a few numbers.
    mask = attention_mask.cpu().numpy()
    if (mask == 1).all():
        return torch.full((mask.shape[0],), mask.shape[1], dtype=torch.int64)
    lengths = mask.sum(1)
    if (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any():
        raise ValueError("attention_mask must be 1 at real tokens and 0 after them: batches are padded on the right")
    return torch.from_numpy(lengths)


def _shorter_than(lengths: Tensor, length: int) -> bool:
    """Whether any row is shorter than the padded length."""
    return lengths.shape[0] > 0 and int(lengths.min()) < length


def _padding_mask(lengths: Tensor, length: int) -> Tensor:
    """As :func:`attention_mask_for` makes it where nothing but padding is hidden; bool [B, 1, 1, T] on the CPU."""
    # numpy: between two layers each of torch's operations finds its own code cold.
    counts = np.maximum(lengths.numpy(), 1)  # an empty row sees its first token
    return torch.from_numpy(np.arange(length) < counts[:, None, None, None])


def _real_tokens(lengths: Tensor, hidden: Tensor) -> Tensor:
    """Which positions hold tokens and no padding, bool [B, T] on the device of ``hidden`` [B, T, H]."""
    return torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None].to(hidden.device)


@torch.no_grad()
def deviation(
    backbone: SteppedBackbone, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
) -> float:
    """Return the largest difference at a real token between stepping and the library's own hidden states.

    The check for a new family: below 1e-5 in float32 and eval mode, or the adapter is wrong.

    Args:
        backbone: In eval mode (dropout would make any two passes differ).
        input_ids: Token ids, int64 [B, T].
        attention_mask: 1 at real tokens, int64 [B, T]; of different lengths, or padding is not checked.
        token_type_ids: Segment ids, for families that have them.

    Raises:
        ValueError: The library returns another number of hidden states, or the backbone is in training mode.
    """
    if backbone.model.training:
        raise ValueError(
            "the backbone is in training mode, where dropout makes any two passes differ: call eval() first"
        )
    extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
    output = backbone.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **extra)
    expected = [*output.hidden_states[:-1], output.last_hidden_state]
    stepped = backbone.hidden_states(input_ids, attention_mask, token_type_ids)
    if len(expected) != len(stepped):
        raise ValueError(f"the library returns {len(expected)} hidden states, stepping {len(stepped)}")
    real = attention_mask.bool()
    return max(float((a[real] - b[real]).abs().max()) for a, b in zip(expected, stepped, strict=True))
