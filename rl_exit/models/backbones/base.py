"""Running a Hugging Face backbone one layer at a time.

A :class:`Family` says in a few functions how the base model of one architecture embeds its input and calls its layers;
:class:`SteppedBackbone` does the rest the same way for all of them. The layers are the model's own modules: weights,
dropout, autocast and adapters (LoRA) act as in the model's own forward pass, and only the loop over layers is ours
(and, where nothing but the numbers can show it, the calls inside a layer: :mod:`.quick_layer`).

Shapes: B rows, T tokens (padded on the right), H hidden size, L layers. Layers count from 1; layer 0 is the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rl_exit.errors import ModelError
from rl_exit.models.backbones.blocks import Blocks
from rl_exit.models.backbones.embeddings import Ragged
from rl_exit.models.backbones.masks import ATTENTIONS, MaskForm, attention_mask_for, attention_of
from rl_exit.models.backbones.state import StepState, Tables, real_tokens, shorter_than


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
        drops_padding: ``(model, index)`` to whether a layer does without padding itself on a CPU, under a mask of truth
            values that hides padding alone (:mod:`.quick_layer`). Whoever replaces ``run_layer`` replaces it too.
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
    drops_padding: Callable[[Any, int], bool] = lambda model, index: False

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
        padded = shorter_than(lengths, input_ids.shape[1])
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

    def drops_padding(self, layer: int, state: StepState) -> bool:
        """Whether :meth:`step` computes next to nothing for this state's padding: to pack it would gain nothing."""
        return state.hidden.is_cpu and self.boolean_mask and self._family.drops_padding(self.model, layer - 1)

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
        real = real_tokens(lengths, hidden) if padded and not self.is_decoder else None
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


def _padding_mask(lengths: Tensor, length: int) -> Tensor:
    """As :func:`attention_mask_for` makes it where nothing but padding is hidden; bool [B, 1, 1, T] on the CPU."""
    # numpy: between two layers each of torch's operations finds its own code cold.
    counts = np.maximum(lengths.numpy(), 1)  # an empty row sees its first token
    return torch.from_numpy(np.arange(length) < counts[:, None, None, None])


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
