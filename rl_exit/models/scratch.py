"""A small decoder made new: Llama's architecture with random weights, and a tokenizer trained on the text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from rl_exit.errors import ModelError
from rl_exit.models.pretrained import quiet

WORD = "scratch"
"""The word for ``model.backbone``."""

_END, _PAD = "<|end|>", "<|pad|>"


def make_decoder(
    folder: Path,
    texts: Iterable[str],
    *,
    layers: int,
    hidden: int,
    heads: int,
    vocabulary: int,
    max_length: int,
    seed: int,
) -> None:
    """Write a decoder of random weights with its tokenizer, as transformers reads them.

    The tokenizer is a byte-level BPE, so any text can be written in its tokens; the end-of-text token also begins a
    text. Weights are drawn as transformers draws them; torch's generator is left as it was.

    Args:
        folder: Where to; made if absent.
        texts: Texts to train the tokenizer on.
        layers: L.
        hidden: H, a multiple of twice the heads.
        heads: Attention heads.
        vocabulary: Most tokens, at least 258 (256 bytes, end of text, padding).
        max_length: Longest text in tokens.
        seed: Decides the weights.

    Raises:
        ModelError: Sizes that do not go together.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if hidden % (2 * heads) or vocabulary < 258:
        raise ModelError(
            f"model.scratch: hidden {hidden}, heads {heads}, vocabulary {vocabulary}; accepted: hidden a multiple of "
            f"twice the heads ({2 * heads}), and a vocabulary of at least 258"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[_PAD, _END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    end = core.token_to_id(_END)
    core.post_processor = processors.TemplateProcessing(single=f"{_END} $A", special_tokens=[(_END, end)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=_PAD, eos_token=_END, bos_token=_END)
    tokenizer.model_max_length = max_length
    config = LlamaConfig(
        vocab_size=core.get_vocab_size(),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=-(-8 * hidden // 3 // 16) * 16,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=core.token_to_id(_PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
